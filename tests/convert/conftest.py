import pytest
import torch
import yaml
from sources import SMALL_MODEL, SMALL_TEXT

from mpma_train.cli import main
from mpma_train.models import MpmaForPreTraining


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def convert(tmp_path, capsys):
    """Run `mpma convert` with small sizes for all that is new; returns (model, printed text)."""

    def run(*argv, out="converted", **settings):
        config = tmp_path / f"{out}.yaml"
        text = {} if "--text" in argv else SMALL_TEXT
        config.write_text(yaml.safe_dump(SMALL_MODEL | text | settings))
        argv = ["convert", *map(str, argv), "--config", str(config), "--out", str(tmp_path / out)]
        assert main(argv) == 0, capsys.readouterr().err
        model = MpmaForPreTraining.from_pretrained(tmp_path / out).eval()
        return model, capsys.readouterr().out

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """Run an mpma command that must fail; returns its message."""

    def run(*argv, **settings):
        argv = list(map(str, argv))
        if argv[0] == "convert":
            config = tmp_path / "refused.yaml"
            text = {} if "--text" in argv else SMALL_TEXT
            config.write_text(yaml.safe_dump(SMALL_MODEL | text | settings))
            argv += ["--config", str(config)]
        assert main(argv) == 2
        return capsys.readouterr().err

    return run

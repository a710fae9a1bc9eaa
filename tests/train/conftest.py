import pytest
import torch
import yaml
from train_runs import SETTINGS, write_store


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Sums depend on the number of threads; runs that are compared need the same."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def store_path(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="session")
def config_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "test.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


@pytest.fixture
def pretrain_argv(store_path, config_path, tmp_path):
    """Arguments of a run into `tmp_path / "run"`; later ones win."""

    def argv(*more, out=tmp_path / "run"):
        return [str(config_path), "--data", str(store_path), "--output_dir", str(out), *more]

    return argv

import subprocess
import sys

import pytest

from mpma_train import cli


def test_help_names_every_command_without_importing_torch():
    script = (
        "import sys\nfrom mpma_train import cli\n"
        "try:\n    cli.main(['--help'])\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = ("prepare", "pretrain", "evaluate", "convert", "export", "embed", "env")
    commands += ("bench", "profile")
    assert all(f"\n    {name} " in done.stdout for name in commands)


def test_an_unknown_command_and_none_at_all(capsys):
    for argv in (["train"], []):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == 2
    assert "invalid choice: 'train'" in capsys.readouterr().err


def test_errors_of_any_command_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = ["prepare", "synthetic", "--pairs", "2", "--out", str(tmp_path / "file" / "store")]
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mpma: error: ") and str(tmp_path / "file") in line


def test_only_one_process_of_several_reports_an_error(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["pretrain", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == ""


def test_env_reports_versions_and_backends(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "memory_attention" in out


def test_env_prints_the_parameter_table_of_a_configuration(config_path, capsys):
    assert cli.main(["env", "--parameters", str(config_path)]) == 0
    table = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    counts = {part.strip(): int(count.replace(",", "")) for part, count in table.items()}
    assert counts.pop("total") == sum(counts.values())
    assert counts["image encoder"] > 0 and counts["text encoder"] > 0


def test_a_preset_goes_by_its_name(capsys):
    assert cli.main(["env", "--parameters", "mpma_base"]) == 0
    *_, total = capsys.readouterr().out.splitlines()
    # ViT-B and BERT-base are 86 and 109 million; decoder, fusion and heads come on top.
    assert total.startswith("total") and 195e6 < int(total.split()[-1].replace(",", "")) < 300e6
    assert cli.main(["env", "--parameters", "no_such_preset"]) == 2
    assert "no such file: no_such_preset" in capsys.readouterr().err

"""Every command says that it cannot write before its work, not after it."""

import pytest

from mpma_train import cli, convert, embed, export, output_paths

NOT_A_DIRECTORY = "cannot write to {}: Not a directory"


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Run a command whose work may not begin; returns its message."""

    def work(*args, **kwargs):
        pytest.fail("the work began before the output path was tried")

    for module, name in (
        (embed, "load_subject"),
        (export, "load_model"),
        (convert, "read_checkpoint"),
        (cli.importlib.import_module("mpma_train.evaluate.retrieval"), "evaluate"),
    ):
        monkeypatch.setattr(module, name, work)

    def run(*argv):
        assert cli.main(list(map(str, argv))) == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def file(tmp_path):
    """A file where a directory is wanted."""
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file"


@pytest.mark.parametrize(
    "argv",
    [
        ("convert", "--text", "BERT"),
        ("export", "--to", "timm", "--model", "MODEL"),
        ("embed", "--model", "MODEL", "--data", "STORE"),
    ],
    ids=lambda argv: argv[0],
)
def test_a_directory_that_cannot_be_made(refused, file, argv):
    out = file / "new" / "e.npz"
    place = out.parent if argv[0] == "embed" else out
    assert f"out: {NOT_A_DIRECTORY.format(place)}" in refused(*argv, "--out", out)
    assert file.read_text() == "mine"


def test_embeddings_in_the_place_of_a_directory(refused, tmp_path):
    out = tmp_path / "e.npz"
    out.mkdir()
    told = refused("embed", "--model", "MODEL", "--data", "STORE", "--out", out)
    assert f"out: cannot write to {out}: Is a directory" in told


def test_results_beside_the_model(refused, tmp_path):
    argv = ("evaluate", "retrieval", "--model", tmp_path, "--data", "STORE")
    (tmp_path / "eval").write_text("mine")
    assert f"model: {NOT_A_DIRECTORY.format(tmp_path / 'eval')}" in refused(*argv)
    (tmp_path / "eval").unlink()
    (tmp_path / "eval" / "retrieval.json").mkdir(parents=True)
    assert "retrieval.json: Is a directory" in refused(*argv)


def test_trying_leaves_nothing_behind_and_files_as_they_are(tmp_path, file):
    output_paths.require_writable_directory("out", tmp_path / "a" / "b")
    output_paths.require_writable_file("out", tmp_path / "a" / "e.npz")
    output_paths.require_writable_file("out", file)
    output_paths.require_empty("out", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "mine"


def test_a_directory_without_permission(tmp_path, monkeypatch):
    """Whoever runs the tests may write everywhere, so the refusal is made up."""

    def denied(dir):
        raise PermissionError(13, "Permission denied", dir)

    monkeypatch.setattr(output_paths.tempfile, "TemporaryFile", denied)
    with pytest.raises(PermissionError, match=r"out: cannot write to .*new: Permission denied"):
        output_paths.require_empty("out", tmp_path / "new")

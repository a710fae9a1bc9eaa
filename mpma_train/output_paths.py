"""Where a command writes is tried before its work, which may take hours. Nothing is left there."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_writable_directory(setting: str, path: Path) -> None:
    """The directory takes files, or can be made.

    Raises:
        OSError: names the setting, the path and the reason.
    """
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    with _named(setting, path), tempfile.TemporaryFile(dir=existing):
        pass


def require_writable_file(setting: str, path: Path) -> None:
    """The file can be made, or written over.

    Raises:
        OSError: names the setting, the path and the reason.
    """
    if not path.exists():
        require_writable_directory(setting, path.parent)
        return
    with _named(setting, path), path.open("ab"):
        pass


def require_empty(setting: str, path: Path) -> None:
    """The directory is new or empty, and takes files: nothing is ever overwritten.

    Raises:
        FileExistsError: the path is a file, or a directory that holds something.
        OSError: names the setting, the path and the reason.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{setting}: {path} exists and is not an empty directory")
    require_writable_directory(setting, path)


@contextmanager
def _named(setting: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(f"{setting}: cannot write to {path}: {error.strerror}") from None

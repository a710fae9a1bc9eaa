"""The prepared store: one directory that training and evaluation read, and nothing else.

images.npy       uint8 (N, side, side), grey, a memory map
pairs.parquet    N rows, row i belongs to image i
tokenizer.json   WordPiece, special tokens [PAD] [UNK] [CLS] [SEP] [MASK] and ___
skipped.csv      what was left out, with the reason
meta.json        counts, hashes, settings; written last, so its presence means the store is complete
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .names import LABEL_PREFIX, SPLITS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
UNFINISHED = "unfinished.json"
STATUS = "decoded.npy"


class Store:
    """Reads a prepared store.

    Args:
        path: the directory that `mpma prepare` wrote.

    Raises:
        FileNotFoundError: there is no store at `path`.
        ValueError: the store is incomplete, damaged, or of another format version.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if (self.path / UNFINISHED).exists():
            raise ValueError(
                f"the store {self.path} is incomplete: its preparation was interrupted. "
                "Run the same `mpma prepare` command again; it goes on where it stopped"
            )
        meta = self.path / "meta.json"
        if not meta.is_file():
            raise FileNotFoundError(
                f"no prepared store in {self.path}: expected a meta.json there. "
                "Make a store with `mpma prepare synthetic|mimic-cxr|csv --out DIR`"
            )
        self.meta: dict = json.loads(meta.read_text(encoding="utf-8"))
        if self.meta.get("format") != FORMAT:
            raise ValueError(
                f"the store {self.path} has format {self.meta.get('format')}, expected {FORMAT}: "
                "prepare it again"
            )
        if self.images.shape != (len(self.pairs), self.side, self.side):
            raise ValueError(
                f"the store {self.path} is damaged: images.npy has shape {self.images.shape}, "
                f"expected {(len(self.pairs), self.side, self.side)}"
            )

    @cached_property
    def images(self) -> np.ndarray:
        """uint8 (N, side, side), grey 0..255, read-only memory map."""
        return np.load(self.path / "images.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row an image: identifiers, `view`, `split`, `report`, float32 `label/<Name>`.

        A label is 1 positive, 0 negative, -1 uncertain, NaN not mentioned.
        """
        return pd.read_parquet(self.path / "pairs.parquet")

    @property
    def side(self) -> int:
        """Side of the images in pixels."""
        return int(self.meta["side"])

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels, without the column prefix, in column order."""
        columns = (name for name in self.pairs.columns if name.startswith(LABEL_PREFIX))
        return tuple(name.removeprefix(LABEL_PREFIX) for name in columns)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of one split, int64 (n,), ascending; ValueError for an unknown name."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        return np.flatnonzero(self.pairs["split"].to_numpy() == split)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The store's tokenizer."""
        from .tokenizer import load_tokenizer

        return load_tokenizer(self.path / "tokenizer.json")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def can_go_on(folder: Path, fingerprint: str) -> bool:
    """Whether an interrupted writer with this fingerprint left its images in the directory."""
    note = folder / UNFINISHED
    return (
        note.exists()
        and json.loads(note.read_text()).get("fingerprint") == fingerprint
        and (folder / "images.npy").exists()
        and (folder / STATUS).exists()
    )


class ImageWriter:
    """`images.npy` while it grows; remembers over an interruption which rows are there.

    Args:
        folder: the store's directory.
        count: number of rows planned.
        side: side of an image in pixels.
        fingerprint: hash of everything the images depend on. A later writer with the same
            fingerprint goes on where this one stopped; another one starts afresh.
    """

    def __init__(self, folder: Path, count: int, side: int, fingerprint: str):
        self.path, self.status_path = folder / "images.npy", folder / STATUS
        self.note = folder / UNFINISHED
        self.shape = (count, side, side)
        resumed = can_go_on(folder, fingerprint)
        mode = "r+" if resumed else "w+"
        if not resumed:
            (folder / "meta.json").unlink(missing_ok=True)
            # The note goes first: from here on the directory reads as incomplete.
            self._note("")
        self.images = np.lib.format.open_memmap(
            self.path, mode=mode, dtype=np.uint8, shape=None if resumed else self.shape
        )
        self.status = np.lib.format.open_memmap(
            self.status_path, mode=mode, dtype=bool, shape=None if resumed else (count,)
        )
        if not resumed:
            self._note(fingerprint)

    def _note(self, fingerprint: str) -> None:
        write_atomically(self.note, json.dumps({"fingerprint": fingerprint}).encode())

    def write(self, row: int, image: np.ndarray) -> None:
        """Stores one image, uint8 (side, side)."""
        self.images[row] = image
        self.status[row] = True

    def flush(self) -> None:
        """Brings what was written to the disk, images before the record that they are there."""
        self.images.flush()
        self.status.flush()

    def close_up(self) -> np.ndarray:
        """Removes the rows never written, in place, and returns the row numbers that were kept."""
        kept = np.flatnonzero(self.status)
        if len(kept) < self.shape[0]:
            # Rows are about to move: after an interruption the record would no longer fit them.
            self._note("")
        for target, row in enumerate(kept):
            if target != row:
                self.images[target] = self.images[row]
        self.images.flush()
        offset, rows = self.images.offset, len(kept)
        del self.images, self.status
        if rows < self.shape[0]:
            with self.path.open("r+b") as file:
                shape = (rows, *self.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                # numpy pads the header so that a change of the first length never moves the data.
                if file.tell() != offset:
                    raise RuntimeError("the header of images.npy changed its length")
                file.truncate(offset + rows * self.shape[1] * self.shape[2])
        return kept


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

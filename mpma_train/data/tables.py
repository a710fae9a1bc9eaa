"""CSV tables as they come: every value as text, and what a label cell may hold."""

from __future__ import annotations

import warnings as python_warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd


def read_table(path: Path, needed: tuple[str, ...], warnings: list[str]) -> pd.DataFrame:
    """Reads a .csv or .csv.gz with every value as text, blanks as "".

    A file that is not UTF-8 is read as Latin-1, and `warnings` gets a line that says so.

    Raises FileNotFoundError, or ValueError for a missing column or a file that is no CSV.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    unreadable = (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError)
    try:
        try:
            table = _read(path, "utf-8-sig")
        except UnicodeDecodeError:
            table = _read(path, "latin-1")
            warnings.append(f"{path.name} is not UTF-8: it was read as Latin-1")
    except (*unreadable, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable CSV table ({error})") from None
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path}: missing column {', '.join(missing)}; "
            f"found {', '.join(map(str, table.columns))}"
        )
    return table


def _read(path: Path, encoding: str) -> pd.DataFrame:
    with python_warnings.catch_warnings():
        # Rows longer than the header: pandas would drop their last values, and only warn.
        python_warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(
            path, dtype=str, keep_default_na=False, index_col=False, encoding=encoding
        )


def label_values(cells: pd.Series, path: Path) -> np.ndarray:
    """The label column `cells` of the table at `path` as float32: 1, 0, -1, and NaN for blank.

    Raises ValueError that names the first cell with anything else by its column and its index.
    """
    text = cells.str.strip()
    numbers = pd.to_numeric(text.where(text != ""), errors="coerce")
    wrong = (text != "") & ~numbers.isin((1, 0, -1))
    if wrong.any():
        place = int(wrong.to_numpy().argmax())
        raise ValueError(
            f"{path.name}: column {cells.name!r}, {cells.index.name} {cells.index[place]}: a label "
            f"must be 1 (positive), 0 (negative), -1 (uncertain) or blank (not mentioned), "
            f"got {cells.iloc[place]!r}"
        )
    return numbers.to_numpy(dtype=np.float32)

"""Builds a prepared store from a manifest: decode, tokenizer, tables, and meta.json last.

Decoding runs on threads (Pillow releases the interpreter's lock), keeps a record of what is done,
and goes on from there when the same preparation is run again after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from .images import MAX_PIXELS, UnreadableImageError, read_image
from .manifest import Manifest
from .names import LABEL_PREFIX, SPLITS
from .store import (
    FORMAT,
    STATUS,
    UNFINISHED,
    ImageWriter,
    can_go_on,
    file_hash,
    write_atomically,
)
from .tokenizer import pretrained_tokenizer, train_tokenizer

CHUNK = 128
CHUNKS_PER_FLUSH = 16
STATISTICS_IMAGES = 2000


@dataclass(frozen=True)
class BuildSettings:
    """What a store depends on beside its source.

    Attributes:
        side: side of the stored images in pixels.
        max_skipped: largest share of rows that may be left out.
        max_pixels: images with more pixels are left out.
        tokenizer: directory of a pretrained tokenizer; None trains one on the training reports.
        vocab_size: largest vocabulary of a trained tokenizer.
    """

    side: int = 448
    max_skipped: float = 0.05
    max_pixels: int = MAX_PIXELS
    tokenizer: str | None = None
    vocab_size: int = 30522

    def __post_init__(self) -> None:
        if not 16 <= self.side <= 4096:
            raise ValueError(f"side must be 16 to 4096 pixels, got {self.side}")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped must be a fraction from 0 to 1, got {self.max_skipped}")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be positive, got {self.max_pixels}")
        if self.vocab_size < 100:
            raise ValueError(f"vocab_size must be at least 100, got {self.vocab_size}")


def open_folder(out: Path) -> None:
    """Makes the store's directory; OSError that names it if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write the store to {out}: {error.strerror}") from None


def build_store(
    manifest: Manifest,
    out: Path,
    settings: BuildSettings,
    *,
    source: str,
    workers: int = 1,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the store. A complete store of the same source and settings is left as it is.

    Args:
        manifest: what a reader found.
        out: the store's directory.
        settings: see `BuildSettings`.
        source: name of the reader, for meta.json.
        workers: threads that decode.
        say: takes the lines meant for the user.
        progress: told (images done, images in all).

    Raises:
        ValueError: nothing can be read, or more than `max_skipped` of the rows are left out.
        OSError: the directory cannot be written, or the disk is too small.
    """
    open_folder(out)
    for warning in manifest.warnings:
        say(f"WARNING: {warning}")
    fingerprint = _fingerprint(manifest.rows, settings)
    if _is_complete(out, fingerprint):
        say(f"{out} already holds this store, complete: nothing to do")
        return
    _check_skipped(manifest, settings, out)
    tokenizer = _make_tokenizer(manifest.rows, settings)
    # Before anything of the store that may stand there is touched.
    done = int(np.load(out / STATUS).sum()) if can_go_on(out, fingerprint) else 0
    _say_disk(out, len(manifest.rows), settings.side, done, say)
    writer = ImageWriter(out, len(manifest.rows), settings.side, fingerprint)
    failed = _decode(manifest.rows, writer, settings, workers, progress)
    for row, reason in failed.items():
        manifest.skip(manifest.rows["image_id"][row], manifest.rows["path"][row], reason)
    # Rows are removed only when it is sure that they will not be asked for again.
    _check_skipped(manifest, settings, out, failed)
    kept = writer.close_up()
    rows = manifest.rows.iloc[kept].reset_index(drop=True)
    rows.drop(columns="path").to_parquet(out / "pairs.parquet", index=False)
    write_atomically(out / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    meta = _meta(manifest, rows, out, settings, source) | {
        "vocab_size": tokenizer.get_vocab_size(),
        "source_fingerprint": fingerprint,
    }
    write_atomically(out / "meta.json", json.dumps(meta, indent=2).encode())
    (out / STATUS).unlink()
    (out / UNFINISHED).unlink()
    say(_summary(meta, out))


def _check_skipped(
    manifest: Manifest, settings: BuildSettings, out: Path, failed: dict[int, str] | None = None
) -> None:
    """Writes skipped.csv; raises ValueError if nothing is left or too much was left out."""
    table = pd.DataFrame(manifest.skipped, columns=["image_id", "path", "reason"])
    write_atomically(out / "skipped.csv", table.to_csv(index=False).encode())
    left = len(manifest.rows) - len(failed or ())
    share = len(table) / max(left + len(table), 1)
    reasons = "; ".join(
        f"{n} x {reason}" for reason, n in table["reason"].value_counts()[:5].items()
    )
    if left == 0:
        views = ", ".join(f"{n} {view}" for view, n in manifest.filtered.most_common())
        raise ValueError(
            f"no pair can be prepared: {len(table)} skipped ({reasons or 'none'}), "
            f"other views: {views or 'none'}"
        )
    if share > settings.max_skipped:
        raise ValueError(
            f"{len(table)} of {left + len(table)} pairs ({share:.1%}) were skipped, more than "
            f"--max-skipped {settings.max_skipped:g} allows: {reasons}. "
            f"All are listed in {out / 'skipped.csv'}"
        )


def _fingerprint(rows: pd.DataFrame, settings: BuildSettings) -> str:
    """Hash of the tables, the image files' sizes and times, and the settings."""
    # How much may be skipped changes no image: a run that skipped too much can go on with more.
    depends = asdict(settings) | {"max_skipped": None}
    digest = hashlib.sha256(json.dumps([FORMAT, depends]).encode())
    digest.update(rows.to_csv(index=False).encode())
    for path in rows["path"]:
        try:
            status = os.stat(path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(b"missing\n")
    return digest.hexdigest()


def _is_complete(out: Path, fingerprint: str) -> bool:
    if (out / UNFINISHED).exists() or not (out / "meta.json").is_file():
        return False
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    return meta.get("source_fingerprint") == fingerprint


def _make_tokenizer(rows: pd.DataFrame, settings: BuildSettings):
    if settings.tokenizer is not None:
        return pretrained_tokenizer(settings.tokenizer)
    reports = rows.loc[rows["split"] == "train"].drop_duplicates("study_id")["report"]
    if reports.empty:
        raise ValueError("the split train is empty: expected reports to train a tokenizer on")
    return train_tokenizer(reports, settings.vocab_size)


def _say_disk(out: Path, count: int, side: int, done: int, say: Callable[[str], None]) -> None:
    size, free = count * side * side, shutil.disk_usage(out).free
    rest = (count - done) * side * side
    say(
        f"{count} pairs at {side} x {side} pixels will take {size / 1e6:,.0f} MB in {out} "
        f"({free / 1e6:,.0f} MB are free)"
    )
    if done:
        say(f"going on after an interruption: {done} of {count} images are there")
    if rest > free:
        raise OSError(
            f"not enough disk in {out}: {rest / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
        )


def _decode(
    rows: pd.DataFrame,
    writer: ImageWriter,
    settings: BuildSettings,
    workers: int,
    progress: Callable[[int, int], None],
) -> dict[int, str]:
    """Decodes every row not yet there; returns the reasons of those that cannot be read."""
    paths = rows["path"].to_numpy()
    failed: dict[int, str] = {}

    def read(row: int) -> np.ndarray | str:
        try:
            return read_image(paths[row], settings.side, max_pixels=settings.max_pixels)
        except UnreadableImageError as error:
            return str(error)

    todo = np.flatnonzero(~writer.status)
    done = len(rows) - len(todo)
    progress(done, len(rows))
    try:
        with ThreadPoolExecutor(workers) as pool:
            for number, start in enumerate(range(0, len(todo), CHUNK)):
                chunk = todo[start : start + CHUNK]
                for row, result in zip(chunk, pool.map(read, chunk), strict=True):
                    if isinstance(result, str):
                        failed[int(row)] = result
                    else:
                        writer.write(row, result)
                done += len(chunk)
                progress(done, len(rows))
                if number % CHUNKS_PER_FLUSH == CHUNKS_PER_FLUSH - 1:
                    writer.flush()
    finally:
        writer.flush()
    return failed


def _meta(
    manifest: Manifest, rows: pd.DataFrame, out: Path, settings: BuildSettings, source: str
) -> dict:
    mean, std = _statistics(rows, out)
    reports = rows.drop_duplicates("study_id")["report"]
    split_text = "\n".join(
        sorted(f"{i} {s}" for i, s in zip(rows["image_id"], rows["split"], strict=True))
    )
    reasons = Counter(reason for _, _, reason in manifest.skipped)
    return {
        "format": FORMAT,
        "source": source,
        "side": settings.side,
        "counts": _counts(rows) | dict(manifest.counts),
        "splits": {name: _counts(rows[rows["split"] == name]) for name in SPLITS},
        "labels": _label_counts(rows),
        "skipped": {"images": len(manifest.skipped), "reasons": dict(reasons.most_common(50))},
        "filtered_views": dict(manifest.filtered),
        "section_rules": dict(manifest.rules.most_common()),
        "duplicate_report_share": float(reports.duplicated().mean()),
        "image_mean": mean,
        "image_std": std,
        "hashes": {
            "images": file_hash(out / "images.npy"),
            "pairs": file_hash(out / "pairs.parquet"),
            "tokenizer": file_hash(out / "tokenizer.json"),
            "split": hashlib.sha256(split_text.encode()).hexdigest(),
        },
        "settings": asdict(settings),
        "versions": {name: version(name) for name in ("numpy", "pillow", "tokenizers")},
        "warnings": manifest.warnings,
        "data_use": manifest.data_use,
    }


def _counts(rows: pd.DataFrame) -> dict[str, int]:
    return {
        "images": len(rows),
        "studies": int(rows["study_id"].nunique()),
        "patients": int(rows["patient_id"].nunique()),
    }


def _label_counts(rows: pd.DataFrame) -> dict[str, dict[str, int]]:
    values = {"positive": 1, "negative": 0, "uncertain": -1}
    return {
        column.removeprefix(LABEL_PREFIX): {
            name: int((rows[column] == value).sum()) for name, value in values.items()
        }
        for column in rows.columns
        if column.startswith(LABEL_PREFIX)
    }


def _statistics(rows: pd.DataFrame, out: Path) -> tuple[float, float]:
    """Mean and standard deviation of the training pixels in [0, 1], over evenly chosen images."""
    chosen = np.flatnonzero(rows["split"] == "train")
    if len(chosen) == 0:
        chosen = np.arange(len(rows))
    chosen = chosen[:: max(1, len(chosen) // STATISTICS_IMAGES)]
    images = np.load(out / "images.npy", mmap_mode="r")
    moments = np.array([_moments(images[row]) for row in chosen]).mean(axis=0)
    mean, square = moments
    return float(mean), float(np.sqrt(max(square - mean**2, 1e-12)))


def _moments(image: np.ndarray) -> tuple[float, float]:
    values = image.astype(np.float64) / 255
    return values.mean(), np.square(values).mean()


def _summary(meta: dict, out: Path) -> str:
    parts = ", ".join(f"{name} {meta['splits'][name]['images']}" for name in SPLITS)
    counts = meta["counts"]
    return (
        f"{out}: {counts['images']} pairs of {counts['studies']} studies and "
        f"{counts['patients']} patients ({parts}); {meta['skipped']['images']} skipped"
    )

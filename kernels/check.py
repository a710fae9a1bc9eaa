"""Compiles every kernel in every row of the launch tables for every generation, without a GPU.

`python -m mpma_ext.kernels.check --tables DIR` compiles them all and compares with the committed
tables, `<stem>.csv`; with --write it compiles what changed and writes them anew. Either way it
fails where a row breaks a rule: in bfloat16 and float16 nothing spills, shared memory fits the
chip, and what multiplies does so on tensor cores, by wgmma on sm90.
"""

import argparse
import csv
import functools
import importlib
import os
import pkgutil
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import mpma_ext.kernels
from mpma_ext.kernels.compile import Case, compile_case
from mpma_ext.kernels.launch import SHARED_MEMORY

# A family's files are those whose names begin so.
STEMS = {
    "masked_attention": "masked_attention",
    "memory_attention": "memory_attention",
    "token_patch_similarity": "token_patch",
}
COLUMNS = ("kernel", "generation", "hash", "registers", "spills", "shared", "tensor_cores")


def cases(stem: str) -> dict[tuple[str, str], Case]:
    """All cases of an operator family, by name and generation."""
    found = {}
    for module in pkgutil.iter_modules(mpma_ext.kernels.__path__):
        if module.name.startswith(STEMS[stem]):
            kernels = importlib.import_module(f"mpma_ext.kernels.{module.name}")
            if hasattr(kernels, "compile_cases"):
                found |= {(c.name, c.generation): c for c in kernels.compile_cases()}
    return dict(sorted(found.items()))


def read(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """A committed table, by name and generation; empty where there is none."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row["kernel"], row["generation"]): row for row in csv.DictReader(file)}


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Writes a table, a line a row."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def compiled_row(case: Case) -> dict[str, str]:
    """What compiling a case gives, as it stands in the table."""
    found = compile_case(case) | {"kernel": case.name, "generation": case.generation}
    found["tensor_cores"] = " ".join(found["tensor_cores"])
    return {column: str(found[column]) for column in COLUMNS}


def broken(case: Case, row: dict[str, str]) -> list[str]:
    """The rules that a row breaks."""
    half = "float32" not in case.name
    multiplies = half and case.uses_dot
    room = SHARED_MEMORY[case.generation]
    rules = {
        f"spills {row['spills']} bytes": half and row["spills"] != "0",
        f"takes {row['shared']} bytes of {room} of shared memory": int(row["shared"]) > room,
        "multiplies without tensor cores": multiplies and not row["tensor_cores"],
        "multiplies without wgmma": (
            multiplies and case.generation == "sm90" and "wgmma" not in row["tensor_cores"]
        ),
    }
    return [rule for rule, is_broken in rules.items() if is_broken]


def check(stem: str, tables: Path, *, anew: bool, jobs: int) -> list[str]:
    """Compiles a family's cases and says what is wrong; `anew` writes its table.

    With `anew`, rows whose hash still holds are taken over as they are.
    """
    path = tables / f"{stem}.csv"
    if not anew and not path.exists():
        return [f"{path} is not there: --write makes it"]
    wanted, before = cases(stem), read(path)
    digests = {key: case.digest() for key, case in wanted.items()}
    known = {row["hash"]: row for row in before.values()} if anew else {}
    # Rows of one hash are one kernel, compiled once.
    missing = {digest: key for key, digest in digests.items() if digest not in known}
    try:
        with ProcessPoolExecutor(jobs) as pool:
            compiled = pool.map(partial(_compiled, stem), missing.values(), chunksize=8)
            for number, (digest, row) in enumerate(zip(missing, compiled, strict=True), 1):
                known[digest] = row
                if number % 50 == 0:
                    print(f"{stem}: {number} of {len(missing)} compiled", flush=True)
    finally:
        rows = {
            key: known[digest] | {"kernel": key[0], "generation": key[1]}
            for key, digest in digests.items()
            if digest in known
        }
        if anew:  # what was compiled before an interruption is kept
            write(path, rows.values())
    wrong = [
        f"{' '.join(k)} {rule}" for k, case in wanted.items() for rule in broken(case, rows[k])
    ]
    if not anew:
        wrong += [f"{' '.join(k)} is not as in {path}" for k in wanted if rows[k] != before.get(k)]
        wrong += [f"{' '.join(k)} of {path} is no case" for k in before if k not in wanted]
    print(f"{stem}: {len(wanted)} cases, {len(missing)} compiled, {len(wrong)} faults", flush=True)
    return wrong


@functools.cache
def _cases(stem: str) -> dict[tuple[str, str], Case]:
    return cases(stem)


def _compiled(stem: str, key: tuple[str, str]) -> dict[str, str]:
    """In a process of its own, which a jitted function cannot be sent to."""
    return compiled_row(_cases(stem)[key])


def main(argv: list[str] | None = None) -> int:
    """The command; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "stems", nargs="*", default=[*STEMS], metavar="FAMILY", help=", ".join(STEMS)
    )
    parser.add_argument("--tables", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--write", action="store_true", help="compile what changed, write tables")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="compile so many at a time"
    )
    arguments = parser.parse_args(argv)
    unknown = set(arguments.stems) - set(STEMS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(STEMS)}")
    wrong = []
    for stem in arguments.stems:
        wrong += check(stem, arguments.tables, anew=arguments.write, jobs=arguments.jobs)
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

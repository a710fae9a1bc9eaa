"""Compiles every CUDA source for every target, without a GPU, and compares with the table.

`python tests/cuda/compile_check.py` fails where a kernel spills registers, or where its registers,
stack or static shared memory differ from docs/kernels/cuda.csv; with --write it writes the table.
(Dynamic shared memory is the launch's, not the compiler's, to know.) Numbers are compared only
between equal versions of nvcc.
"""

import argparse
import csv
import itertools
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"))  # under another name than __main__ it builds nothing
FLAGS = [*SETUP["NVCC_FLAGS"], *SETUP["CUDA_ARCHITECTURES"], "-Xptxas", "-v"]
find_nvcc = SETUP["find_nvcc"]
PYTHON = sysconfig.get_path("include")
TABLE = ROOT / "docs" / "kernels" / "cuda.csv"
EXAMPLE = ROOT / "tests" / "cuda" / "example_kernels.cu"
COLUMNS = ("source", "kernel", "target", "registers", "stack", "spills", "shared", "nvcc")
Row = dict[str, str]

# What ptxas says of one kernel for one target.
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def sources() -> list[Path]:
    """The project's CUDA sources, and the tests' example."""
    return [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), EXAMPLE]


def nvcc_version(nvcc: str) -> str:
    """Release of the compiler, such as 13.0."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def demangle(names: Sequence[str]) -> list[str]:
    """Kernels' names and template arguments, without namespaces, casts and parameters."""
    found = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        re.sub(r"^void |mpma::cuda::|\(anonymous namespace\)::|\((int|bool|long)\)", "", name)
        .split("(")[0]
        .replace(" ", "")
        for name in found
    ]


def parse(source: str, report: str, version: str) -> list[Row]:
    """The table's rows of what ptxas reported of one source."""
    matches = list(REPORT.finditer(report))
    kernels = demangle([match["kernel"] for match in matches])
    return [
        {
            "source": source,
            "kernel": kernel,
            "target": match["target"],
            "registers": match["registers"],
            "stack": match["stack"],
            "spills": str(int(match["stores"]) + int(match["loads"])),
            "shared": (re.search(r"(\d+) bytes smem", match["rest"]) or [0, "0"])[1],
            "nvcc": version,
        }
        for kernel, match in zip(kernels, matches, strict=True)
    ]


def compile_source(source: Path, nvcc: str) -> list[Row]:
    """Compiles a source for all targets; RuntimeError with the compiler's words where it fails."""
    includes = [f"-I{path}" for path in (ROOT / "csrc", PYTHON, *include_paths())]
    with tempfile.TemporaryDirectory() as folder:
        output = ["-c", str(source), "-o", f"{folder}/compiled.o"]
        run = subprocess.run([nvcc, *FLAGS, *includes, *output], capture_output=True, text=True)
    name = str(source.relative_to(ROOT))
    if run.returncode:
        raise RuntimeError(f"{name} does not compile:\n{run.stdout}{run.stderr}")
    return parse(name, run.stdout + run.stderr, nvcc_version(nvcc))


def read(path: Path) -> list[Row]:
    """The committed table; empty where there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def faults(rows: Sequence[Row], committed: Sequence[Row]) -> list[str]:
    """What is wrong with compiled rows, beside the committed ones of the same sources."""

    def key(row: Row) -> str:
        return f"{row['source']}: {row['kernel']} on {row['target']}"

    wrong = [f"{key(r)} spills {r['spills']} bytes" for r in rows if r["spills"] != "0"]
    compiled, before = {key(r): r for r in rows}, {key(r): r for r in committed}
    wrong += [f"{name} is not in the table" for name in compiled if name not in before]
    wrong += [f"{name} is in the table and nowhere else" for name in before if name not in compiled]
    for name in compiled.keys() & before.keys():
        now, then = compiled[name], before[name]
        if now["nvcc"] == then["nvcc"]:
            wrong += [
                f"{name}: {column} is {now[column]}, in the table {then[column]}"
                for column in COLUMNS
                if now[column] != then[column]
            ]
    return sorted(wrong)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help="some sources instead of all")
    parser.add_argument("--write", action="store_true", help="write the rows of these sources")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="sources at a time")
    arguments = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        parser.error("nvcc is neither on PATH nor under CUDA_HOME")
    chosen = [path.resolve() for path in arguments.sources] or sources()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        compiled = pool.map(lambda path: compile_source(path, nvcc), chosen)
        rows = list(itertools.chain.from_iterable(compiled))
    rows.sort(key=lambda row: tuple(row[column] for column in ("source", "kernel", "target")))
    width = max((len(row["kernel"]) for row in rows), default=0)
    for row in rows:
        print(
            f"{row['kernel']:{width}}  {row['target']:7} {row['registers']:>3} registers"
            f" {row['stack']:>5} stack {row['spills']:>5} spills {row['shared']:>6} shared"
        )
    names = {str(path.relative_to(ROOT)) for path in chosen}
    committed = read(TABLE)
    others = [row for row in committed if arguments.sources and row["source"] not in names]
    if arguments.write:
        committed = sorted(
            [*rows, *others], key=lambda row: (row["source"], row["kernel"], row["target"])
        )
        write(TABLE, committed)
    wrong = faults(rows, [row for row in committed if row not in others])
    print(
        f"{len(chosen)} sources, {len(rows)} kernels compiled, {len(wrong)} faults",
        *wrong,
        sep="\n",
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

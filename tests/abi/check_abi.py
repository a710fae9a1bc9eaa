"""One wheel under another PyTorch: builds it here, installs it there and runs the CPU operators.

`python tests/abi/check_abi.py --torch 2.12.1` makes the wheel with this environment's torch, an
environment with the other one, and runs in it tests/ext's tests of every operator, forward and
backward, against the definition in float64. The package index has CUDA builds of torch only, which
take several GB with what they need, so the environment is removed in the end.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests" / "ext"
# Torch brings its own Triton.
NEEDED = ("numpy", "einops", "pytest", "hypothesis")


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """A command that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=True)


def build_wheel(folder: Path) -> Path:
    """The project's wheel, made by this environment."""
    wheel = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(sys.executable, *wheel, "--wheel-dir", folder, ROOT)
    (found,) = folder.glob("*.whl")
    if "-abi3-" not in found.name:
        raise SystemExit(f"{found.name} is not for every Python: expected the tag abi3")
    return found


def make_environment(folder: Path, version: str, constraints: Path) -> Path:
    """The Python of a new environment with the other torch and what the tests need."""
    venv.create(folder, clear=True, with_pip=True)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints.write_text("\n".join(line for line in lines if not line.startswith("torch==")))
    python = folder / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "--constraint", constraints)
    run(*install, f"torch=={version}", *NEEDED)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="2.12.1", help="the other version")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-abi", help="its environment")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        wheel = build_wheel(scratch / "wheel")
        print(f"{wheel.name}, built beside torch {torch.__version__}", flush=True)
        # Elsewhere: here `import mpma_ext` would find the sources.
        tests = shutil.copytree(TESTS, scratch / "tests")
        try:
            python = make_environment(folder, arguments.torch, scratch / "constraints.txt")
            run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
            run(python, "-m", "mpma_ext", cwd=tests)
            pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
            run(*pytest, "test_ops.py", "test_random_operands.py", cwd=tests)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

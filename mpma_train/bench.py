"""`mpma bench`: the benchmark suite of the repository this package is installed from."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mpma_train


def run(argv: Sequence[str]) -> int:
    """`python -m benchmarks` with the same arguments, in the repository's root.

    Raises:
        ValueError: the package does not stand beside the suite, which no wheel carries.
    """
    root = Path(mpma_train.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise ValueError(
            f"bench: expected the repository's folder benchmarks beside mpma_train, in {root}; "
            "install from a checkout: `make install`"
        )
    return subprocess.run([sys.executable, "-m", "benchmarks", *argv], cwd=root).returncode

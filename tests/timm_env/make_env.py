"""Make the environment of the timm tests beside the main one:  python make_env.py .venv-timm

Run by the main environment's Python. timm needs torchvision, whose published wheels are CUDA
builds: beside a CPU torch its import raises, and wherever it is installed transformers imports it
too. So timm and torchvision lie in an environment of their own, which sees the main one's packages;
the main one never sees these.
"""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import torch

TIMM = "timm==1.0.31"
HERE = Path(__file__).parent


def torchvision_requirement() -> str:
    """The release line made for this torch: 2.13 and 0.28 came together, and so on."""
    major, minor = map(int, torch.__version__.split(".")[:2])
    if major != 2:
        raise SystemExit(f"no torchvision release line known for torch {torch.__version__}")
    return f"torchvision==0.{minor + 15}.*"


def works(python: Path) -> bool:
    """Whether the environment stands and its timm imports beside the torch of today."""
    check = [python, "-c", "import timm, torch; print(torch.__version__)"]
    if not python.exists():
        return False
    result = subprocess.run(check, capture_output=True, text=True)
    return result.returncode == 0 and result.stdout.strip() == torch.__version__


def make(folder: Path) -> None:
    """Make the environment in `folder`, unless it stands already."""
    python = folder / "bin" / "python"
    if works(python):
        print(f"{folder}: already made")
        return
    venv.create(folder, clear=True, with_pip=True)
    # Without --no-deps, pip would bring a torch of its own, a CUDA build of several GB.
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", TIMM]
    subprocess.run([*install, torchvision_requirement()], check=True)

    [site_packages] = folder.glob("lib/python*/site-packages")
    # It loads beside one build of torch only and timm needs nothing of it: without it, every
    # machine tests the same.
    for library in site_packages.glob("torchvision/_C*.so"):
        library.unlink()
    main = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    lines = [f"import site; site.addsitedir({str(Path(p).resolve())!r})" for p in main]
    shutil.copy(HERE / "torchvision_schemas.py", site_packages)
    (site_packages / "mpma_main_environment.pth").write_text(
        "\n".join([*lines, "import torchvision_schemas"]) + "\n"
    )
    if not works(python):
        raise SystemExit(
            f"{folder}: made, but its timm does not import; try {python} -c 'import timm'"
        )
    print(f"{folder}: {TIMM}, {torchvision_requirement()}, the rest from {', '.join(main)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    make(Path(sys.argv[1]))

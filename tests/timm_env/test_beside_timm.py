"""Run every check_*.py of this folder where timm is: in the environment that make_env.py makes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENT = ROOT / ".venv-timm"


def timm_python():
    python = ENVIRONMENT / "bin" / "python"
    if python.exists():
        return str(python)
    return sys.executable if importlib.util.find_spec("timm") else None


def test_beside_timm():
    """One process for all of them: most of the time goes into its imports."""
    python = timm_python()
    if python is None:
        pytest.skip(f"no timm: python tests/timm_env/make_env.py {ENVIRONMENT.name} brings it")
    checks = sorted(map(str, HERE.glob("check_*.py")))
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *checks]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr

import sys
from pathlib import Path

# The suite is not installed: it is run, and imported here, from the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

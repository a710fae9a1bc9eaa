"""`python -m mpma_train`, the same as the console script `mpma`."""

import sys

from mpma_train.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m mpma_ext`: report the installation."""

from mpma_ext.env import report

if __name__ == "__main__":
    print(report())

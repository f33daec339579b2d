"""Measures the norm behind a sum: the same as ``vlmops bench add_norm``."""

import sys

from vlmops.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "add_norm", *sys.argv[1:]]))

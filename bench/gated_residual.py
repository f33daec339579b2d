"""Measures the gated residual: the same as ``vlmops bench gated_residual``."""

import sys

from vlmops.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "gated_residual", *sys.argv[1:]]))

"""Measures M-RoPE: the same as ``vlmops bench mrope``."""

import sys

from vlmops.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "mrope", *sys.argv[1:]]))

"""Measures attention: the same as ``vlmops bench packed_attention``."""

import sys

from vlmops.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "packed_attention", *sys.argv[1:]]))

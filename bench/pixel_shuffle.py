"""Measures pixel shuffle: the same as ``vlmops bench pixel_shuffle``."""

import sys

from vlmops.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "pixel_shuffle", *sys.argv[1:]]))

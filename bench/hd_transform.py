"""Measures the HD transform: the same as ``vlmops bench hd_transform``."""

import sys

from vlmops.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "hd_transform", *sys.argv[1:]]))

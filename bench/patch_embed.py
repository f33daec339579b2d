"""Measures patch embedding: the same as ``vlmops bench patch_embed``."""

import sys

from vlmops.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "patch_embed", *sys.argv[1:]]))

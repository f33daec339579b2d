"""Measures the gated cross-attention: the same as ``vlmops bench gated_cross_attention``."""

import sys

from vlmops.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "gated_cross_attention", *sys.argv[1:]]))

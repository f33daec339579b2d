"""Measures a Perceiver's attention: the same as ``vlmops bench perceiver_attention``."""

import sys

from vlmops.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "perceiver_attention", *sys.argv[1:]]))

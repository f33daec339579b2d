"""Measures attention of learned queries: the same as ``vlmops bench qformer_attention``."""

import sys

from vlmops.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "qformer_attention", *sys.argv[1:]]))

"""Measures the projector: the same as ``vlmops bench mlp_projector``."""

import sys

from vlmops.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "mlp_projector", *sys.argv[1:]]))

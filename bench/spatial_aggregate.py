"""Measures the spatial aggregation: the same as ``vlmops bench spatial_aggregate``."""

import sys

from vlmops.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "spatial_aggregate", *sys.argv[1:]]))

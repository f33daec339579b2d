"""``python -m vlmops``: the command line, where its script is not on PATH."""

import sys

from vlmops.cli import main

sys.exit(main())

"""Rewrites the tables of README.md that come from code: what stands between two markers.

``python bench/tables.py`` writes, ``python bench/tables.py --check`` fails if it would.
"""

import argparse
import difflib
import sys
from pathlib import Path

from vlmops import survey

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = (f"<!-- vlmops inspect --all: {what} -->" for what in ("begin", "end"))


def renewed(text: str, table: str) -> str:
    """Ends the program if the markers are not there, once each and in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        sys.exit(f"expected the lines {BEGIN} and {END} in {README.name}, once each")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the tables are not current")
    check = parser.parse_args(argv).check
    old = README.read_text()
    renewed(old, "")
    new = renewed(old, survey.markdown(list(survey.inspect_all())))
    if not check:
        README.write_text(new)
        return 0
    lines = (old.splitlines(), new.splitlines(), README.name, "what vlmops inspect --all says")
    difference = list(difflib.unified_diff(*lines, lineterm="", n=0))
    if difference:
        print("\n".join(difference), "\nrun: make tables", sep="\n", file=sys.stderr)
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

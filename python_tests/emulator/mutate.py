"""Deletes each barrier, fence and wait of the good kernels in turn; the emulator must object.

Part of `make mutants`. Works on a copy of csrc, about 5 s a deletion.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ORDER = re.compile(
    r"__syncthreads\(\);|__syncwarp\(\w*\);|__threadfence\(\);|cp_async_wait<\d>\(\);|"
    r"cp_async_commit\(\);"
)
# A fresh process, since a module is loaded once: prints the first objection.
RUN = """
import sys
import torch
from emulator.test_emulator import GOOD, check_of
torch.manual_seed(0)
for case, all_sizes in GOOD.items():
    for sizes in all_sizes:
        try:
            check_of(case)("checked", case, *sizes)
        except RuntimeError as error:
            sys.exit(str(error))
        except AssertionError:
            pass  # wrong numbers are no detector
print("survived")
"""


def main():
    """Prints a line per deletion; fails if one survives."""
    survivors = 0
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(TESTS.parent / "csrc", Path(directory, "csrc"))
        shutil.copytree(TESTS / "emulator", Path(directory, "python_tests", "emulator"))
        for source in sorted(Path(directory, "csrc", "emulator", "good").glob("*.cu")):
            text = source.read_text()
            for found in ORDER.finditer(text):
                source.write_text(text[: found.start()] + ";" + text[found.end() :])
                done = subprocess.run(
                    [sys.executable, "-c", RUN],
                    cwd=Path(directory, "python_tests"),
                    capture_output=True,
                    text=True,
                )
                survived = done.returncode == 0 or "kernel vlmops::" not in done.stderr
                survivors += survived
                line = text.count("\n", 0, found.start()) + 1
                verdict = done.stdout + done.stderr if survived else done.stderr.split(": ")[1]
                print(f"{source.name}:{line} {found.group()} {verdict.strip()}", flush=True)
            source.write_text(text)
    sys.exit(f"{survivors} survived" if survivors else 0)


if __name__ == "__main__":
    main()

"""Print torch's include directory, for CMake.

Looks in the build environment first, then in the environment that the package is being installed
into: in pip's isolated builds torch cannot be imported, but sysconfig still names the target
environment's site-packages.
"""

import importlib.util
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

NEEDED = "torch/csrc/stable/ops.h"


def candidates() -> Iterator[Path]:
    """Places where a torch may be installed, the likeliest first."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    roots.append(site.getusersitepackages())
    for root in roots:
        yield Path(root) / "torch"


def main() -> int:
    """Prints the directory, or what was looked through and what to do; returns the exit code."""
    seen = []
    for package in candidates():
        include = package / "include"
        if (include / NEEDED).exists():
            print(include)
            return 0
        seen.append(str(package))
    print(
        "vlmops is compiled against torch's headers, and no torch 2.11 or later was found in: "
        + ", ".join(dict.fromkeys(seen))
        + ".\nInstall torch first and run the same command again; if torch is somewhere else, pass "
        "-C cmake.define.VLMOPS_TORCH_INCLUDE=/path/to/torch/include; with uv, pass "
        "--no-build-isolation.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())

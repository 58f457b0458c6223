"""Checks that no range-for walks over what a temporary pointer owned.

`for (x : f()->member)` destroys what `f()` returned before the first turn (until C++23); where that
was a shared_ptr, the object may be gone.

Usage: lifetimes.py REPOSITORY. Prints one line per violation and exits 1 when there is any.
"""

import pathlib
import re
import sys

ROOMS = ("base", "tables", "kernels", "engine", "service", "clients", "tests")
# at() gives what its container still holds.
RANGE_FOR = re.compile(r"for \([^;{}()]*?[^:]:\s[^;{}]*?\b(?!at\()\w+\([^()]*\)->")


def check(root: pathlib.Path) -> list[str]:
    problems = []
    for room in ROOMS:
        for path in sorted((root / room).rglob("*")):
            if path.suffix not in (".cc", ".h", ".cu", ".cuh"):
                continue
            text = path.read_text(encoding="utf-8")
            for found in RANGE_FOR.finditer(text):
                line = text.count("\n", 0, found.start()) + 1
                problems.append(f"{path.relative_to(root)}:{line}: a range over what a temporary owns,"
                                " want a variable that holds it")
    return problems


def main() -> int:
    problems = check(pathlib.Path(sys.argv[1]))
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

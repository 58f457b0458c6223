"""Checks that plug-in files and the lists that name them agree, both ways.

Usage: registries.py REPOSITORY. Prints one line per violation and exits 1 when there is any.
"""

import pathlib
import re
import sys

# list, macro, glob of the plug-in files
POINTS = (
    ("engine/policies/policies.def", "KEEPSET_POLICY", "engine/policies/*_policy.cc"),
    ("engine/codecs/codecs.def", "KEEPSET_CODEC", "engine/codecs/*_codec.cc"),
    ("kernels/backends.def", "KEEPSET_BACKEND", "kernels/*/*_backend.cc"),
    ("service/memory/transports.def", "KEEPSET_TRANSPORT", "service/memory/*_transport.cc"),
    ("service/registry/sources.def", "KEEPSET_TABLE_SOURCE", "service/registry/**/*_source.cc"),
)
SUFFIX = re.compile(r"_(policy|codec|backend|transport|source)$")


def check(root: pathlib.Path) -> list[str]:
    problems = []
    for list_name, macro, pattern in POINTS:
        path = root / list_name
        if not path.exists():
            problems.append(f"{list_name}: missing")
            continue
        lines = [line for line in path.read_text(encoding="utf-8").splitlines()
                 if not line.lstrip().startswith("//")]
        listed = re.findall(macro + r"\((\w+)\s*,", "\n".join(lines))
        files = {SUFFIX.sub("", file.stem) for file in root.glob(pattern)}
        for name in sorted({name for name in listed if listed.count(name) > 1}):
            problems.append(f"{list_name}: {name} is listed twice")
        for name in sorted(set(listed) - files):
            problems.append(f"{list_name}: {name} has no file ({pattern})")
        for name in sorted(files - set(listed)):
            problems.append(f"{list_name}: no line for {name} ({pattern})")
    return problems


def main() -> int:
    problems = check(pathlib.Path(sys.argv[1]))
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

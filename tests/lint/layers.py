"""Checks the arrows of STYLE.md: which room may include which.

Usage: layers.py REPOSITORY. Prints one line per violation and exits 1 when there is any.
"""

import pathlib
import re
import sys

# Room -> rooms it may include beside itself. A room is the longest matching path prefix; single headers
# are named where only they are open. "system:" entries are prefixes of <...> or "..." includes that are
# forbidden to everybody else.
ALLOWED = {
    "base": set(),
    "proto": set(),
    "tables": {"base"},
    "kernels": {"base"},
    "kernels/cpu": {"base", "kernels"},
    "kernels/cuda": {"base", "kernels"},
    "engine/policies": {"base", "tables", "kernels", "engine/operation_types.h"},
    "engine/codecs": {"base", "kernels"},
    "engine": {
        "base",
        "tables",
        "kernels",
        "engine/policies/retention_policy.h",
        "engine/policies/policy_parameters.h",
        "engine/policies/policy_registry.h",
        "engine/codecs/kv_codec.h",
    },
    "service/memory": {"base", "kernels", "proto/side_socket_wire.h"},
    "service/registry": {"base", "tables"},
    "service/registry/etcd": {"base", "tables", "service/registry", "etcd"},
    "service/metrics": {"base"},
    "service/server_config": {"base", "keepset/v1"},
    "service/rpc": {
        "base",
        "tables",
        "kernels/views.h",
        "kernels/compute_backend.h",
        "engine",
        "engine/policies/policy_registry.h",
        "service/memory/memory_transport.h",
        "service/memory/session_manager.h",
        "service/registry/contained_read.h",
        "service/registry/registry_authority.h",
        "service/registry/registry_types.h",
        "service/registry/table_loader.h",
        "service/registry/table_registry.h",
        "service/registry/table_source.h",
        "service/metrics",
        "keepset/v1",
    },
    "service": None,  # server.cc knows everything
    "clients/cpp": {"base", "engine/keepset.h", "keepset/v1", "proto/side_socket_wire.h"},
    "clients/cli": {
        "base",
        "clients/cpp",
        "engine/keepset.h",
        "keepset/v1",
        "proto/side_socket_wire.h",
    },
    "tests": None,
}

# Third-party headers and the rooms that may see them; every other room may not.
THIRD_PARTY = {
    r"hwy/": {"kernels/cpu", "tests"},
    r"tbb/|oneapi/tbb": {"kernels/cpu", "service/rpc", "tests"},
    r"cuda|cublas": {"kernels/cuda", "tests"},
    r"grpc": {
        "proto",
        "service/rpc",
        "service/registry/etcd",
        "service",
        "clients/cpp",
        "clients/cli",
        "tests",
    },
    r"google/protobuf": {
        "proto",
        "service/rpc",
        "service/server_config",
        "service",
        "clients/cpp",
        "clients/cli",
        "tests",
    },
    r"prometheus/": {"service/metrics", "tests"},
    r"nlohmann/": {
        "tables",
        "service/registry",
        "engine",
        "clients/cli",
        "clients/cpp",
        "tests",
    },
    r"openssl/": {"tables", "service/memory", "tests"},
}

ROOMS = sorted(ALLOWED, key=len, reverse=True)
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]')


def room_of(path: str) -> str | None:
    for room in ROOMS:
        if path == room or path.startswith(room + "/"):
            return room
    return None


def targets_of(include: str) -> str | None:
    """The room an include points into; generated wire types count as keepset/v1 and etcd."""
    for wire in ("keepset/v1", "etcd"):
        if include.startswith(wire + "/"):
            return wire
    return room_of(include)


def check(root: pathlib.Path) -> list[str]:
    problems = []
    for suffix in ("*.h", "*.cc", "*.c", "*.cu", "*.cuh", "*.def"):
        for path in sorted(root.rglob(suffix)):
            relative = path.relative_to(root).as_posix()
            room = room_of(relative)
            if room is None or relative.startswith("build"):
                continue
            text = path.read_text(encoding="utf-8")
            if "KEEPSET_HAS_CUDA" in text and path.suffix != ".def":
                problems.append(f"{relative}: KEEPSET_HAS_CUDA belongs in .def files and CMake only")
            for number, line in enumerate(text.splitlines(), 1):
                match = INCLUDE.match(line)
                if not match:
                    continue
                problem = judge(room, match.group(2), quoted=match.group(1) == '"')
                if problem:
                    problems.append(f"{relative}:{number}: {problem}")
    return problems


def judge(room: str, include: str, quoted: bool) -> str | None:
    for pattern, rooms in THIRD_PARTY.items():
        if re.match(pattern, include) and room not in rooms:
            return f"{room} must not include {include} (open to {', '.join(sorted(rooms))})"
    if not quoted:
        return None
    target = targets_of(include)
    allowed = ALLOWED[room]
    if target is None or target == room or allowed is None:
        return None
    if target in allowed or include in allowed:
        return None
    if target == "tests":
        return f"{room} must not include tests"
    return f"{room} must not include {include} (may include {', '.join(sorted(allowed)) or 'nothing of ours'})"


def main() -> int:
    problems = check(pathlib.Path(sys.argv[1]))
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

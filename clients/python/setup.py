"""Generates the wire types from proto/ before packaging; everything else is in pyproject.toml."""

import pathlib

from setuptools import setup

HERE = pathlib.Path(__file__).resolve().parent
PROTO = HERE.parent.parent / "proto"
OUT = HERE / "src"


def generate() -> None:
    """Writes src/keepset/v1/*_pb2*.py. A source distribution brings them already."""
    if not PROTO.is_dir():
        return
    from grpc_tools import protoc

    names = ("common", "compression", "session", "server", "table")
    files = [str(PROTO / "keepset" / "v1" / f"{name}.proto") for name in names]
    code = protoc.main(
        ["protoc", f"-I{PROTO}", f"--python_out={OUT}", f"--pyi_out={OUT}", f"--grpc_python_out={OUT}"]
        + files
    )
    if code != 0:
        raise SystemExit(f"protoc failed with {code} on {files}")
    (OUT / "keepset" / "v1" / "__init__.py").write_text(
        '"""Generated wire types of package keepset.v1."""\n', encoding="utf-8"
    )


generate()
setup()

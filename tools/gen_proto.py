"""Regenerates the protobuf modules beside their .proto files. `--check` writes nothing and fails where they differ.

Usage: python tools/gen_proto.py [--check]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

SOURCE = Path(__file__).resolve().parent.parent / "src"
FOLDER = Path("baton/proto/baton/v1")


def generate(out: Path) -> None:
    """Writes `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` of every .proto file below `out`."""
    protos = sorted(str(p.relative_to(SOURCE)) for p in (SOURCE / FOLDER).glob("*.proto"))
    arguments = [
        "protoc",
        f"-I{SOURCE}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
        *protos,
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed; its message is above")


def main() -> int:
    """Returns the exit status: 0 fine, 1 when `--check` found a difference."""
    if "--check" not in sys.argv[1:]:
        generate(SOURCE)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        stale = [
            fresh.name
            for fresh in sorted((Path(scratch) / FOLDER).iterdir())
            if not (SOURCE / FOLDER / fresh.name).exists()
            or (SOURCE / FOLDER / fresh.name).read_bytes() != fresh.read_bytes()
        ]
    if stale:
        print(f"stale: {', '.join(stale)}; run `make proto`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

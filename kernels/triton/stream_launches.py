"""How the memory-bound kernels are launched: one table for all GPUs and dtypes, checked in.

A size that a model fixes picks the entry, never the number of rows of a step: so a row is summed in the same order in
every batch, and nothing is tuned or compiled while requests wait. Pure data, as `launch_table.py`.
"""

from __future__ import annotations

from baton.kernels.triton.launch_table import Launch

__all__ = ["TABLE", "USES_VECTORS", "stream_launch"]

_ANY = 1 << 62

USES_VECTORS = dict.fromkeys((80, 90), ("ld.global.v4.b32",))
"""For `CompileCase.uses`: 16 bytes per thread and load."""

TABLE: dict[str, tuple[tuple[int, Launch], ...]] = {
    # A whole row per program, or several short ones: BLOCK elements.
    "norm": (
        (1024, Launch.of(4, 1, BLOCK=1024)),
        (4096, Launch.of(8, 1, BLOCK=4096)),
        (8192, Launch.of(8, 1, BLOCK=8192)),
        (16384, Launch.of(16, 1, BLOCK=16384)),
        (65536, Launch.of(32, 1, BLOCK=65536)),
    ),
    # BLOCK elements of a token's heads.
    "rotary": ((_ANY, Launch.of(1, 1, BLOCK=512)),),
    "activation": ((512, Launch.of(4, 1, BLOCK=512)), (_ANY, Launch.of(4, 1, BLOCK=1024))),
    "embedding": ((1024, Launch.of(4, 1, BLOCK=1024)), (_ANY, Launch.of(4, 1, BLOCK=2048))),
    # BLOCK words of up to 8 bytes.
    "pages": ((_ANY, Launch.of(4, 1, BLOCK=1024)),),
    "block_copy": ((_ANY, Launch.of(8, 1, BLOCK=4096)),),
    "checksum": ((_ANY, Launch.of(8, 1, BLOCK=2048)),),
    # BLOCK entries of the vocabulary.
    "noise": ((_ANY, Launch.of(4, 1, BLOCK=1024)),),
    "lse": ((1024, Launch.of(4, 1, BLOCK=1024)), (_ANY, Launch.of(8, 1, BLOCK=4096))),
    "sampling": ((1024, Launch.of(4, 1, BLOCK=1024)), (_ANY, Launch.of(8, 1, BLOCK=2048))),
    "choosing": ((1024, Launch.of(8, 1, BLOCK=1024)), (_ANY, Launch.of(16, 1, BLOCK=4096))),
    "logits": ((_ANY, Launch.of(4, 1, BLOCK=1024)),),
}
"""By kernel: the largest size that a launch is for, and the launch; in ascending order."""


def stream_launch(kernel: str, size: int) -> Launch:
    """The launch of `kernel` for rows of `size` elements.

    Raises:
        ValueError: rows of this size are more than the kernel can hold.
    """
    for largest, launch in TABLE[kernel]:
        if size <= largest:
            return launch
    raise ValueError(f"the {kernel} kernel takes rows of up to {TABLE[kernel][-1][0]} elements, got {size}")

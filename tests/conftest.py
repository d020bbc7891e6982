"""Before any test imports triton: without a GPU its kernels run in its interpreter."""

from __future__ import annotations

import ctypes
import os


def _has_gpu() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()


# Triton reads this when it is first imported, and other tests import it by way of transformers while pytest collects.
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

"""The kernels that the rest of Baton calls: `checked/` looks at the arguments, a backend does the arithmetic.

    ops.py -> checked/<noun>.py -> cpu/library.py (C++, CPU tensors)  |  triton/<noun>.py (CUDA tensors)
                                 | reference/<noun>.py (plain torch, any device)          see backends.py

On CPU with the library, every result is row-invariant to the last bit: what one row gives depends on that row's inputs
(for attention: on its own sequence's keys and values), never on how many rows come along, where the row stands, how a
prompt was cut into chunks, the block size, the block ids or the number of threads. The same holds for Triton's kernels
but attention, which keeps it where it is asked to (`deterministic`). The reference agrees within rounding, and does not
promise invariance; `gumbel_noise`, `draw_tokens`, `checksum` and the copies are equal everywhere.

x dtypes are fp32, bf16 and fp16; arithmetic is fp32, rounded where Hugging Face's modules round. Wrong shapes, dtypes
and strides raise `ValueError`, and nothing has been written then. So do wrong indices where the library checks them;
the reference leaves index checks to torch, and on a GPU indices are not looked at: that would wait for the device.
Functions that return numbers or numpy arrays wait for the device, the others (`..._into` among them) only launch, and
allocate nothing that they are given. Calls release the GIL and may come from several threads.

Shapes: T rows (tokens), S sequences, H hidden, Hq and Hk query and KV heads, D head_dim, R rows of logits,
V vocabulary size.
"""

from __future__ import annotations

from baton.kernels.backends import available_backends, backend, use_backend
from baton.kernels.checked.activation import silu_mul
from baton.kernels.checked.attention import attention_plan, paged_attention
from baton.kernels.checked.checksum import checksum, checksum_into
from baton.kernels.checked.embedding import embedding
from baton.kernels.checked.linear import decoder, linear, pack_linear
from baton.kernels.checked.logits import LogitsTables, count_tokens, logits_lse, process_logits
from baton.kernels.checked.noise import gumbel_noise
from baton.kernels.checked.norm import rms_norm
from baton.kernels.checked.pages import (
    block_copy,
    gather_pages,
    gather_pages_summed,
    gather_pages_summed_into,
    scatter_pages,
    scatter_pages_summed,
    scatter_pages_summed_into,
)
from baton.kernels.checked.rotary import qk_norm_rope_and_cache, rope_and_cache
from baton.kernels.checked.sampling import (
    NOT_A_NUMBER,
    draw_tokens,
    draw_tokens_into,
    draw_workspace,
    pack_sampling,
)
from baton.kernels.checked.threads import (
    attach_cores,
    detach_cores,
    enter_cores,
    helped_items,
    leave_cores,
    num_threads,
    set_num_threads,
)
from baton.kernels.packed_linear import PackedLinear, Quantization

__all__ = [
    "NOT_A_NUMBER",
    "LogitsTables",
    "PackedLinear",
    "Quantization",
    "attach_cores",
    "attention_plan",
    "available_backends",
    "backend",
    "block_copy",
    "checksum",
    "checksum_into",
    "count_tokens",
    "decoder",
    "detach_cores",
    "draw_tokens",
    "draw_tokens_into",
    "draw_workspace",
    "embedding",
    "enter_cores",
    "gather_pages",
    "gather_pages_summed",
    "gather_pages_summed_into",
    "gumbel_noise",
    "helped_items",
    "leave_cores",
    "linear",
    "logits_lse",
    "num_threads",
    "pack_linear",
    "pack_sampling",
    "paged_attention",
    "process_logits",
    "qk_norm_rope_and_cache",
    "rms_norm",
    "rope_and_cache",
    "scatter_pages",
    "scatter_pages_summed",
    "scatter_pages_summed_into",
    "set_num_threads",
    "silu_mul",
    "use_backend",
]

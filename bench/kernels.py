"""Each GPU kernel: time, GB/s or TFLOP/s, and the share of what this very device reaches.

    python bench/kernels.py [--device cuda] [--budget-s 100] [--only paged_attention,rms_norm] [--failed OP,...]

The roof is measured first: a large copy on the device (bytes read plus written) and a large bf16 matrix product. Each
kernel is then held against its reference on the device (`gpu_checks.py`); no speed is shown of one that fails, nor of
those that `--failed` names, whose tests failed before. One row per case, medians of repetitions with a cold L2 cache;
rows go to docs/benchmarks/gpu_kernels.csv (on a GPU, or with --csv). Cases that the time budget leaves out are counted.

On a CPU the same runs with small shapes, to be tested; its figures mean nothing.
"""

from __future__ import annotations

# transformers looks for an installed package of this module's name: this one is older than any that it would use.
__version__ = "0"

if __name__ == "__main__":
    from gpu_kernels import main

    raise SystemExit(main())

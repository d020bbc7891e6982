"""Builds the CPU kernels: the same sources once per instruction set, each optional; metadata is in pyproject.toml.

Without a C++ compiler the build goes on, and `baton.kernels.ops` runs plain torch instead.
"""

from __future__ import annotations

from glob import glob

from setuptools import Extension, setup

# Contraction is off, and fused multiply-adds are spelled out: a row's arithmetic is the same wherever it is inlined.
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-fno-math-errno", "-g0", "-pthread"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-Wno-maybe-uninitialized", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2]
VARIANTS = {
    "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"],
    "avx512": AVX512,
    "avx2": AVX2,
    "generic": [],
}

setup(
    ext_modules=[
        Extension(
            f"baton.kernels._cpu_{variant}",
            sources=sorted(glob("kernels/cpu/*.cpp")),
            depends=sorted(glob("kernels/cpu/*.h")),
            language="c++",
            extra_compile_args=FLAGS + instruction_flags,
            extra_link_args=["-pthread"],
            optional=True,
        )
        for variant, instruction_flags in VARIANTS.items()
    ]
)

"""GPU kernels in Triton: plain functions over tensors, one family a file, each with a torch reference in its test.

`rows`: normalize, rotate and quantize tokens in one pass. `int8_gemm`: the 8-bit product with everything that follows
it. `decode`: packed weights to the 8-bit grid. `small_m`: packed weights times a few rows. `fp8`: E4M3 products.
`library`: the first two as operators for torch.compile. Tensors must lie on the current CUDA device.

Triton is imported by those modules, never by this one: ask `available` first. Without a GPU the kernels run under
Triton's interpreter (TRITON_INTERPRET=1 in the environment before the first import), which is how they are tested;
`benchmarks/kernels_compile.py` compiles them for an H200 on a machine that has none.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

FORMATS = ("int", "ternary", "vq", "nf4", "fp", "mx")  # of weights that kernels decode
OLDEST = (8, 0)  # compute capability: int8 and bf16 tensor cores, asynchronous copies


def interpreted() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported; it is not imported for the answer."""
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device."""
    if not installed():
        return False
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST
    return device.type == "cpu" and interpreted()


def expected() -> bool:
    """Whether a CUDA device would run the kernels, as far as can be said without waking one."""
    return installed() and torch.version.hip is None


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a few in the interpreter, so that persistent loops go round."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3

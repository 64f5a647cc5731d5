"""Where the tests of the Triton kernels run, and the inputs that they share.

With a GPU they run on it. Without one they need Triton's interpreter, which has to be chosen before anything imports
Triton, so `test_triton.py` runs these files in a process of its own and they skip themselves elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from importlib import metadata
from types import ModuleType

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def why_not() -> str:
    """Why the interpreter cannot be used; empty where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    major, minor = metadata.version("triton").split(".")[:2]
    return "" if (int(major), int(minor)) >= (3, 7) else "Triton's interpreter before 3.7 does not run with numpy 2.4"


def kernels(name: str) -> ModuleType:
    """A module of kernels; skips the test file where they cannot run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed", allow_module_level=True)
    if DEVICE.type == "cpu" and why_not():
        pytest.skip(why_not(), allow_module_level=True)
    if DEVICE.type == "cpu" and not INTERPRETED:
        pytest.skip("no GPU: test_triton.py runs this file in Triton's interpreter", allow_module_level=True)
    return importlib.import_module(f"ditcompress.runtime.ops.triton.{name}")


def noise(*shape: int, kind: str = "plain", seed: int = 0) -> Tensor:
    """Normal values; or every 17th column 40 times as large, a first row of zeros, all equal, all negative."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "outliers":
        x[..., ::17] *= 40
    elif kind == "zeros":
        x[0] = 0
    elif kind == "constant":
        x[:] = 1.25
    elif kind == "negative":
        x = -x.abs() - 1
    return x.to(DEVICE)

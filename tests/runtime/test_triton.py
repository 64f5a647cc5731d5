"""The Triton kernels in a process of its own, with Triton's interpreter for a GPU; and that nothing needs Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runtime.triton_support import why_not

HERE = Path(__file__).parent


@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests run on it, in this process")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already in the interpreter")
def test_the_kernels_in_tritons_interpreter() -> None:
    files = sorted(str(path) for path in HERE.glob("test_triton_*.py"))
    assert files
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler runs on Linux")
def test_the_kernels_compile_for_hopper_without_spills(tmp_path: Path) -> None:
    """The interpreter takes what the compiler does not; machine code for sm_90 needs no GPU to be made."""
    command = [sys.executable, str(HERE.parents[1] / "benchmarks" / "kernels_compile.py"), "--quick"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "IGMMA" in done.stdout, done.stdout  # the 8-bit tensor cores of Hopper, not those of Ampere
    assert done.stdout.rstrip().endswith("0 spill"), done.stdout


def test_triton_is_imported_only_by_the_kernels() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"  # as if it were not installed
        "import torch, ditcompress.runtime.linear\n"
        "from ditcompress.runtime.ops import triton as kernels\n"
        "assert isinstance(kernels.available(torch.device('cpu')), bool)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

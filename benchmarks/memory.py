"""Peak memory and time of quantization on random weights of DiT-XL/2's size (675 M parameters) or FLUX.1's (12 B).

    python benchmarks/memory.py [--recipe w4a16-rtn] [--dtype bfloat16] [--offload disk] [--set KEY=VALUE]
    python benchmarks/memory.py --size flux [--layers 5]     as many double blocks, twice as many single ones; 19: all
    python benchmarks/memory.py --recipe w8a8 --offload disk --calibrate samples=20 steps=2 --only-calibrate

The checkpoint is written tensor by tensor into a temporary folder; `ditcompress quantize` runs as a process of its own
and the operating system's account of that process is read afterwards (maximum resident set, wall time). On a GPU the
most memory in use while it ran is told too, as the driver counts it, less what was in use before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ditcompress.checkpoint.writer import ShardWriter
from ditcompress.models import build_meta
from ditcompress.recipe import load_recipe

DIT = {
    "_class_name": "DiTTransformer2DModel", "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72,
    "in_channels": 4, "out_channels": 8, "patch_size": 2, "sample_size": 32, "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False, "activation_fn": "gelu-approximate", "attention_bias": True,
    "num_embeds_ada_norm": 1000,
}  # fmt: skip
FLUX = {
    "_class_name": "FluxTransformer2DModel", "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24,
    "attention_head_dim": 128, "in_channels": 64, "patch_size": 1, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip


def sized(size: str, layers: int | None) -> dict[str, Any]:
    """The config of a model of this size, with so many (double) blocks."""
    if size == "flux":
        return {**FLUX, "num_layers": layers or 19, "num_single_layers": 2 * (layers or 19)}
    return {**DIT, "num_layers": layers or 28}


def write_random(folder: Path, dtype: torch.dtype, config: dict[str, Any]) -> int:
    """A checkpoint of random weights, never more than one shard in memory; its number of parameters."""
    (folder / "config.json").write_text(json.dumps(config))
    writer, total = ShardWriter(folder, max_shard_bytes=1 << 30), 0
    generator = torch.Generator().manual_seed(0)
    for name, tensor in build_meta(config).state_dict().items():
        writer.add(name, torch.empty(tensor.shape, dtype=dtype).normal_(0, 0.02, generator=generator))
        total += tensor.numel()
    writer.finish()
    return total


class GpuPeak:
    """The most bytes in use on the GPU meanwhile; 0 without one."""

    def __init__(self) -> None:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch) if torch.cuda.is_available() else None

    def __enter__(self) -> GpuPeak:
        if self._thread is not None:
            self._free = torch.cuda.mem_get_info()[0]
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, self._free - torch.cuda.mem_get_info()[0])

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()


def run(*arguments: str) -> tuple[dict[str, Any], float, float]:
    """JSON, seconds and peak bytes of one command in a process of its own."""
    started = time.time()
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen([sys.executable, "-m", "ditcompress", *arguments, "--json"], stdout=out)
        _, status, usage = os.wait4(child.pid, 0)
        out.seek(0)
        if status:
            sys.exit("the command failed")
        return json.loads(out.read()), time.time() - started, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="w4a16-rtn")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--size", default="dit-xl", choices=["dit-xl", "flux"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--offload", default="none", choices=["none", "cpu", "disk"])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--calibrate", nargs="*", default=["samples=1", "steps=2", "weighting=none"])
    parser.add_argument("--only-calibrate", action="store_true")
    options = parser.parse_args()
    more = [part for value in options.set for part in ("--set", value)]
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / options.size, Path(scratch) / "out"
        folder.mkdir()
        total = write_random(folder, getattr(torch, options.dtype), sized(options.size, options.layers))
        if load_recipe(options.recipe).calibration is not None:  # few inputs: what follows costs the same with many
            less = [part for value in options.calibrate for part in ("--set", f"calibration.{value}")]
            asked = ["calibrate", str(folder), "-r", options.recipe, "-o", f"{scratch}/stats", *less]
            asked += ["--offload", options.offload]
            told, _, alone = run(*asked, "--dry-run")
            _, seconds, peak = run(*asked)
            predicted = f"{told['memory_bytes'] / 1e9:.2f} GB predicted beside the program's {alone / 1e9:.2f} GB"
            print(f"offload           {options.offload}: {predicted}")
            print(f"calibration       {seconds:.0f} s with {', '.join(options.calibrate)}; peak {peak / 1e9:.2f} GB")
            if options.only_calibrate:
                return
            more += ["--statistics", f"{scratch}/stats"]
        with GpuPeak() as gpu:
            facts, seconds, peak = run("quantize", str(folder), "-r", options.recipe, "-o", str(out), *more)
        print(f"parameters        {total / 1e6:.0f} M ({options.dtype})")
        print(f"recipe            {options.recipe}, {facts['bits_per_quantized_weight']:.3f} bits per quantized weight")
        print(f"bytes             {facts['original_bytes'] / 1e9:.3f} GB -> {facts['bytes'] / 1e9:.3f} GB")
        print(
            f"peak memory       {peak / 1e9:.2f} GB" + (f", on the GPU {gpu.bytes / 1e9:.2f} GB" if gpu.bytes else "")
        )
        print(f"wall time         {seconds:.0f} s")


if __name__ == "__main__":
    main()

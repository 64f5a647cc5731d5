"""inspect: what a checkpoint is made of, and what was done to it; reads headers, never weights, unless
`--sensitivity` asks how much each block matters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..console import print_table, print_text, size
from . import common
from .common import Checkpoint, Debug, Device, Dtype, Json, Offload, Quiet, Seed
from .prune import show_sensitivity


def inspect(
    checkpoint: Checkpoint,
    layers: Annotated[bool, typer.Option("--layers", help="List every linear, not only the roles.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="What runs the packed linears, by shape, on CPU and on CUDA.")
    ] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Run the model: how much each block matters, over timesteps.")
    ] = False,
    method: Annotated[
        str, typer.Option("--method", "-m", help="How blocks are scored; `explain NAME` says more.")
    ] = "shortgpt",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    offload: Offload = "none",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Architecture, blocks, roles, bytes and bits; for a compressed model also what was done to each layer."""
    with common.command(as_json, debug):
        from .. import api

        if sensitivity:
            found = api.sensitivity(
                checkpoint, method=method, seed=seed, device=device, dtype=dtype, offload=offload,
                reporter=common.reporter(quiet, as_json),
            )  # fmt: skip
            common.emit(as_json, found, lambda: show_sensitivity(found))
            return
        facts = api.inspect(checkpoint)
        common.emit(as_json, facts, lambda: _show(facts, layers, kernels))


def _show(facts: dict[str, Any], layers: bool, kernels: bool) -> None:
    head = [
        ["class", facts["class"]],
        ["adapter", facts["adapter"]],
        ["blocks", ", ".join(f"{n} x {name}" for name, n in facts["blocks"].items())],
        ["parameters", f"{facts['parameters']:,}"],
        ["tensor bytes", size(facts["bytes"])],
    ]
    if facts["recipe"]:
        head.append(["compressed with", facts["recipe"]])
    if facts["bits"] is not None:
        head.append(["bits per quantized weight", f"{facts['bits']:.3f}"])
    if facts["experts"]:
        kinds = sorted(set(facts["experts"].values()))
        head.append(["expert layers", f"{len(facts['experts'])}: {'; '.join(kinds)}"])
        head.append(["parameters a token meets", f"{facts['active_parameters']:,}"])
    print_table(facts["name"], ["what", "value"], head)
    rows = [
        [
            r["role"],
            r["tensors"],
            f"{r['parameters']:,}",
            f"{100 * r['share']:.1f} %",
            size(r["bytes"]),
            f"{r['bits']:.2f}",
        ]
        for r in facts["roles"]
    ]
    print_table("by role (all parameters)", ["role", "tensors", "parameters", "share", "bytes", "bits"], rows)
    if kernels:
        _show_kernels(facts["kernels"])
    if layers:
        table = [
            [x["name"], x["role"], "x".join(map(str, x["shape"])), f"{x['bits']:.2f}", x["done"]]
            for x in facts["layers"]
        ]
        print_table("linears", ["name", "role", "out x in", "bits", "what was done"], table)
    elif not kernels:
        print_text("every linear: --layers; what runs them: --kernels")


def _show_kernels(found: list[dict[str, Any]]) -> None:
    from ..runtime.kernels import KERNELS

    rows = [["x".join(map(str, r["shape"])), r["layers"], r["done"], r["cpu"], r["cuda"]] for r in found]
    print_table("kernels of the packed linears", ["out x in", "layers", "what was done", "cpu", "cuda"], rows)
    used = {row[key] for row in found for key in ("cpu", "cuda")}
    for name in (n for n in KERNELS if n in used):
        print_text(f"{name}: {KERNELS[name].SAYS}")
    if not found:
        print_text("no packed linears: everything runs as plain torch")

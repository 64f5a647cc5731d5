"""bench: how fast checkpoints run here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import number, print_table, print_text, size
from . import common
from .common import Debug, Device, Dtype, Json, Quiet, Seed


def bench(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT", help="The plain model first, or compressed ones alone.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Images of a forward pass.")] = 8,
    mode: Annotated[
        list[str] | None, typer.Option(help="eager, graph (CUDA) or compiled; repeatable (default: all).")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="That a model may take at each level.")] = 5.0,
    steps: Annotated[int, typer.Option(min=0, help="Steps of a whole sampling (0: none).")] = 0,
    peers: Annotated[bool, typer.Option(help="Measure torchao and sdnq beside, where installed.")] = True,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time linears, a block, a forward pass and sampling of checkpoints in turns, beside the plain model."""
    with common.command(as_json, debug):
        from .. import api

        facts = api.bench(
            checkpoints, batch=batch, modes=mode or (), seconds=seconds, steps=steps, peers=peers, seed=seed,
            device=device, dtype=dtype, reporter=common.reporter(quiet, as_json),
        )  # fmt: skip
        common.emit(as_json, facts, lambda: show(facts))


def show(facts: dict[str, Any]) -> None:
    """The tables, one a level."""
    place = facts.get("gpu") or f"{facts['device']}, {facts['threads']} threads"
    levels = {"linear": "all linears of the blocks", "block": "one block", "forward": "forward pass",
              "sampling": f"sampling, {facts['steps']} steps"}  # fmt: skip
    for level, title in levels.items():
        rows = [
            [r["arm"], r["mode"], f"{1e3 * r['seconds']:.2f}", f"{1e3 * r['p10']:.2f} to {1e3 * r['p90']:.2f}",
             "–" if r["ratio"] is None else f"{r['ratio']:.2f}x", size(r["bytes"]), number(r["sqnr_db"])]
            for r in facts["rows"] if r["level"] == level
        ]  # fmt: skip
        if rows:
            print_table(
                f"{title}: batch {facts['batch']}, {place}",
                ["model", "mode", "ms", "p10 to p90", "speed", "in memory", "dB"], rows,
            )  # fmt: skip
    print_text("speed: of the best plain row at the same level; dB: output SQNR to the plain model in float32")
    for line in facts["skipped"]:
        print_text(f"left out: {line}")

"""moe: expert layers in place of dense feed-forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import print_table, print_text, size
from . import common
from .common import (
    Checkpoint,
    Conditions,
    Debug,
    Device,
    DryRun,
    Dtype,
    Json,
    Overwrite,
    Quiet,
    Restart,
    Scheduler,
    Seed,
    Set,
)


def moe(
    checkpoint: Checkpoint,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder (default: CKPT-moe).")] = None,
    experts: Annotated[int | None, typer.Option(help="Equal parts of every feed-forward (8).")] = None,
    active: Annotated[int | None, typer.Option(help="Routed parts that run for a token (2).")] = None,
    shared: Annotated[int | None, typer.Option(help="Parts that always run (1).")] = None,
    blocks_active: Annotated[float | None, typer.Option(help="Share of the blocks that run for a sample.")] = None,
    method: Annotated[
        str,
        typer.Option(help="moe-best, moe-local, dense2moe, dense2moe-mob, dit-moe, moh, switch-dit, uoe or random."),
    ] = "moe-best",
    distill_steps: Annotated[int, typer.Option(help="Training steps against the dense model (0: none).")] = 0,
    data: Annotated[Path | None, typer.Option(help="Images or cached latents to train on.")] = None,
    set_: Set = None,
    conditions: Conditions = None,
    scheduler: Scheduler = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    restart: Restart = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn every feed-forward into experts of which a token meets a few; real routing, loaded by plain diffusers.

    Take moe-best (the default) where the files must not grow: every neuron is stored once.
    Take moe-local where images must stay nearest to the original's: feed-forwards take 4 times the storage.

    The parts are equal, so --experts must divide the neurons (not with moe-local). Other methods route attention heads
    (moh, uoe) or mask blocks by timestep (switch-dit), with numbers of their own. Training resumes when the same
    command is given again.
    """
    with common.command(as_json, debug):
        from .. import api

        facts = api.moe(
            checkpoint, out, experts=experts, active=active, shared=shared,
            blocks_active=blocks_active, method=method,
            distill_steps=distill_steps, data=data, overrides=set_ or (), conditions=conditions,
            scheduler=scheduler, seed=seed,
            device=device, dtype=dtype, overwrite=overwrite, restart=restart, dry_run=dry_run,
            reporter=common.reporter(quiet, as_json),
        )  # fmt: skip
        common.emit(as_json, facts, lambda: _plan(facts) if dry_run else _show(facts))


def _plan(facts: dict[str, Any]) -> None:
    rows = [
        [path, x["shared"], x.get("experts") or x["count"], x.get("width", "-"), x["active"]]
        for path, x in facts["layers"].items()
    ]
    header = ["layer", "shared neurons or heads", "experts", "neurons each", "active"]
    print_table("plan (nothing was written)", header, rows)
    flops = facts["block_linear_flops_per_token"]
    print_text(f"a token meets {facts['active_neurons']:.1%} of the neurons in converted feed-forwards and "
               f"{flops['active'] / flops['dense']:.1%} of the operations in the blocks' linears")  # fmt: skip


def _show(facts: dict[str, Any]) -> None:
    rows = [
        [path, " ".join(f"{100 * share:.0f}" for share in x["use"]), f"{x['busiest']:.2f}", f"{x['balance']:.3f}"]
        for path, x in facts["layers"].items()
    ]
    print_table("use of the experts", ["layer", "% of tokens' choices", "busiest / even", "balance loss"], rows)
    parameters, flops = facts["parameters"], facts["block_linear_flops_per_token"]
    rows = [
        ["parameters, dense", f"{parameters['dense']:,}"],
        ["parameters, with routers", f"{parameters['total']:,}"],
        ["parameters a token meets", f"{parameters['active']:,}"],
        ["operations of a token in the blocks' linears, dense", f"{flops['dense']:,}"],
        ["operations of a token there, now", f"{flops['active']:,} ({flops['active'] / flops['dense']:.1%})"],
        [
            f"output SQNR on {facts['states']} states",
            "identical" if facts["sqnr_db"] is None else f"{facts['sqnr_db']:.2f} dB",
        ],
        ["bytes", f"{size(facts['original_bytes'])} -> {size(facts['bytes'])}"],
    ]
    if "distilled" in facts:
        rows += [
            [f"loss, stage {d['stage']}", f"{d['first']:.4g} -> {d['last']:.4g} in {d['steps']} steps"]
            for d in facts["distilled"]["stages"]
        ]
    print_table(facts["method"], ["what", "value"], rows)
    if facts["left_dense"]:
        print_text(f"left dense: {len(facts['left_dense'])} linears that are no module of their own")
    print_text(f"written to {facts['out']}")

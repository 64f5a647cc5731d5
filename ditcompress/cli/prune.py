"""prune: fewer blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import print_table, print_text
from . import chain, common
from .common import (
    Checkpoint,
    Conditions,
    Debug,
    Device,
    DryRun,
    Dtype,
    Json,
    Offload,
    Overwrite,
    Quiet,
    Restart,
    Scheduler,
    Seed,
)

if TYPE_CHECKING:
    from ..api import PruneResult

Method = Annotated[
    str | None, typer.Option("--method", "-m", help="How blocks are chosen (default: prune-best); see `explain NAME`.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="A parameter of the method: key=value (repeatable).")]


def prune(
    checkpoint: Checkpoint,
    ratio: Annotated[float | None, typer.Option(help="Share of all blocks' cost to remove, between 0 and 1.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output folder (default: CKPT-pruned beside it).")
    ] = None,
    by: Annotated[str, typer.Option(help="The cost: params, flops or latency.")] = "params",
    method: Method = None,
    width_ratio: Annotated[
        float | None, typer.Option(help="Share of the neurons and heads of the blocks that are left to remove.")
    ] = None,
    width_units: Annotated[str, typer.Option(help="What is narrowed: both, neurons or heads.")] = "both",
    width_method: Annotated[str, typer.Option(help="How neurons and heads are chosen.")] = "obs-diff",
    set_: Set = None,
    width_set: Annotated[
        list[str] | None, typer.Option(help="A parameter of the width method: key=value (repeatable).")
    ] = None,
    distill_steps: Annotated[
        int | None, typer.Option(help="Then train what is left for so many steps to imitate the original.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="What it is trained on: latents or images (default: none).")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Then quantize by it; or a recipe with stages of its own.")
    ] = None,
    conditions: Conditions = None,
    scheduler: Scheduler = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    offload: Offload = "none",
    restart: Restart = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Remove blocks, neurons and heads. Where only whole blocks go, stock diffusers loads the result as it is.

    Nothing is trained without --distill-steps, save by methods that learn; `distill` has more options and takes the
    result as its student. `ditcompress explain "pruning methods"` lists the methods, "width methods" those of
    --width-method.
    """
    with common.command(as_json, debug):
        from .. import api

        if (recipe, distill_steps, data) != (None, None, None):
            pruning = {"ratio": ratio, "by": by, "method": method, "params": api.method_settings(set_ or ()),
                       "width_ratio": width_ratio, "width_units": width_units, "width_method": width_method,
                       "width_params": api.method_settings(width_set or (), "--width-set")}  # fmt: skip
            common.not_staged(offload)
            chosen = api.staged(recipe, pruning, distill_steps, data)
            chain.run(
                as_json, checkpoint, chosen, out, conditions=conditions, scheduler=scheduler, seed=seed, device=device,
                dtype=dtype, overwrite=overwrite, restart=restart, dry_run=dry_run,
                reporter=common.reporter(quiet, as_json),
            )  # fmt: skip
            return
        result = api.prune(
            checkpoint, ratio, out, by=by, method=method, width_ratio=width_ratio, width_units=width_units,
            width_method=width_method, width_overrides=width_set or (), overrides=set_ or (), conditions=conditions,
            scheduler=scheduler, seed=seed, device=device, dtype=dtype, offload=offload, overwrite=overwrite,
            restart=restart, dry_run=dry_run, reporter=common.reporter(quiet, as_json),
        )  # fmt: skip
        path = None if result.path is None else str(result.path)
        common.emit(as_json, {"path": path, **result.facts}, lambda: _show(result))


def _show(result: PruneResult) -> None:
    facts = result.facts
    rows = [[n, _value(s), "removed" if n in facts["order"] else "kept"] for n, s in facts["scores"].items()]
    rows += [[block, "", f"kept: {why}"] for block, why in facts["fixed"].items()]
    if facts["ratio"] is not None:
        print_table(f"blocks by {facts['method']} (higher = keep)", ["block", "score", ""], rows)
        share = f"{100 * facts['saved']:.1f} % of the blocks' {facts['by']}"
        told = "" if facts["output_sqnr_db"] is None else f", SQNR of the prediction {facts['output_sqnr_db']:.2f} dB"
        print_text(f"{len(facts['removed'])} blocks removed, {share}{told}")
    if facts["width"]:
        alike: dict[tuple[str, str], int] = {}
        for name, row in facts["width"]["axes"].items():
            key = (name.rpartition(".")[2], f"{row['kept']} of {row['of']}")
            alike[key] = alike.get(key, 0) + 1
        width = facts["width"]
        title = f"narrowed by {width['width_method']}"
        if width["output_sqnr_db"] is not None:
            title += f", SQNR of the prediction {width['output_sqnr_db']:.2f} dB"
        if alike:
            print_table(title, ["units", "kept", "axes"], [[*key, count] for key, count in sorted(alike.items())])
        if linear := width.get("linear"):
            print_table(title, ["feed-forwards that became one linear"], [[path] for path in linear])
        if text := width.get("text"):
            print_table(title, ["text side kept", "linear up to"], text)
    loads = "stock diffusers loads it" if facts["stock"] else "loads after `import ditcompress`"
    print_text("nothing was written" if result.path is None else f"written to {result.path}: {loads}")


def _value(score: float | None) -> str:
    return "" if score is None else f"{score:.4g}"


def _short(block: str) -> str:
    """transformer_blocks.3 as 3, single_transformer_blocks.3 as single 3: a row has to fit a terminal."""
    owner, _, number = block.rpartition(".")
    return f"{owner.removesuffix('blocks').removesuffix('_').removesuffix('transformer').strip('_')} {number}".strip()


def show_sensitivity(facts: dict[str, Any]) -> None:
    """Importance of each block, and over timesteps in per cent of the most important block there."""
    table = [row["by_timestep"] for row in facts["blocks"]]
    most = [max(column) or 1.0 for column in zip(*table, strict=True)]
    rows: list[list[object]] = []
    for row in facts["blocks"]:
        shares = [f"{100 * v / m:.0f}" for v, m in zip(row["by_timestep"], most, strict=False)]
        rows.append([_short(row["block"]), _value(row["score"]), *shares])
    columns = ["block", "mean", *(f"{time:.0f}" for time in facts["timesteps"])]
    note = ", at each timestep in % of the largest" if facts["timesteps"] else ""
    print_table(f"sensitivity by {facts['method']} (higher = keep){note}", columns, rows)
    for why in sorted(set(facts["fixed"].values())):
        print_text(f"cannot go: {', '.join(b for b, w in facts['fixed'].items() if w == why)} ({why})")

"""calibrate, quantize, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import print_table, print_text, size
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
    Set,
)

if TYPE_CHECKING:
    from ..api import QuantizeResult

Recipe = Annotated[str, typer.Option("--recipe", "-r", help="Name of a shipped recipe, or a YAML file.")]


def calibrate(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the statistics.")],
    recipe: Recipe = "w4a8",
    set_: Set = None,
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
    """Gather the statistics that a recipe needs, along the model's own sampling trajectories.

    They serve every later `quantize --statistics` on this checkpoint. An interrupted run goes on where it stopped.
    """
    with common.command(as_json, debug):
        from .. import api

        if dry_run:
            value: dict[str, Any] = api.calibration_plan(checkpoint, recipe, set_ or (), dtype=dtype, offload=offload)
            common.emit(as_json, value, lambda: print_table("would calibrate", ["what", "value"], [*value.items()]))
            return
        found = api.calibrate(
            checkpoint, out, recipe=recipe, overrides=set_ or (), conditions=conditions, scheduler=scheduler, seed=seed,
            device=device, dtype=dtype, offload=offload, overwrite=overwrite, restart=restart,
            reporter=common.reporter(quiet, as_json),
        )  # fmt: skip
        facts = {
            "out": str(out),
            "inputs": len(found.inputs),
            "batches": len(found.meta["timesteps"]),
            "digest": found.digest,
        }
        common.emit(as_json, facts, lambda: print_table("calibrated", ["what", "value"], [*facts.items()]))


def quantize(
    checkpoint: Checkpoint,
    recipe: Recipe = "w4a8",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output folder (default: CKPT-RECIPE beside it).")
    ] = None,
    statistics: Annotated[Path | None, typer.Option(help="Folder made by `calibrate`.")] = None,
    target_bits: Annotated[float | None, typer.Option(help="Mean stored bits of a quantized weight.")] = None,
    target_size: Annotated[str | None, typer.Option(help="Size of the result, for example 6GB.")] = None,
    target_db: Annotated[float | None, typer.Option(help="Least output SQNR in dB.")] = None,
    set_: Set = None,
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
    """Quantize a checkpoint by a recipe; calibrates first where the recipe needs it and no statistics are given."""
    with common.command(as_json, debug):
        from .. import api
        from ..recipe import load_recipe

        chosen = load_recipe(recipe, set_ or ())
        if chosen.staged:
            common.not_staged(offload)
            chain.run(
                as_json, checkpoint, chosen, out, conditions=conditions, scheduler=scheduler, seed=seed, device=device,
                dtype=dtype, overwrite=overwrite, restart=restart, dry_run=dry_run,
                reporter=common.reporter(quiet, as_json),
            )  # fmt: skip
            return
        result = api.quantize(
            checkpoint, chosen, out, statistics=statistics, conditions=conditions,
            scheduler=scheduler, seed=seed, device=device, dtype=dtype, offload=offload, overwrite=overwrite,
            restart=restart, dry_run=dry_run, reporter=common.reporter(quiet, as_json), target_bits=target_bits,
            target_size=target_size, target_db=target_db,
        )  # fmt: skip
        if dry_run:
            common.emit(
                as_json,
                {"plan": result.plan.to_json(), "memory_bytes": result.memory_bytes},
                lambda: _show_plan(result),
            )
        else:
            common.emit(as_json, api.quantize_facts(result), lambda: _show_result(result, recipe))


def _show_plan(result: QuantizeResult) -> None:
    rows: dict[tuple[str, ...], int] = {}
    for layer in result.plan.layers:
        params = ", ".join(f"{k} {v}" for k, v in layer.weight.params.items() if k in ("bits", "group", "layout"))
        inputs = str(layer.activation) + (f", hadamard {layer.rotate}" if layer.rotate else "")
        steps = " > ".join(step.name for step in layer.steps)
        key = (layer.role, f"{layer.weight.format}: {params}", inputs, layer.smooth, str(layer.rank), steps)
        rows[key] = rows.get(key, 0) + 1
    table = [[*key, count] for key, count in rows.items()]
    print_text(f"predicted peak memory beside the program's own: {size(result.memory_bytes)}")
    print_table("plan (nothing was written)", ["role", "weight", "input", "smooth", "rank", "steps", "linears"], table)


def _show_result(result: QuantizeResult, recipe: str) -> None:
    by_role: dict[str, list[float]] = {}
    for record in result.records:
        entry = by_role.setdefault(record.role, [0, 0, 0])
        entry[0] += 1
        entry[1] += record.shape[0] * record.shape[1]
        entry[2] += record.stored_bytes
    rows = [[role, int(n), f"{int(w):,}", f"{8 * b / w:.2f}", size(b)] for role, (n, w, b) in by_role.items()]
    rows.append(["all quantized", len(result.records), "", f"{result.bits:.2f}", ""])
    print_table(f"quantized with {recipe}", ["role", "linears", "weights", "bits", "stored"], rows)
    if result.plan.curve:
        points = [[f"{p.bits:.2f}", f"{p.predicted_db:.1f}", "this one" if p.chosen else ""] for p in result.plan.curve]
        print_table("trade-off", ["bits", "predicted dB", ""], points)
    if result.measured_db is not None:
        print_text(f"output SQNR on held-out inputs: {result.measured_db:.2f} dB")
    ratio = result.original_bytes / max(result.bytes, 1)
    print_text(
        f"{size(result.original_bytes)} -> {size(result.bytes)} ({ratio:.2f}x smaller), written to {result.path}"
    )
    if result.records and result.records[0].format.startswith("bitsandbytes"):
        print_text("load it: plain diffusers from_pretrained, on a GPU")
    else:
        print_text("load it: import ditcompress; then plain diffusers from_pretrained")


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed model or pipeline folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder (diffusers) or file (safetensors).")],
    format_: Annotated[
        str, typer.Option("--format", "-f", help="safetensors: one packed file; diffusers: plain dequantized folder.")
    ] = "diffusers",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a compressed model in another format, and verify the result by reading it back."""
    with common.command(as_json, debug):
        from .. import api

        facts = api.export(
            folder,
            out,
            format_,
            dtype=dtype,
            overwrite=overwrite,
            dry_run=dry_run,
            reporter=common.reporter(quiet, as_json),
        )
        common.emit(as_json, facts, lambda: print_table("exported", ["what", "value"], [*facts.items()]))

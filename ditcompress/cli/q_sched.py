"""q-sched: scheduler coefficients for few-step sampling of a compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import print_table, print_text
from . import common
from .common import Conditions, Debug, Device, DryRun, Dtype, Json, Overwrite, Quiet, Seed


def q_sched(
    original: Annotated[Path, typer.Argument(help="The model before compression.")],
    compressed: Annotated[Path, typer.Argument(help="Its compressed folder, of any recipe.")],
    steps: Annotated[int, typer.Option(help="Sampling steps that the coefficients are for.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the compressed model with its coefficients.")],
    method: Annotated[
        str, typer.Option(help="trajectory or gain (closed forms), or grid (the paper's two ramps).")
    ] = "trajectory",
    images: Annotated[int, typer.Option(help="Images that are searched on.")] = 32,
    held_out: Annotated[int, typer.Option(help="Other images that the gain is judged on.")] = 128,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale (default: the family's).")] = None,
    low: Annotated[float, typer.Option(help="Least start value of the grid.")] = 0.8,
    high: Annotated[float, typer.Option(help="Greatest start value of the grid.")] = 1.2,
    compatibility: Annotated[
        str, typer.Option(help="module:function of (images, prompts): text-image compatibility TC of the score.")
    ] = "",
    quality: Annotated[str, typer.Option(help="module:function: image quality IQ; the score is TC + 2 IQ.")] = "",
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    conditions: Conditions = None,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=0, help="Images at a time (0: by their size).")] = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Scheduler coefficients for few-step sampling of a compressed model, with the original as control.

    They are kept only where their gain on held-out images excludes 0. The saved scheduler applies them after
    `import ditcompress`.
    """
    with common.command(as_json, debug):
        from .. import api

        facts = api.q_sched(
            original, compressed, out, steps=steps, method=method, images=images, held_out=held_out, guidance=guidance,
            low=low, high=high, compatibility=compatibility, quality=quality, prompts=prompts, conditions=conditions,
            seed=seed, batch=batch, device=device, dtype=dtype, overwrite=overwrite, dry_run=dry_run,
            reporter=common.reporter(quiet, as_json),
        )  # fmt: skip
        if dry_run:
            common.emit(as_json, facts, lambda: print_table("would search", ["what", "value"], [*facts.items()]))
        else:
            common.emit(as_json, facts, lambda: _show(facts))


def _show(facts: dict[str, Any]) -> None:
    rows = []
    for who in ("compressed", "control"):
        found = facts[who]
        for i, (gain, carried) in enumerate(zip(found["model"], found["sample"], strict=True)):
            rows.append([who, i, f"{facts['timesteps'][i]:.4g}", f"{gain:.4f}", f"{carried:.4f}"])
    print_table(f"{facts['method']} coefficients, searched", ["model", "step", "t", "output", "sample"], rows)
    rows = []
    for who in ("compressed", "control"):
        for name, row in facts[who]["held_out"].items():
            interval = f"{row['low']:+.3f} .. {row['high']:+.3f}"
            values = f"{row['all_ones']:.3f}", f"{row['searched']:.3f}", f"{row['difference']:+.3f}"
            rows.append([who, name, *values, interval])
    header = ["model", "metric", "all ones", "searched", "difference", "95 % interval"]
    title = f"{row['n']} held-out images (control: the original in place of the compressed model)"
    print_table(title, header, rows)
    print_text(f"score: {facts['score']}")
    print_text(f"{facts['reason']}; written to {facts['out']}")

"""compare and sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import number, print_table, print_text, size
from . import common
from .common import Checkpoint, Conditions, Debug, Device, DryRun, Dtype, Json, Overwrite, Quiet, Scheduler, Seed


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Report folders of `evaluate --out`.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for compare.html and compare.json.")] = None,
    x: Annotated[str, typer.Option(help="size, bits or latency.")] = "size",
    y: Annotated[str, typer.Option(help="Metric of the plot, as named in report.json.")] = "psnr",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """One table and a Pareto plot of several compressed versions of one model."""
    with common.command(as_json, debug):
        from .. import api

        facts = api.compare(runs, None if dry_run else out, x=x, y=y, overwrite=overwrite)
        common.emit(as_json, facts, lambda: _show(facts, None if dry_run else out))


def _show(facts: dict[str, Any], out: Path | None) -> None:
    names = ["run", "verdict", "on disk", "bits", "forward", *(c["label"] for c in facts["columns"])]
    rows = []
    for r in facts["rows"]:
        mark = " *" if r["name"] in facts["front"] else ""
        cells = [_cell(r["metrics"][c["name"]]) for c in facts["columns"]]
        rows.append([r["name"] + mark, r["verdict"], size(r["disk_bytes"]), number(r["bits"]),
                     f"{number(r['faster'])}x", *cells])  # fmt: skip
    print_table(f"versions of {facts['original']['name']}", names, rows)
    print_text(f"* no other run is both smaller ({facts['x']}) and better ({facts['y_label']})")
    if out is not None:
        print_text(f"plot: {out / 'compare.html'}")


def _cell(m: dict[str, Any] | None) -> str:
    return "–" if m is None else "identical" if m["identical"] else number(m["value"])


def sample(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the images.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images.")] = 64,
    layout: Annotated[str, typer.Option(help="images, adm, geneval or vbench; see `explain layouts`.")] = "images",
    per_prompt: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 25,
    guidance: common.Guidance = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    conditions: Conditions = None,
    scheduler: Scheduler = None,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=0, help="Images at a time (0: by their size).")] = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    restart: common.Restart = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Images of a checkpoint, compressed or not: resumable, and the same for a seed whatever the batch size."""
    with common.command(as_json, debug):
        from .. import api

        options: dict[str, Any] = {
            "count": count, "layout": layout, "per_prompt": per_prompt, "steps": steps, "guidance": guidance,
            "seed": seed, "batch": batch, "device": device, "dtype": dtype,
        }  # fmt: skip
        if dry_run:
            common.emit(as_json, options, lambda: print_table("would sample", ["what", "value"], [*options.items()]))
            return
        facts = api.sample(
            checkpoint, out, prompts=prompts, conditions=conditions, scheduler=scheduler, overwrite=overwrite,
            restart=restart, reporter=common.reporter(quiet, as_json), **options,
        )  # fmt: skip
        common.emit(as_json, facts, lambda: print_text(f"{facts['images']} images ({layout}): {out}"))

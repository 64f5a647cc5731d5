"""evaluate, report, demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import print_table, print_text
from . import common
from .common import Conditions, Debug, Device, DryRun, Dtype, Json, Overwrite, Quiet, Scheduler, Seed

EXIT = {"PASS": 0, "FAIL": 8, "INCONCLUSIVE": 9}


def evaluate(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The uncompressed checkpoint.")],
    compressed: Annotated[Path, typer.Argument(metavar="COMPRESSED", help="What compression made of it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.html and report.json.")] = None,
    pairs: Annotated[int, typer.Option(min=2, help="Same-noise pairs of images.")] = 320,
    inputs: Annotated[int, typer.Option(min=8, help="Held-out inputs of the denoiser probe.")] = 256,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps.")] = 25,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale (default: the family's).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="64 pairs.")] = False,
    full: Annotated[bool, typer.Option("--full", help="1000 pairs.")] = False,
    profile: Annotated[str, typer.Option(help="auto, fidelity or fidelity-latent.")] = "auto",
    margin: Annotated[list[str] | None, typer.Option(help="Replace a margin: name=value (repeatable).")] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Exit 8 on FAIL, 9 on INCONCLUSIVE.")] = False,
    classifier: Annotated[str, typer.Option(help="auto, digits, none or module:function.")] = "auto",
    conditions: Conditions = None,
    scheduler: Scheduler = None,
    seed: Seed = 1_000_003,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    device: Device = "auto",
    dtype: Dtype = "float32",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare a compressed model with its original: same noise for both, intervals, a three-valued verdict."""
    with common.command(as_json, debug):
        from .. import api

        options: dict[str, Any] = {
            "pairs": 64 if quick else 1000 if full else pairs, "inputs": inputs, "steps": steps, "guidance": guidance,
            "profile": profile, "margins": api.parse_margins(margin or []), "classifier": classifier, "seed": seed,
            "batch": batch, "dtype": dtype, "device": device,
        }  # fmt: skip
        if dry_run:
            common.emit(as_json, options, lambda: print_table("would evaluate", ["what", "value"], [*options.items()]))
            return
        result = api.evaluate(
            original, compressed, out, conditions=conditions, scheduler=scheduler, overwrite=overwrite,
            command=command_line(), reporter=common.reporter(quiet, as_json), **options,
        )  # fmt: skip
        common.emit(as_json, result, lambda: show(result, out))
        if gate:
            raise typer.Exit(EXIT[result["verdict"]])


def command_line() -> str:
    """The command as it was typed, by the last parts of its paths."""
    return " ".join(["ditcompress", *(Path(a).name if "/" in a else a for a in sys.argv[1:])])


def _number(value: float | None, identical: bool = False) -> str:
    return "identical" if identical else "-" if value is None else f"{value:.2f}"


def show(result: dict[str, Any], out: Path | None) -> None:
    """The verdict, the sizes and the main table."""
    sizes = result["sizes"]
    print_text("")
    print_text(f"{result['verdict']} ({result['profile']})")
    bits = sizes["bits_per_quantized_weight"]
    stored = "" if bits is None else f", {bits:.2f} stored bits per quantized weight"
    print_text(
        f"{common.size(sizes['original']['disk_bytes'])} -> {common.size(sizes['compressed']['disk_bytes'])} on disk "
        f"({sizes['ratio']:.2f}x){stored}"
    )
    rows = []
    for m in result["measurements"]:
        interval = "" if m["low"] is None or m["identical"] else f"{m['low']:.2f} .. {m['high']:.2f}"
        rows.append([m["label"], _number(m["value"], m["identical"]), m["unit"], interval, m["n"], m["gate"]])
    print_table("compressed against original", ["metric", "value", "unit", "95 % interval", "n", "gate"], rows)
    for check in result["integrity"]:
        mark = {True: "ok", False: "FAILED", None: "not checked"}[check["passed"]]
        print_text(f"{check['name']}: {mark} ({check['detail']})")
    notes = [f"{m['label']}: {m['note']}" for m in result["measurements"] if m["gate"] == "INCONCLUSIVE"]
    if result["speed"].get("warning"):
        notes.append(result["speed"]["warning"])
    for note in notes:
        print_text(f"note: {note}")
    if out is not None:
        print_text(f"report: {out / 'report.html'}")


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with report.json.")],
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    dry_run: DryRun = False,
    overwrite: Overwrite = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Render report.html again from report.json and its images, and print the tables."""
    with common.command(as_json, debug):
        from .. import api

        result = api.report(folder, write=not dry_run)
        common.emit(as_json, result, lambda: show(result, folder))


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the demo.")] = Path("ditcompress-demo"),
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Recipe to try.")] = "w4a8",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    dry_run: DryRun = False,
    overwrite: Overwrite = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The main job on the embedded model: calibrate, quantize, evaluate, report. Takes a minute or two."""
    with common.command(as_json, debug):
        from .. import api

        if dry_run:
            steps = {"out": str(out), "recipe": recipe, "model": "the embedded digits model"}
            common.emit(as_json, steps, lambda: print_table("would run", ["what", "value"], [*steps.items()]))
            return
        result = api.demo(
            out, recipe=recipe, seed=seed, device=device, dtype=dtype, reporter=common.reporter(quiet, as_json)
        )
        common.emit(as_json, result, lambda: show(result, out / "report"))

"""evaluate, report, demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import number, print_error, print_table, print_text, size
from ..errors import CODES
from . import common
from .common import Conditions, Debug, Device, DryRun, Dtype, Json, Overwrite, Quiet, Restart, Scheduler, Seed

EXIT = {"PASS": 0, "FAIL": 8, "INCONCLUSIVE": 9}


def evaluate(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The uncompressed checkpoint.")],
    compressed: Annotated[Path, typer.Argument(metavar="COMPRESSED", help="What compression made of it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.html and report.json.")] = None,
    pairs: Annotated[int | None, typer.Option(min=2, help="Same-noise pairs of images (default: 320).")] = None,
    images: Annotated[int | None, typer.Option(min=2, help="Images for T4 (default: 1000, 10000 on a GPU).")] = None,
    inputs: Annotated[int, typer.Option(min=8, help="Held-out inputs of the denoiser probe.")] = 256,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps.")] = 25,
    guidance: common.Guidance = None,
    quick: Annotated[bool, typer.Option("--quick", help="64 pairs by default, no distribution metrics.")] = False,
    full: Annotated[bool, typer.Option("--full", help="1000 pairs by default, fresh-noise floor for T4.")] = False,
    profile: Annotated[str, typer.Option(help="auto (the recipe's), fidelity, fidelity-latent or quality.")] = "auto",
    margin: Annotated[list[str] | None, typer.Option(help="Replace a margin: name=value (repeatable).")] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Exit 8 on FAIL, 9 on INCONCLUSIVE.")] = False,
    reference: Annotated[Path | None, typer.Option(help="Real images: folder, .npz or .safetensors.")] = None,
    extractor: Annotated[str, typer.Option(help="auto, none, or NAME[:ARG]; see `explain extractors`.")] = "auto",
    extractor_floor: Annotated[
        float, typer.Option(callback=common.finite, help="Least held-out accuracy of an extractor.")
    ] = 0.9,
    classifier: Annotated[str, typer.Option(help="auto, none or module:function.")] = "auto",
    external: Annotated[list[str] | None, typer.Option(help="External metric to run, or all (repeatable).")] = None,
    weights_dir: Annotated[Path | None, typer.Option(help="Local weights, pinned in its SHA256SUMS.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line.")] = None,
    cost_batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size to time (repeatable).")] = None,
    conditions: Conditions = None,
    scheduler: Scheduler = None,
    seed: Seed = 1_000_003,
    batch: Annotated[int, typer.Option(min=0, help="Images at a time (0: by their size).")] = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    restart: Restart = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare a compressed model with its original: same noise for both, intervals, a three-valued verdict."""
    with common.command(as_json, debug):
        from .. import api

        options: dict[str, Any] = {
            "pairs": pairs or (64 if quick else 1000 if full else 320), "images": images, "fresh": full,
            "inputs": inputs, "steps": steps, "guidance": guidance, "profile": profile,
            "margins": api.parse_margins(margin or []),
            "extractor": "none" if quick and extractor == "auto" else extractor, "extractor_floor": extractor_floor,
            "classifier": classifier, "external": tuple(external or ()), "seed": seed, "batch": batch, "dtype": dtype,
            "device": device, "cost_batches": tuple(cost_batch or (1, 8)),
        }  # fmt: skip
        if dry_run:
            common.emit(as_json, options, lambda: print_table("would evaluate", ["what", "value"], [*options.items()]))
            return
        result = api.evaluate(
            original, compressed, out, conditions=conditions, scheduler=scheduler, prompts=prompts,
            reference=reference, weights=weights_dir, overwrite=overwrite, restart=restart, command=command_line(),
            reporter=common.reporter(quiet, as_json), **options,
        )  # fmt: skip
        if result:  # one of several processes has it
            common.emit(as_json, result, lambda: show(result, out))
            leave(result, gate)


def leave(result: dict[str, Any], gate: bool) -> None:
    """The exit code: the gate's, else that of the first thing that was asked for and could not be measured."""
    failed = [s for s in result["skipped"] if s["code"]]
    for s in failed:
        print_error(f"error[{s['code']} {CODES[s['code']]}]: {s['name']}: {s['reason']}.")
    if gate and EXIT[result["verdict"]]:
        raise typer.Exit(EXIT[result["verdict"]])
    if failed:
        raise typer.Exit(int(failed[0]["code"][1]))


def command_line() -> str:
    """The command as it was typed, by the last parts of its paths."""
    return " ".join(["ditcompress", *(Path(a).name if "/" in a else a for a in sys.argv[1:])])


# what a terminal shows, by short names; the report has every row
SHOWN = {
    "sqnr_weighted": "SQNR, weighted", "gain_error": "gain, off by", "sqnr_worst": "SQNR, worst t",
    "psnr": "PSNR, median", "psnr_p05": "PSNR, 5 %", "psnr_worst": "PSNR, worst",
    "ssim": "SSIM", "pairs_under_15": "pairs < 15 dB", "fd_original": "FD to original",
    "fd_reference": "FD to reference Δ", "mmd_original": "MMD to original", "recall": "recall Δ",
    "coverage": "coverage Δ", "class_accuracy": "class accuracy Δ", "label_flips": "class changed",
}  # fmt: skip


def show(result: dict[str, Any], out: Path | None) -> None:
    """The verdict, the sizes and the main table, in about thirty lines."""
    sizes, speed = result["sizes"], result["speed"]
    bits = sizes["bits_per_quantized_weight"]
    stored = "" if bits is None else f", {bits:.2f} stored bits per quantized weight"
    faster = f"{speed['ratio']:.2f}x as fast" if speed["ratio"] >= 1 else f"{1 / speed['ratio']:.1f}x slower"
    print_text(f"\n{result['verdict']} ({result['profile']})")
    print_text(
        f"{size(sizes['original']['disk_bytes'])} -> {size(sizes['compressed']['disk_bytes'])} on disk "
        f"({sizes['ratio']:.2f}x){stored}; one forward {faster} on {speed['device']}"
    )
    rows = []
    for m in result["measurements"]:
        if m["name"] in SHOWN or m["gate"] or m["tier"] == "T5":
            interval = "" if m["low"] is None or m["identical"] else f"{number(m['low'])} .. {number(m['high'])}"
            value = "identical" if m["identical"] else number(m["value"])
            floor = "" if m["floor"] is None else number(m["floor"])
            rows.append([SHOWN.get(m["name"], m["label"]), value, m["unit"], interval, m["n"], floor, m["gate"]])
    columns = ["metric", "value", "unit", "95 % interval", "n", "floor", "gate"]
    print_table("compressed against original", columns, rows)
    bad = [c for c in result["integrity"] if c["passed"] is not True]
    print_text(f"integrity: {len(result['integrity']) - len(bad)} of {len(result['integrity'])} checks ok")
    for check in bad:
        print_text(f"{check['name']}: {'FAILED' if check['passed'] is False else 'not checked'} ({check['detail']})")
    notes = [f"{m['label']}: {m['note']}" for m in result["measurements"] if m["gate"] == "INCONCLUSIVE"]
    notes += [r for r in result["remarks"] if not r.startswith("conditions: class labels")]
    notes += [speed["warning"]] if speed.get("warning") else []
    notes += [f"not evaluated: {s['name']}: {s['reason']}" for s in result["skipped"] if not s["code"]]
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

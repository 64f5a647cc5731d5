"""evaluate, report and demo."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.reader import open_checkpoint
from ..checkpoint.writer import output_folder, remove_work, work_folder
from ..console import Reporter, Silent
from ..errors import DitcompressError
from ..evaluation import compare
from ..evaluation.digits import digits_folder
from ..evaluation.quality import Sources
from ..evaluation.settings import EvaluateSettings
from ..ranks import Ranks, alone, joined
from ..recipe import parse_recipe
from ._images import listing
from .calibration import cache_folder, given_files, pick_device, pick_dtype, read_prompts
from .compress import quantize


def parse_margins(texts: Sequence[str]) -> dict[str, float]:
    """Margins from name=value texts; E203 for anything else."""
    margins = {}
    for text in texts:
        name, found, value = text.partition("=")
        try:
            margins[name] = float(value)
        except ValueError:
            found = ""
        if not found or not math.isfinite(margins[name]):
            raise DitcompressError("E203", f"--margin {text}", "is not name=value", "for example --margin psnr=30")
    return margins


def evaluate(
    original: str | Path,
    compressed: str | Path,
    out: str | Path | None = None,
    *,
    conditions: str | Path | None = None,
    scheduler: str | Path | None = None,
    prompts: str | Path | None = None,
    reference: str | Path | None = None,
    weights: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    command: str = "",
    device: str = "auto",
    dtype: str = "float32",
    reporter: Reporter | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compare two checkpoints; with `out` also write report.html and report.json there. Returns the report's JSON.

    `settings` are fields of EvaluateSettings; `reference` are real images (folder, .npz, .safetensors), `weights` a
    folder of local weights for extractors and external metrics. Profile and margins that are not given are those of
    the recipe. With `out`, an interrupted run keeps its finished images (`restart` forgets them). Under `accelerate
    launch` every process makes its part of the images; the first one measures, writes and returns the report, the
    others return {}.
    """
    pick_dtype(dtype)
    with joined(pick_device(device)) as (ranks, place), ranks.together():
        asked = EvaluateSettings(device=str(place), dtype=dtype, **_declared(Path(compressed), settings))
        options: dict[str, Any] = {
            "scheduler": Path(scheduler) if scheduler else None,
            "conditions": Path(conditions) if conditions else None,
            "prompts": read_prompts(prompts),
            "sources": Sources(
                Path(reference) if reference else None, Path(weights) if weights else None, cache_folder("extractors")
            ),
            "command": command,
            "reporter": reporter if reporter and ranks.first else Silent(),
            "ranks": ranks,
        }
        return _evaluate(Path(original), Path(compressed), out, asked, options, overwrite, restart, ranks)


def _evaluate(
    first: Path, second: Path, out: str | Path | None, asked: EvaluateSettings, options: dict[str, Any],
    overwrite: bool, restart: bool, ranks: Ranks,
) -> dict[str, Any]:  # fmt: skip
    """The report's JSON, written to `out` where there is one; {} in a process that only helps."""
    from ..report.html import write_report  # matplotlib: not for other commands

    if out is None or not ranks.first:
        ranks.agree(None)
        found = compare.evaluate(first, second, asked, **options)
        return {} if found is None else found.result.to_json()
    with output_folder(Path(out), overwrite=overwrite, inputs=[first, second]) as folder:
        work = work_folder(Path(out), _marks(first, second, asked, options), restart)
        ranks.agree(None)
        found = compare.evaluate(first, second, asked, work=work, **options)
        assert found is not None
        result = found.result.to_json()
        write_report(folder, result, found.images)
    remove_work(work)
    return result


def _declared(compressed: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` with the profile and margins that the recipe declared, where none were given. What was given wins."""
    if settings.get("profile", "auto") != "auto":
        return settings
    try:
        text = (open_checkpoint(compressed).folder / "recipe.json").read_text(encoding="utf-8")
        declared = parse_recipe(json.loads(text), "recipe.json").evaluation
    except (OSError, ValueError, DitcompressError):
        return settings  # not ours, or from another version: the usual margins hold
    margins = {**declared.margins, **settings.get("margins", {})}
    return {**settings, "profile": declared.profile, "margins": margins}


def _marks(original: Path, compressed: Path, settings: EvaluateSettings, options: dict[str, Any]) -> dict[str, Any]:
    """What the images of an evaluation depend on."""
    source = open_checkpoint(original)
    return {
        "original": source.fingerprint,
        "compressed": open_checkpoint(compressed).fingerprint,
        "settings": settings.images_key(),
        "prompts": hashlib.sha256(json.dumps(options["prompts"]).encode()).hexdigest(),
        "vae": listing(source.pipeline / "vae") if source.pipeline else "",
        "torch": torch.__version__,
        **given_files(options["conditions"], options["scheduler"], source),
    }


def report(folder: str | Path, *, write: bool = True) -> dict[str, Any]:
    """The JSON of a report folder; report.html is rendered again."""
    from ..report.html import read_report, render

    result, images = read_report(Path(folder))
    if write:
        page = Path(folder) / "report.html"
        page.write_text(render(result, images), encoding="utf-8")
    return result


def demo(
    out: str | Path = "ditcompress-demo",
    *,
    recipe: str = "w4a8",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """The main job on the embedded model: `out`/digits-RECIPE is the compressed pipeline, `out`/report the report."""
    alone("demo")
    original, out = digits_folder(), Path(out)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "overwrite": True, "reporter": reporter}
    made = quantize(original, recipe, out / f"digits-{Path(recipe).stem}", seed=seed, **options)
    assert made.path is not None
    settings: dict[str, Any] = {"pairs": 320, "images": 512, "guidance": 1.5}
    return evaluate(original, made.path, out / "report", command="ditcompress demo", **settings, **options)

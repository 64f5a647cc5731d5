"""What the command line and Python users call: each function glues the layers below together, in order.

Paths are diffusers model folders, pipeline folders, single safetensors files or original DiT .pt files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import engine
from ..calibration.statistics import Statistics
from ..calibration.store import load_statistics
from ..checkpoint.reader import Checkpoint, check_finite
from ..checkpoint.writer import (
    ShardWriter,
    copy_rest,
    emptied,
    kept_work,
    output_folder,
    remove_work,
    work_folder,
    work_of,
)
from ..console import Reporter, Silent, speaks
from ..errors import DitcompressError
from ..journal import VERSION as JOURNAL
from ..loading import open_model
from ..models import adapter_for, build_meta
from ..models.base import Layout
from ..plan import Plan
from ..quantization import RecipeSteps, choose, measures, needs
from ..quantization._trained import Tuned
from ..ranks import Ranks, joined
from ..recipe import Calibration, Recipe, canonical, load_recipe
from ..report.card import quantized_card
from ..sharing import copies_of, tied
from . import _bitsandbytes, _memory
from ._notes import fallbacks, unfolded
from ._quantized import QuantizeResult as QuantizeResult
from ._quantized import checked_plan, quantized_module, with_structure
from ._training import Overlay, driven, learns, tune
from .calibration import cached_statistics, given_files, pick_device, settings_of
from .q_sched import search_scheduler
from .target import measured_db, retarget, with_target

NOTES = ("prune.json", "distill.json")
MARGIN_DB, TRIES = 0.3, 3  # at a dB target; the margin is added where the last try fell short


@dataclass(frozen=True)
class _Job:
    """What a quantization from path to path was asked for."""

    path: Path
    target: Path
    statistics: str | Path | Statistics | None
    conditions: str | Path | None
    scheduler: str | Path | None
    seed: int
    device: str
    dtype: str
    offload: str
    overwrite: bool
    restart: bool
    max_shard_bytes: int
    reporter: Reporter
    ranks: Ranks
    attempt: int = 1  # at a budget in dB


def quantize(
    model_or_path: nn.Module | str | Path,
    recipe: str | Path | Recipe = "w4a8",
    out: str | Path | None = None,
    *,
    statistics: str | Path | Statistics | None = None,
    overrides: Sequence[str] = (),
    target_bits: float | None = None,
    target_size: str | None = None,
    target_db: float | None = None,
    conditions: str | Path | None = None,
    scheduler: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    offload: str = "none",
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    max_shard_bytes: int = 5 * 2**30,
    reporter: Reporter | None = None,
) -> QuantizeResult:
    """Compress a checkpoint by a recipe into the folder `out`, or a diffusers model in memory into a new model.

    Statistics are taken from `statistics` (a folder or an object), else from the cache, else gathered; a recipe
    that needs none gathers none. A pipeline folder gives a pipeline folder. A target replaces the budget of a recipe
    with the step `mixed`: mean stored bits of the quantized weights, bytes of the file ("6GB"), or dB of the output,
    for which the result is measured, and made again, twice at most, when it falls short. `offload` "cpu" or "disk"
    bounds the memory of the calibration by the largest linear; what runs the whole model otherwise is refused then.
    Under `accelerate launch` the other processes help to calibrate and end; theirs is a result without records.
    """
    reporter = reporter if reporter and speaks() else Silent()
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    if chosen.staged:
        raise DitcompressError("E202", f"recipe {chosen.name}", "has stages", "call run_recipe, or `ditcompress prune`")
    if isinstance(model_or_path, nn.Module):
        return quantized_module(model_or_path, chosen, statistics, seed, reporter)
    path = Path(model_or_path)
    pick_device(device)
    checkpoint, meta = open_model(path, allow_compressed=False)
    whole = adapter_for(checkpoint.config).layout(meta)
    layout = tied(whole, copies_of(meta))
    plan = checked_plan(chosen, layout)
    chosen = _memory.check_quantization(chosen, plan, (target_bits, target_size, target_db), offload, reporter)
    chosen = with_target(chosen, checkpoint, layout, plan, target_bits, target_size, target_db)
    plan = checked_plan(chosen, layout)
    if chosen.backend == "bitsandbytes" and checkpoint.quantization is not None:
        raise DitcompressError("E205", path, "is narrower or has expert layers", "use a recipe of another backend")
    plan = _bitsandbytes.settle(plan, layout, meta) if chosen.backend == "bitsandbytes" else plan
    for note in (*fallbacks(chosen, plan, layout), *unfolded(plan, whole, layout)):
        reporter.note(note)
    predict = _memory.of_quantizing(checkpoint, meta, layout, plan, chosen, statistics, dtype, offload)
    if dry_run:
        found = _memory.attempt(predict)
        size, peak = checkpoint.total_bytes, None if found is None else found.total
        return QuantizeResult(None, None, plan, original_bytes=size, memory_bytes=peak)
    _memory.tell(reporter, predict)
    target = Path(out) if out else path.with_name(f"{path.name.removesuffix('.safetensors')}-{chosen.name}")
    with joined(pick_device(device)) as (ranks, place), ranks.together():
        job = _Job(path, target, statistics, conditions, scheduler, seed, device if ranks.count == 1 else str(place),
                   dtype, offload, overwrite, restart, max_shard_bytes, reporter, ranks)  # fmt: skip
        if not ranks.first:
            _statistics_for(plan, chosen, checkpoint, replace(job, reporter=Silent()))
            return QuantizeResult(target, None, plan)
        return _published(job, chosen, checkpoint, layout, plan, (target_bits, target_size, target_db))


def _published(
    job: _Job, recipe: Recipe, checkpoint: Checkpoint, layout: Layout, plan: Plan, targets: tuple[Any, ...]
) -> QuantizeResult:
    """The folder, built, measured where a target was given, and only then put in its place: the parts of a killed run
    are those of all its tries."""
    manifest = {"recipe": recipe.to_json(), "seed": job.seed, "input": {"fingerprint": checkpoint.fingerprint}}
    with output_folder(
        job.target, overwrite=job.overwrite, inputs=[job.path], planned_bytes=checkpoint.total_bytes // 2,
        manifest=manifest,
    ) as partial:  # fmt: skip
        check_finite(checkpoint, job.reporter)
        result = _write(job, recipe, checkpoint, layout, plan, partial)
        if targets != (None, None, None):
            result, recipe = _verified(job, recipe, checkpoint, layout, result, targets[2], partial)
            manifest["recipe"] = recipe.to_json()
    for attempt in range(1, TRIES + 1):
        remove_work(work_of(_place(job.target, attempt)))
    return result


def _place(target: Path, attempt: int) -> Path:
    """What the work folder of a try is called after."""
    return target if attempt == 1 else target.with_name(f"{target.name}.try-{attempt}")


def _journal(job: _Job, marks: Mapping[str, Any]) -> Path:
    """The work folder of this try. A later one follows from what was measured, so its user cannot make it agree with
    one that is left from another run: it begins anew then."""
    place = _place(job.target, job.attempt)
    try:
        return work_folder(place, marks, restart=job.restart)
    except DitcompressError as error:
        if job.attempt == 1 or error.code != "E503":
            raise
        return work_folder(place, marks, restart=True)


def _verified(
    job: _Job, recipe: Recipe, checkpoint: Checkpoint, layout: Layout, result: QuantizeResult,
    target_db: float | None, partial: Path,
) -> tuple[QuantizeResult, Recipe]:  # fmt: skip
    """The result with its measured dB, and the recipe that gave it; made again, at most twice, when it misses the dB
    that it was asked for."""

    def measure() -> float:
        return measured_db(job.path, partial, job.reporter, scheduler=job.scheduler, conditions=job.conditions,
                           device=str(pick_device(job.device)))  # fmt: skip

    found, tries = measure(), 1
    while target_db is not None and found < target_db and tries < TRIES:
        point = next(point for point in result.plan.curve if point.chosen)
        job.reporter.note(f"{found:.1f} dB measured where {point.predicted_db:.1f} were predicted: choosing again")
        share = 10 ** ((point.nearest_db - found) / 10)
        more = point.predicted_db - found if tries > 1 else 0.0  # the share itself depends on the bits
        recipe = retarget(recipe, target_db=target_db + MARGIN_DB + more, share=share)
        tries += 1
        job = replace(job, attempt=tries)
        try:
            result = _write(job, recipe, checkpoint, layout, checked_plan(recipe, layout), partial)
        except DitcompressError as error:
            if error.code != "E202":
                raise
            recipe = retarget(recipe, target_bits=16.0, target_db=None)  # the best there is
            job = replace(job, attempt=TRIES)
            tries = TRIES
            result = _write(job, recipe, checkpoint, layout, checked_plan(recipe, layout), partial)
        found = measure()
    if target_db is not None and found < target_db:
        job.reporter.note(f"{target_db:g} dB were not reached; the last try gave {found:.1f} dB")
    return replace(result, measured_db=found), recipe


def _write(
    job: _Job, recipe: Recipe, checkpoint: Checkpoint, layout: Layout, plan: Plan, partial: Path
) -> QuantizeResult:
    """Gather what the plan needs, choose, encode block by block, and fill the folder, in place of an earlier try."""
    emptied(partial)
    folder = partial / (checkpoint.component if checkpoint.pipeline else "")
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, max_shard_bytes=job.max_shard_bytes)
    found = _statistics_for(plan, recipe, checkpoint, job)
    if recipe.backend == "bitsandbytes":
        meta = build_meta(checkpoint.config)
        outcome, config = _bitsandbytes.run(checkpoint, layout, meta, plan, writer, job.reporter)
    else:
        plan, outcome = _encoded(job, recipe, checkpoint, layout, plan, found, writer)
        config = engine.quantization_config(recipe.name, outcome)
    files = writer.finish()
    checkpoint.verify_unchanged()
    size = sum(f.stat().st_size for f in files)
    _write_config(folder, checkpoint.config, config)
    _describe(partial, folder, recipe, checkpoint, outcome, plan, job.path.name, size)
    search_scheduler(job.path, partial, recipe, job.conditions, job.seed, job.device, job.dtype, job.reporter)
    return QuantizeResult(job.target, None, plan, outcome.records, checkpoint.total_bytes, size)


def _encoded(
    job: _Job, recipe: Recipe, checkpoint: Checkpoint, layout: Layout, plan: Plan, found: Statistics | None,
    writer: ShardWriter,
) -> tuple[Plan, engine.Outcome]:  # fmt: skip
    """Choose what the plan leaves open, train where the recipe says so, and write every tensor."""
    inputs, by = found.inputs if found else {}, None
    parameters = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    trained = learns(plan, recipe, parameters, job.device, job.reporter)
    if trained or measures(plan):
        by = driven(
            checkpoint, recipe.calibration or Calibration(), job.conditions, job.scheduler, job.seed,
            job.device, job.reporter,
        )  # fmt: skip
    device = pick_device(job.device)
    plan = choose(plan, layout, checkpoint.read, inputs, (lambda: by.runner(job.seed)) if by else None, device)
    marks = {"model": checkpoint.fingerprint, "recipe": canonical(recipe), "seed": job.seed,
             "device": str(device), "torch": torch.__version__,
             "statistics": "" if found is None else found.digest, "journal": JOURNAL, "dtype": job.dtype,
             **given_files(job.conditions, job.scheduler, checkpoint)}  # fmt: skip
    journal = _journal(job, marks)
    with kept_work(journal):
        tuned = Tuned({}, {})
        if by is not None and trained:
            tuned = tune(by, layout, plan, inputs, recipe, seed=job.seed, journal=journal, reporter=job.reporter)
        outcome = engine.run(
            Overlay(checkpoint, tuned.tensors), layout, plan, inputs, RecipeSteps(tuned.encoded, device), writer,
            seed=job.seed, journal=journal, reporter=job.reporter,
        )  # fmt: skip
    return plan, outcome


def _describe(
    partial: Path, folder: Path, recipe: Recipe, checkpoint: Checkpoint, outcome: engine.Outcome, plan: Plan,
    name: str, size: int,
) -> None:  # fmt: skip
    """Everything beside weights and config: recipe, layers, trade-off, the rest of a pipeline, the model card."""
    (folder / "recipe.json").write_text(json.dumps(recipe.to_json(), indent=2) + "\n")
    for note in NOTES:  # how the model came to its shape
        if (checkpoint.folder / note).is_file():
            (folder / note).write_bytes((checkpoint.folder / note).read_bytes())
    records = [asdict(record) for record in outcome.records]
    (folder / "layers.json").write_text(json.dumps(records, indent=1, allow_nan=False) + "\n")
    if plan.curve:
        (folder / "tradeoff.json").write_text(json.dumps([asdict(p) for p in plan.curve], indent=1) + "\n")
    copy_rest(checkpoint, partial)
    card = quantized_card(
        f"{name}-{recipe.name}", name, checkpoint.class_name, recipe.to_json(), outcome.records,
        checkpoint.total_bytes, size, checkpoint.pipeline is not None,
    )  # fmt: skip
    (partial / "README.md").write_text(card, encoding="utf-8")


def _write_config(folder: Path, config: dict[str, Any], quantization: dict[str, Any]) -> None:
    quantization = with_structure(quantization, config)
    text = json.dumps({**config, "quantization_config": quantization}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")


def _statistics_for(plan: Plan, recipe: Recipe, checkpoint: Checkpoint, job: _Job) -> Statistics | None:
    """What the plan needs: nothing, the given statistics (checked), or cached or fresh ones.

    The work that several processes share: all come here, the first one when it has a place for the result, and go
    their own ways afterwards.
    """
    wanted = recipe.backend != "bitsandbytes"
    found = _given(job.statistics, checkpoint) if wanted and job.ranks.first else None
    if job.ranks.agree(wanted and found is None and bool(needs(plan))):
        settings = settings_of(recipe.calibration or Calibration(), job.seed)
        found = cached_statistics(
            checkpoint, settings, job.conditions, job.scheduler, job.device, job.dtype, job.reporter, job.restart,
            job.offload, job.ranks,
        )  # fmt: skip
    job.ranks.leave()
    return found


def _given(statistics: str | Path | Statistics | None, checkpoint: Checkpoint) -> Statistics | None:
    """E331 for those of another checkpoint."""
    if statistics is None or isinstance(statistics, Statistics):
        return statistics
    found = load_statistics(Path(statistics))
    if found.meta.get("model") not in (None, checkpoint.fingerprint):
        what = "these statistics belong to another checkpoint"
        raise DitcompressError("E331", statistics, what, "calibrate this one")
    return found

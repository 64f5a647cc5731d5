"""Recipes with stages: prune, distil, quantize, evaluate, in one run and one folder.

Every stage is the function of its name. Its result stays in the work folder beside the target until all are done, so
a killed run goes on with the stage that it was in; the target appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.manifest import NAME as MANIFEST
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import kept_work, linked, output_folder, remove_work, work_folder
from ..console import Reporter, Silent
from ..distill.settings import TRAJECTORIES
from ..errors import DitcompressError
from ..loading import open_model
from ..ranks import alone
from ..recipe import Recipe, canonical, load_recipe
from ..sections import Pruning
from ._images import listing
from .calibration import given_files, pick_device
from .compress import quantize
from .depth import prune
from .distill import check_data, distill, options_of
from .judge import evaluate
from .width import check_ratio

REPORT = "report"


@dataclass(frozen=True)
class ChainResult:
    """`path` of the result (None for a dry run), the facts of every stage that ran by name, and the report's JSON."""

    path: Path | None
    stages: dict[str, Any]
    report: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Chain:
    path: Path
    recipe: Recipe
    target: Path
    conditions: str | Path | None
    scheduler: str | Path | None
    seed: int
    device: str
    dtype: str
    reporter: Reporter

    def options(self) -> dict[str, Any]:
        """What every stage is given."""
        return {"conditions": self.conditions, "scheduler": self.scheduler, "device": self.device, "overwrite": True,
                "reporter": self.reporter}  # fmt: skip

    def marks(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What an interrupted run must have in common with this one."""
        wanted = self.recipe.distill
        data = TRAJECTORIES if wanted is None else options_of(wanted.model_dump(exclude_unset=True)).data
        return {"model": checkpoint.fingerprint, "recipe": canonical(self.recipe), "seed": self.seed,
                "torch": torch.__version__,
                "data": "" if data == TRAJECTORIES else listing(Path(data)), "dtype": self.dtype,
                "device": str(pick_device(self.device)),
                **given_files(self.conditions, self.scheduler, checkpoint)}  # fmt: skip


def run_recipe(
    path: str | Path,
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    conditions: str | Path | None = None,
    scheduler: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> ChainResult:
    """Run a recipe with stages on a model or pipeline folder; `out`/report holds the report where one is asked for.

    The student of `distill` is what `prune` leaves, its teacher the original; `rules` quantize the result. A dry run
    says what would be pruned. Raises what the stages raise; E202 for a recipe that trains without a smaller model.
    """
    alone(f"recipe {recipe.name}")
    reporter = reporter or Silent()
    path = Path(path)
    checkpoint, _ = open_model(path, allow_compressed=False)
    if recipe.distill is not None:
        if recipe.prune is None:
            raise DitcompressError("E202", f"recipe {recipe.name}", "distill needs a smaller model", "add prune:")
        check_data(checkpoint, options_of(recipe.distill.model_dump(exclude_unset=True)).data, scheduler)
    target = Path(out) if out else path.with_name(f"{path.name.removesuffix('.safetensors')}-{recipe.name}")
    job = _Chain(path, recipe, target, conditions, scheduler, seed, device, dtype, reporter)
    if dry_run:
        return ChainResult(None, {"prune": _prune(job, None)} if recipe.prune else {})
    marks = job.marks(checkpoint)
    with output_folder(
        target, overwrite=overwrite, inputs=[path], planned_bytes=checkpoint.total_bytes,
        manifest={"recipe": recipe.to_json(), "seed": seed, "input": {"fingerprint": checkpoint.fingerprint}},
    ) as partial:  # fmt: skip
        work = work_folder(target.with_name(f"{target.name}.stages"), marks, restart)
        with kept_work(work):
            result = _run(job, work, partial)
    remove_work(work)
    return result


def _run(job: _Chain, work: Path, partial: Path) -> ChainResult:
    """All stages, then the last one's files into `partial` too: until that is published a killed run needs them."""
    facts: dict[str, Any] = {}
    last = job.path
    for name, stage in (("prune", _prune), ("distill", _distill), ("quantize", _quantize)):
        wanted = job.recipe.rules if name == "quantize" else getattr(job.recipe, name)
        if not wanted:
            continue
        job.reporter.note(f"stage: {name}")
        place = work / name / job.target.name
        facts[name] = _once(place, lambda stage=stage, place=place, last=last: stage(job, place, last))  # type: ignore[misc]
        last = place
    report = _evaluate(job, last, work / REPORT) if job.recipe.report is not None else None
    linked(last, partial, leave=(MANIFEST,))
    if report is not None:
        linked(work / REPORT, partial / REPORT)
    opened = open_model(last)[0]
    _describe(job, partial / (opened.component if opened.pipeline else ""))
    return ChainResult(job.target, facts, report)


def _once(place: Path, make: Callable[[], Any]) -> Any:
    """The facts of a finished stage, or of running it now."""
    note = place.parent / "facts.json"
    if (place / MANIFEST).is_file() and note.is_file():
        return json.loads(note.read_text())
    facts = make()
    note.write_text(json.dumps(facts))
    return facts


def _prune(job: _Chain, out: Path | None, last: Path | None = None) -> Any:
    wanted = job.recipe.prune
    assert wanted is not None
    overrides, width_overrides = (
        [f"{key}={json.dumps(value)}" for key, value in params.items()]
        for params in (wanted.params, wanted.width_params)
    )
    return prune(
        job.path, wanted.ratio, out, by=wanted.by, method=wanted.method, width_ratio=wanted.width_ratio,
        width_units=wanted.width_units, width_method=wanted.width_method, overrides=overrides,
        width_overrides=width_overrides, seed=job.seed, dtype=job.dtype, dry_run=out is None,
        **job.options(),
    ).facts  # fmt: skip


def _distill(job: _Chain, out: Path, last: Path) -> Any:
    wanted = job.recipe.distill
    assert wanted is not None
    given = {"seed": job.seed, **wanted.model_dump(exclude_unset=True)}
    return distill(job.path, last, out, **given, **job.options()).facts


def _quantize(job: _Chain, out: Path, last: Path) -> Any:
    recipe = job.recipe.model_copy(update={"prune": None, "distill": None, "report": None})
    made = quantize(last, recipe, out, seed=job.seed, dtype=job.dtype, **job.options())
    return {"bits_per_quantized_weight": made.bits, "bytes": made.bytes, "original_bytes": made.original_bytes}


def _describe(job: _Chain, component: Path) -> None:
    """The whole recipe in place of a stage's own, in a file of its own."""
    place = component / "recipe.json"
    place.unlink(missing_ok=True)
    place.write_text(json.dumps(job.recipe.to_json(), indent=2) + "\n")


def _evaluate(job: _Chain, compressed: Path, out: Path) -> dict[str, Any]:
    wanted = job.recipe.report
    assert wanted is not None
    job.reporter.note("stage: evaluate")
    command = f"ditcompress evaluate {job.path} {job.target} --pairs {wanted.pairs}"
    declared = job.recipe.evaluation
    settings = {key: value for key, value in wanted.model_dump().items() if value is not None}
    settings |= {"profile": declared.profile, "margins": declared.margins}
    return evaluate(job.path, compressed, out, command=command, dtype=job.dtype, **settings, **job.options())


def staged(
    recipe: str | Path | Recipe | None, pruning: Mapping[str, Any], steps: int | None = None, data: str | None = None
) -> Recipe:
    """A recipe with stages from the options of `prune`: its section prune replaced by `pruning`, where that names a
    ratio, and its training by `steps` (0: none) on `data`. E202 where nothing says what is pruned."""
    chosen = Recipe.model_construct(name="pruned") if recipe is None else recipe
    chosen = chosen if isinstance(chosen, Recipe) else load_recipe(chosen)
    for option in ("ratio", "width_ratio"):
        check_ratio("--" + option.replace("_", "-"), pruning.get(option))
    if pruning.get("ratio") is not None or pruning.get("width_ratio") is not None:
        chosen = chosen.model_copy(update={"prune": Pruning(**pruning)})
    if chosen.prune is None:
        raise DitcompressError("E203", "--ratio", "is missing", "give --ratio, --width-ratio or both")
    if steps == 0 and data is not None:
        raise DitcompressError("E203", "--data", "without training nothing reads it", "give --distill-steps above 0")
    if steps == 0:
        return chosen.model_copy(update={"distill": None})
    given = {} if chosen.distill is None else chosen.distill.model_dump(exclude_unset=True)
    given |= {key: value for key, value in (("steps", steps), ("data", data)) if value is not None}
    if data is not None and "steps" not in given:
        raise DitcompressError("E203", "--data", "is for the training after pruning", "give --distill-steps")
    return chosen.model_copy(update={"distill": options_of(given)}) if given else chosen

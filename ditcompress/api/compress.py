"""What the command line and Python users call: each function glues the layers below together, in order.

Paths are diffusers model folders, pipeline folders, single safetensors files or original DiT .pt files.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import engine
from ..calibration.collect import collect
from ..calibration.schedulers import load_scheduler
from ..calibration.statistics import Statistics
from ..calibration.store import load_statistics
from ..checkpoint.reader import Checkpoint, check_finite
from ..checkpoint.source import ModuleSource
from ..checkpoint.writer import ShardWriter, copy_pipeline, output_folder, remove_work, work_folder
from ..console import Reporter, Silent
from ..errors import DitcompressError
from ..evaluation.verdict import margins_of
from ..loading import DitcompressConfig, apply_schemes, as_loaded, open_model, register
from ..models import adapter_for
from ..models.base import Layout
from ..plan import Plan
from ..quantization import RecipeSteps, check_plan, choose, needs
from ..recipe import Calibration, Recipe, canonical, load_recipe, make_plan
from ..report.card import quantized_card
from .calibration import cached_statistics, conditions_for, settings_of


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` made: `path` (None for a model in memory or a dry run), `model` (for a model in memory),
    the plan, and one record a layer. `original_bytes` and `bytes` count stored tensors."""

    path: Path | None
    model: nn.Module | None
    plan: Plan
    records: tuple[engine.LayerRecord, ...] = ()
    original_bytes: int = 0
    bytes: int = 0

    @property
    def bits(self) -> float:
        """Stored bits per quantized weight, scales and low-rank factors included."""
        weights = sum(r.shape[0] * r.shape[1] for r in self.records)
        return 8 * sum(r.stored_bytes for r in self.records) / weights if weights else 0.0


# --- quantize ------------------------------------------------------------------------------------------------------


def quantize(
    model_or_path: nn.Module | str | Path,
    recipe: str | Path | Recipe = "w4a8",
    out: str | Path | None = None,
    *,
    statistics: str | Path | Statistics | None = None,
    overrides: Sequence[str] = (),
    conditions: str | Path | None = None,
    scheduler: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    max_shard_bytes: int = 5 * 2**30,
    reporter: Reporter | None = None,
) -> QuantizeResult:
    """Compress a checkpoint by a recipe into the folder `out`, or a diffusers model in memory into a new model.

    Statistics are taken from `statistics` (a folder or an object), else from the cache, else gathered; a recipe
    that needs none gathers none. A pipeline folder gives a pipeline folder.
    """
    reporter = reporter or Silent()
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    if isinstance(model_or_path, nn.Module):
        return _quantize_module(model_or_path, chosen, statistics, seed, reporter)
    path = Path(model_or_path)
    checkpoint, meta = open_model(path, allow_compressed=False)
    layout = adapter_for(checkpoint.config).layout(meta)
    plan = checked_plan(chosen, layout)
    if dry_run:
        return QuantizeResult(None, None, plan, original_bytes=checkpoint.total_bytes)
    target = Path(out) if out else path.with_name(f"{path.name.removesuffix('.safetensors')}-{chosen.name}")
    inputs = [path]
    with output_folder(
        target, overwrite=overwrite, inputs=inputs, planned_bytes=checkpoint.total_bytes // 2,
        manifest={"recipe": chosen.to_json(), "seed": seed, "input": {"fingerprint": checkpoint.fingerprint}},
    ) as partial:  # fmt: skip
        check_finite(checkpoint, reporter)
        found = _statistics_for(
            plan, chosen, statistics, checkpoint, conditions, scheduler, seed, device, dtype, reporter, restart
        )
        plan = choose(plan, layout, checkpoint.read, found.inputs if found else {})
        marks = {"model": checkpoint.fingerprint, "recipe": canonical(chosen), "seed": seed, "torch": torch.__version__,
                 "statistics": "" if found is None else found.digest}  # fmt: skip
        journal = work_folder(target, marks, restart=restart)
        component = checkpoint.component if checkpoint.pipeline else ""
        folder = partial / component
        folder.mkdir(exist_ok=True)
        writer = ShardWriter(folder, max_shard_bytes=max_shard_bytes)
        outcome = engine.run(
            checkpoint, layout, plan, found.inputs if found else {}, RecipeSteps(), writer,
            seed=seed, journal=journal, reporter=reporter,
        )  # fmt: skip
        files = writer.finish()
        checkpoint.verify_unchanged()
        shapes = (checkpoint.quantization or {}).get("shapes")
        fields = engine.quantization_config(chosen.name, outcome) | ({"shapes": shapes} if shapes else {})
        _write_config(folder, checkpoint.config, fields)
        (folder / "recipe.json").write_text(json.dumps(chosen.to_json(), indent=2) + "\n")
        records = [asdict(record) for record in outcome.records]
        (folder / "layers.json").write_text(json.dumps(records, indent=1, allow_nan=False) + "\n")
        if checkpoint.pipeline:
            copy_pipeline(checkpoint.pipeline, partial, component)
        elif checkpoint.scheduler_folder:
            copy_scheduler(checkpoint.scheduler_folder, partial)
        size = sum(f.stat().st_size for f in files)
        card = quantized_card(
            f"{path.name}-{chosen.name}", path.name, checkpoint.class_name, chosen.to_json(), outcome.records,
            checkpoint.total_bytes, size, checkpoint.pipeline is not None,
        )  # fmt: skip
        (partial / "README.md").write_text(card, encoding="utf-8")
    remove_work(journal)
    return QuantizeResult(target, None, plan, outcome.records, checkpoint.total_bytes, size)


def checked_plan(recipe: Recipe, layout: Layout) -> Plan:
    """The recipe's plan for this model; E202 when nothing matches or a step or format is unknown."""
    plan = make_plan(recipe, layout)
    check_plan(plan)
    if not plan.layers:
        raise DitcompressError(
            "E202", f"recipe {recipe.name}", "no rule matches a linear of this model", "see `inspect`"
        )
    return plan


def copy_scheduler(folder: Path, partial: Path) -> None:
    target = partial / "scheduler"
    target.mkdir(exist_ok=True)
    (target / "scheduler_config.json").write_bytes((folder / "scheduler_config.json").read_bytes())


def _write_config(folder: Path, config: dict[str, Any], quantization: dict[str, Any]) -> None:
    text = json.dumps({**config, "quantization_config": quantization}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")


def _statistics_for(
    plan: Plan,
    recipe: Recipe,
    given: str | Path | Statistics | None,
    checkpoint: Checkpoint,
    conditions: str | Path | None,
    scheduler: str | Path | None,
    seed: int,
    device: str,
    dtype: str,
    reporter: Reporter,
    restart: bool,
) -> Statistics | None:
    """What the plan needs: nothing, the given statistics (checked), or cached or fresh ones."""
    if isinstance(given, Statistics):
        return given
    if given is not None:
        found = load_statistics(Path(given))
        if found.meta.get("model") not in (None, checkpoint.fingerprint):
            raise DitcompressError("E331", given, "these statistics belong to another checkpoint", "calibrate this one")
        return found
    if not needs(plan):
        return None
    settings = settings_of(recipe.calibration or Calibration(), seed)
    return cached_statistics(checkpoint, settings, conditions, scheduler, device, dtype, reporter, restart)


def _quantize_module(
    model: nn.Module, recipe: Recipe, statistics: str | Path | Statistics | None, seed: int, reporter: Reporter
) -> QuantizeResult:
    """A compressed copy of a model in memory; the original is not changed."""
    register()
    source = ModuleSource(model)
    adapter = adapter_for(source.config)
    layout = adapter.layout(model)
    plan = checked_plan(recipe, layout)
    if isinstance(statistics, (str, Path)):
        statistics = load_statistics(Path(statistics))
    if statistics is None and needs(plan):
        settings = settings_of(recipe.calibration or Calibration(), seed)
        scheduler = load_scheduler(source.config, None, adapter, reporter)
        given = conditions_for(source, adapter, settings, None, reporter)
        statistics = collect(model, adapter, source.config, layout, scheduler, given, settings, reporter=reporter)
    sink = _Memory()
    inputs = statistics.inputs if statistics is not None else {}
    plan = choose(plan, layout, source.read, inputs)
    outcome = engine.run(source, layout, plan, inputs, RecipeSteps(), sink, seed=seed, reporter=reporter)
    compressed = copy.deepcopy(model)
    fields = engine.quantization_config(recipe.name, outcome)
    config = DitcompressConfig(**{key: value for key, value in fields.items() if key != "quant_method"})
    apply_schemes(compressed, config.layer_schemes())
    compressed.load_state_dict(sink.tensors, strict=True, assign=True)
    compressed.requires_grad_(False)
    as_loaded(compressed, config)
    size = sum(t.numel() * t.element_size() for t in sink.tensors.values())
    before = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return QuantizeResult(None, compressed.eval(), plan, outcome.records, before, size)


class _Memory:
    """A sink that keeps the tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor


# --- facts for the command line --------------------------------------------------------------------------------------


def quantize_facts(result: QuantizeResult) -> dict[str, Any]:
    """A result as JSON values."""
    return {
        "path": str(result.path),
        "bits_per_quantized_weight": result.bits,
        "original_bytes": result.original_bytes,
        "bytes": result.bytes,
        "layers": [asdict(record) for record in result.records],
    }


def check_recipe(recipe: Recipe) -> None:
    """Validate every step and format of a recipe without a model."""
    from ..plan import LayerDecision

    layers = []
    for number, rule in enumerate(recipe.rules):
        if rule.weight is not None and not rule.keep:
            layers.append(
                LayerDecision(
                    "",
                    "",
                    rule.weight.spec(),
                    steps=rule.steps,
                    smooth=rule.smooth,
                    rank=rule.rank,
                    reason=f"rule {number + 1}",
                )
            )
    check_plan(Plan(tuple(layers)))
    judged = recipe.evaluation
    margins_of(judged.profile if judged.profile != "auto" else "fidelity", judged.margins)

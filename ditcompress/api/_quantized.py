"""What quantizing a folder and a model in memory share, and the whole of the latter."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import engine
from ..calibration.collect import collect
from ..calibration.schedulers import load_scheduler
from ..calibration.statistics import Statistics
from ..calibration.store import load_statistics
from ..checkpoint.source import ModuleSource
from ..console import Reporter
from ..errors import DitcompressError
from ..loading import DitcompressConfig, apply_schemes, as_loaded, register
from ..models import adapter_for
from ..models.base import Layout
from ..plan import Plan
from ..quantization import RecipeSteps, check_plan, choose, measures, needs
from ..quantization._trained import Tuned
from ..recipe import Calibration, Recipe, make_plan
from ..sharing import copies_of, everywhere, tied
from ._training import Driven, Overlay, check_training, guidance_of, learns, tune
from .calibration import conditions_for, settings_of


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` made: `path` (None for a model in memory or a dry run), `model` (for a model in memory),
    the plan, and one record a layer. `original_bytes` and `bytes` count stored tensors; `measured_db` is the output
    SQNR on held-out inputs where a budget was spent, `memory_bytes` the predicted peak of a dry run."""

    path: Path | None
    model: nn.Module | None
    plan: Plan
    records: tuple[engine.LayerRecord, ...] = ()
    original_bytes: int = 0
    bytes: int = 0
    measured_db: float | None = None
    memory_bytes: int | None = None

    @property
    def bits(self) -> float:
        """Stored bits per quantized weight, scales and low-rank factors included."""
        weights = sum(r.shape[0] * r.shape[1] for r in self.records)
        return 8 * sum(r.stored_bytes for r in self.records) / weights if weights else 0.0


def checked_plan(recipe: Recipe, layout: Layout) -> Plan:
    """The recipe's plan for this model; E202 when nothing matches or a step or format is unknown."""
    plan = make_plan(recipe, layout)
    if recipe.options is None:
        check_plan(plan)
        check_training(recipe, plan)
    if not plan.layers:
        raise DitcompressError(
            "E202", f"recipe {recipe.name}", "no rule matches a linear of this model", "see `inspect`"
        )
    return plan


def with_structure(quantization: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The new `quantization_config` with the expert layers and widths of the model that was quantized."""
    before = DitcompressConfig.of(config)
    return quantization if before is None else {**quantization, **before.structure()}


def quantized_module(
    model: nn.Module, recipe: Recipe, statistics: str | Path | Statistics | None, seed: int, reporter: Reporter
) -> QuantizeResult:
    """A compressed copy of a model in memory; the original is not changed."""
    if recipe.options is not None:
        raise DitcompressError("E205", f"recipe {recipe.name}", "writes folders only", "save the model, give its path")
    register()
    if recipe.scheduler_search is not None:
        reporter.note("a model in memory has no scheduler: scheduler_search is left out; see `ditcompress q-sched`")
    source = ModuleSource(model)
    own = DitcompressConfig.of(source.config)
    if source.config.get("quantization_config") is not None and (own is None or own.layers):
        raise DitcompressError("E322", type(model).__name__, "is quantized already", "give the original model")
    adapter = adapter_for(source.config)
    layout = tied(adapter.layout(model), copies_of(model))
    plan = checked_plan(recipe, layout)
    if isinstance(statistics, (str, Path)):
        statistics = load_statistics(Path(statistics))
    wanted = recipe.calibration or Calibration()
    settings = settings_of(wanted, seed)
    by = None
    device = next(model.parameters()).device
    trained = learns(plan, recipe, sum(p.numel() for p in model.parameters()), str(device), reporter)
    if (statistics is None and needs(plan)) or trained or measures(plan):
        scheduler = load_scheduler(source.config, None, adapter, reporter)
        given = conditions_for(source, adapter, settings, None, reporter)
        by = Driven(model, adapter, source.config, scheduler, given, guidance_of(wanted, adapter, source.config))
        if statistics is None and needs(plan):
            statistics = collect(model, adapter, source.config, layout, scheduler, given, settings, reporter=reporter)
    sink = Memory()
    inputs = statistics.inputs if statistics is not None else {}
    plan = choose(plan, layout, source.read, inputs, (lambda: by.runner(seed)) if by else None, device)
    tuned = Tuned({}, {})
    if by is not None and trained:
        tuned = tune(by, layout, plan, inputs, recipe, seed=seed, journal=None, reporter=reporter)
    outcome = engine.run(
        Overlay(source, tuned.tensors), layout, plan, inputs, RecipeSteps(tuned.encoded, device), sink,
        seed=seed, reporter=reporter,
    )  # fmt: skip
    compressed = copy.deepcopy(model)
    fields = with_structure(engine.quantization_config(recipe.name, outcome), source.config)
    config = DitcompressConfig(**fields)
    apply_schemes(compressed, config.layer_schemes())
    compressed.load_state_dict(everywhere(sink.tensors, config.shared), strict=True, assign=True)
    compressed.requires_grad_(False)
    as_loaded(compressed.to(device), config)
    size = sum(t.numel() * t.element_size() for t in sink.tensors.values())
    before = sum(math.prod(header.shape) * header.dtype.itemsize for header in source.tensors.values())
    return QuantizeResult(None, compressed.eval(), plan, outcome.records, before, size)


class Memory:
    """A sink that keeps the tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor

"""Quantization steps: one step, one file. `RecipeSteps` is how the engine runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DitcompressError
from ..models.base import Layout
from ..plan import LayerDecision, Plan
from .base import Encoded, Group, Layer, range_scale, registry, step_module, validated

__all__ = ["RecipeSteps", "check_plan", "choose", "needs", "registry"]


class RecipeSteps:
    """The steps named in the decisions: those with `prepare` choose the smoothing, the one with `encode` rounds.
    `tuned` are stored forms that training has found already."""

    def __init__(self, tuned: Mapping[str, Encoded] | None = None) -> None:
        self.tuned = tuned or {}

    def prepare(self, decisions: Sequence[LayerDecision], weights: Sequence[Tensor], statistics: Any) -> Tensor | None:
        group = Group([Layer(d, w, statistics) for d, w in zip(decisions, weights, strict=True)])
        for step in decisions[0].steps:
            module, params = step_module(step)
            if hasattr(module, "prepare"):
                return module.prepare(group, params)
        return None

    def static(
        self, decision: LayerDecision, weight: Tensor, statistics: Any, smooth: Tensor | None, sign: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and zero, each (1,) float32, of a statically quantized input: by the step that chooses them, else from
        the calibrated range."""
        layer = Layer(decision, weight, statistics, smooth, sign)
        for step in decision.steps:
            module, params = step_module(step)
            if hasattr(module, "static"):
                return module.static(layer, params)
        return range_scale(layer)

    def encode(
        self,
        decision: LayerDecision,
        weight: Tensor,
        statistics: Any,
        smooth: Tensor | None,
        seed: int,
        sign: Tensor | None = None,
    ) -> Encoded:
        if decision.site in self.tuned:
            return self.tuned[decision.site]
        generator = torch.Generator().manual_seed(seed)
        layer = Layer(decision, weight, statistics, smooth, sign, generator)
        module, params = step_module(_encoder(decision))
        return module.encode(layer, params)


def choose(plan: Plan, layout: Layout, read: Callable[[str], Tensor], statistics: Mapping[str, Any]) -> Plan:
    """The plan after every step with a `choose` phase has decided from weights and statistics.

    `read` gives the tensor of a name. Such a step is asked once, about the whole plan.
    """
    keys = {site.name: site.input_key for site in layout.sites}
    asked: set[str] = set()
    for decision in plan.layers:
        for step in decision.steps:
            module, params = step_module(step)
            if step.name not in asked and hasattr(module, "choose"):
                asked.add(step.name)
                by_site = {d.site: statistics.get(keys[d.site]) for d in plan.layers}
                found = module.choose(plan.layers, lambda name: read(f"{name}.weight"), by_site, params)
                plan = found if isinstance(found, Plan) else Plan(tuple(found), plan.curve)
    return plan


def _encoder(decision: LayerDecision) -> Any:
    for step in decision.steps:
        if hasattr(registry.get(step.name), "encode"):
            return step
    raise DitcompressError("E202", decision.reason, "no step encodes the weight", "add rtn or gptq to its steps")


def check_plan(plan: Plan) -> None:
    """Every format, step and parameter of the plan is known and valid; E201 or E202 before any work is done."""
    for decision in plan.layers:
        validated(resolve_format(decision), decision.weight.params, f"format {decision.weight.format}")
        for step in decision.steps:
            step_module(step)
        _encoder(decision)
        if decision.rank and not getattr(registry.get(_encoder(decision).name), "LOW_RANK", False):
            able = [name for name in registry.names() if getattr(registry.get(name), "LOW_RANK", False)]
            raise DitcompressError(
                "E202", decision.reason, "rank needs a step that fits low-rank parts", f"use {' or '.join(able)}"
            )


def resolve_format(decision: LayerDecision) -> Any:
    """The format's module; E201 for an unknown name."""
    from ..formats.base import registry as formats

    return formats.get(decision.weight.format)


def needs(plan: Plan) -> set[str]:
    """The statistics that the plan's steps and activations read."""
    found: set[str] = set()
    for decision in plan.layers:
        for step in decision.steps:
            found |= set(registry.get(step.name).NEEDS)
        if decision.activation.mode == "static":
            found.add("range")
    return found

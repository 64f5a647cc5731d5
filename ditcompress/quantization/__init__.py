"""Quantization steps: one step, one file. `RecipeSteps` is how the engine runs them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import Linear
from ..errors import DitcompressError
from ..formats.base import stackable
from ..models.base import Layout
from ..plan import LayerDecision, Plan
from ._runner import Runner
from .base import CPU, Encoded, Group, Layer, encoder_of, range_scale, registry, step_module, validated

__all__ = ["RecipeSteps", "check_plan", "choose", "needs", "registry"]


class RecipeSteps:
    """The steps named in the decisions: those with `prepare` choose the smoothing, the one with `encode` rounds.
    `tuned` are stored forms that training has found already. All of it happens on `device`, one linear (or the readers
    of one input) at a time; what goes in and comes out lies on the CPU."""

    def __init__(self, tuned: Mapping[str, Encoded] | None = None, device: torch.device = CPU) -> None:
        self.tuned, self.device = tuned or {}, device

    def prepare(self, decisions: Sequence[LayerDecision], weights: Sequence[Tensor], statistics: Any) -> Tensor | None:
        group = Group([Layer(d, w, statistics).to(self.device) for d, w in zip(decisions, weights, strict=True)])
        for step in decisions[0].steps:
            module, params = step_module(step)
            if hasattr(module, "prepare"):
                found = module.prepare(group, params)
                return None if found is None else found.to(CPU)
        return None

    def static(
        self, decision: LayerDecision, weight: Tensor, statistics: Any, smooth: Tensor | None, sign: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and zero, each (1,) float32, of a statically quantized input: by the step that chooses them, else from
        the calibrated range."""
        layer = Layer(decision, weight, statistics, smooth, sign).to(self.device)
        chosen = next((s for s in decision.steps if hasattr(registry.get(s.name), "static")), None)
        if chosen is None:
            scale, zero = range_scale(layer)
        else:
            module, params = step_module(chosen)
            scale, zero = module.static(layer, params)
        return scale.to(CPU), None if zero is None else zero.to(CPU)

    def alike(self, decision: LayerDecision, shape: tuple[int, int]) -> Hashable | None:
        """What weights have in common that one call of the encoder's `encode_many` may take; None for one that is
        encoded alone."""
        step = encoder_of(decision)
        together = hasattr(registry.get(step.name), "encode_many") and decision.site not in self.tuned
        if not together or not stackable(decision.weight, shape[0]):
            return None
        return shape, decision.rank, repr((decision.weight, step))

    def encode_many(self, linears: Sequence[Linear]) -> Sequence[Encoded]:
        """The stored forms of one linear, or of some that are `alike`."""
        if len(linears) == 1:
            return [self.encode(linears[0])]
        module, params = step_module(encoder_of(linears[0].decision))
        layers = [self._layer(linear) for linear in linears]
        return [encoded.to(CPU) for encoded in module.encode_many(layers, params)]

    def encode(self, linear: Linear) -> Encoded:
        """The stored form of one weight: what training has found, else by the step that encodes."""
        if linear.decision.site in self.tuned:
            return self.tuned[linear.decision.site]
        module, params = step_module(encoder_of(linear.decision))
        return module.encode(self._layer(linear), params).to(CPU)

    def _layer(self, linear: Linear) -> Layer:
        generator = torch.Generator().manual_seed(linear.seed)
        given = (linear.weight, linear.statistics, linear.smooth, linear.sign)
        return Layer(linear.decision, *given, generator).to(self.device)


def measures(plan: Plan) -> bool:
    """Whether any step of the plan decides by running the model."""
    return any(hasattr(registry.get(s.name), "choose_measured") for d in plan.layers for s in d.steps)


def choose(
    plan: Plan,
    layout: Layout,
    read: Callable[[str], Tensor],
    statistics: Mapping[str, Any],
    runner: Callable[[], Runner] | None = None,
    device: torch.device = CPU,
) -> Plan:
    """The plan after every step with a `choose` phase has decided from weights and statistics, or one with a
    `choose_measured` phase by running the model.

    `read` gives the tensor of a name; it goes to `device`. Such a step is asked once, about the whole plan.
    """
    by_site = _BySite({site.name: site.input_key for site in layout.sites}, statistics, device)
    weight_of = lambda name: read(f"{name}.weight").to(device)  # noqa: E731
    asked: set[str] = set()
    for decision in plan.layers:
        for step in decision.steps:
            module, params = step_module(step)
            if step.name not in asked and hasattr(module, "choose_measured"):
                asked.add(step.name)
                assert runner is not None
                plan = Plan(tuple(module.choose_measured(plan.layers, weight_of, params, runner())), plan.curve)
            if step.name not in asked and hasattr(module, "choose"):
                asked.add(step.name)
                found = module.choose(plan.layers, weight_of, by_site, params)
                plan = found if isinstance(found, Plan) else Plan(tuple(found), plan.curve)
    return plan


class _BySite(Mapping[str, Any]):
    """The statistics of each linear's input, on a device while they are looked at; None where there are none."""

    def __init__(self, keys: Mapping[str, str], statistics: Mapping[str, Any], device: torch.device) -> None:
        self.keys_of, self.statistics, self.device = keys, statistics, device

    def __getitem__(self, site: str) -> Any:
        found = self.statistics.get(self.keys_of[site])
        return found if found is None or self.device == CPU else found.to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


def check_plan(plan: Plan) -> None:
    """Every format, step and parameter of the plan is known and valid; E201 or E202 before any work is done."""
    for decision in plan.layers:
        validated(resolve_format(decision), decision.weight.params, f"format {decision.weight.format}")
        for step in decision.steps:
            chosen = getattr(step_module(step)[0], "SETS", None)
            if chosen is not None and chosen not in resolve_format(decision).Params.model_fields:
                what = f"{step.name} chooses {chosen}, which format {decision.weight.format} does not have"
                raise DitcompressError("E202", decision.reason, what, "give another format, or leave the step out")
        encoder_of(decision)
        if decision.rank and not getattr(registry.get(encoder_of(decision).name), "LOW_RANK", False):
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

"""Mixed precision under a budget of stored bits: the layers on which the output depends most get wider codes.

The cost of a layer at b bits is tr((W - Q_b) H (W - Q_b)^T) with rounding to nearest; H is weighted by the output's
sensitivity (calibration weighting "fisher"), so costs of different layers can be compared and added. Bits are bought
where they lower the total most for each stored bit (greedy on the convex hull of every layer's choices), until the mean
over all planned weights would exceed `target_bits`. The choice is data: it is in the plan and the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import Tensor

from ..formats.base import StrictParams, resolve, stored_layout
from ..plan import LayerDecision, WeightSpec
from ._rounding import damped, objective
from .base import Layer

NEEDS = ("gram",)


class Params(StrictParams):
    """`target_bits`: mean stored bits per planned weight; `widths`: the wider codes that a layer may get."""

    target_bits: float = Field(4.65, gt=1, le=16)
    widths: tuple[int, ...] = (5, 6, 8)


def stored_bits(spec: WeightSpec, shape: tuple[int, int]) -> int:
    """Bits that a weight of `shape` takes in this format, scales and zeros included."""
    total = 0
    for size, dtype in stored_layout(spec, shape).values():
        count = 1
        for extent in size:
            count *= extent
        total += 8 * count * dtype.itemsize
    return total


def rounding_cost(decision: LayerDecision, weight: Tensor, statistics: Any) -> float:
    """Expected relative output error of rounding this weight to nearest in the decision's format."""
    fmt, params = resolve(decision.weight)
    layer = Layer(decision, weight.float(), statistics)
    gram = layer.gram()
    hessian = damped(gram, 1e-6, layer.name) * gram.diagonal().mean()
    grid = fmt.fit(layer.weight, params, hessian.diagonal().float())
    rounded = fmt.value(fmt.code(layer.weight, grid, params), grid, params)
    return objective(layer.weight, rounded, hessian).sum().item()


def choose(
    decisions: Sequence[LayerDecision],
    read: Callable[[str], Tensor],
    statistics: Mapping[str, Any],
    params: Params,
) -> list[LayerDecision]:
    """`decisions` with wider formats where the budget allows; only those whose steps name `mixed` may change."""
    options: list[list[tuple[float, float, LayerDecision]]] = []  # (bits, cost, decision), narrow to wide
    weights = 0
    for decision in decisions:
        weight = read(decision.site)
        shape = (weight.shape[0], weight.shape[1])
        weights += weight.numel()
        free = any(step.name == "mixed" for step in decision.steps)
        widths = [w for w in params.widths if free and w > decision.weight.params.get("bits", 8)]
        choices = [decision] + [_widened(decision, width) for width in widths]
        costs = [rounding_cost(c, weight, statistics[decision.site]) if free else 0.0 for c in choices]
        options.append([(stored_bits(c.weight, shape), cost, c) for c, cost in zip(choices, costs, strict=True)])
    return _buy(options, params.target_bits * weights)


def _widened(decision: LayerDecision, bits: int) -> LayerDecision:
    spec = WeightSpec(decision.weight.format, {**decision.weight.params, "bits": bits})
    return replace(decision, weight=spec, reason=f"{decision.reason}, {bits} bits by sensitivity")


def _buy(options: list[list[tuple[float, float, LayerDecision]]], budget: float) -> list[LayerDecision]:
    """Greedy: the step with the most cost saved for each bit, as long as it fits."""
    chosen = [0] * len(options)
    spent = sum(choices[0][0] for choices in options)
    while True:
        best, step = 0.0, None
        for index, choices in enumerate(options):
            bits, cost, _ = choices[chosen[index]]
            for wider in range(chosen[index] + 1, len(choices)):
                extra = choices[wider][0] - bits
                gain = (cost - choices[wider][1]) / extra
                if spent + extra <= budget and gain > best:
                    best, step = gain, (index, wider, extra)
        if step is None:
            return [choices[place][2] for choices, place in zip(options, chosen, strict=True)]
        chosen[step[0]] = step[1]
        spent += step[2]

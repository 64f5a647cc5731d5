"""Mixed formats under a budget of stored bits: the layers on which the output depends most get more of them.

The damage of a stored form is tr((W - Q) H (W - Q)^T) with rounding to nearest; H is weighted by the output's
sensitivity (calibration weighting "fisher"), so damages of different layers can be compared and added: their sum is
the expected relative error of the output. Which forms a linear may take is said by `widths` (other widths of its own
format) or `options` (any format, group and rank). `mean over all planned weights <= target_bits` holds for what is
stored, scales, zeros, factors and signs included. The choice is data: it is in the plan and the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..formats.base import StrictParams, resolve
from ..hadamard import signs
from ..plan import LayerDecision, WeightSpec
from ..runtime.scheme import Scheme
from ._knapsack import Choice, Point, hull, path
from ._low_rank import low_rank
from ._rounding import damped, objective
from .base import Layer

NEEDS = ("gram",)


class Option(StrictParams):
    """A stored form: keys of the weight (`format` and its parameters) and the rank of a low-rank part."""

    weight: dict[str, Any]
    rank: int = Field(0, ge=0)


class Params(StrictParams):
    """`target_bits`: mean stored bits per planned weight; `widths`: bits of the own format that a layer may get;
    `options`: other stored forms that it may get."""

    target_bits: float = Field(4.65, gt=1, le=16)
    widths: tuple[int, ...] = (5, 6, 8)
    options: tuple[Option, ...] = ()


def stored_bits(decision: LayerDecision, shape: tuple[int, int]) -> int:
    """Bits that a weight of `shape` takes, with everything stored beside it."""
    smooth = "none" if decision.smooth == "fold" else decision.smooth
    scheme = Scheme(decision.weight, decision.activation, smooth, decision.rank, decision.rotate)
    return sum(8 * torch.Size(size).numel() * dtype.itemsize for size, dtype in scheme.layout(shape).values())


def rounding_cost(decision: LayerDecision, weight: Tensor, statistics: Any) -> float:
    """Expected relative output error of rounding this weight to nearest in the decision's format."""
    fmt, params = resolve(decision.weight)
    sign = signs(weight.shape[1], 0) if decision.rotate else None
    layer = Layer(decision, weight.float(), statistics, sign=sign)
    gram, weight = layer.gram(), layer.effective_weight().float()
    hessian = damped(gram, 1e-6, layer.name) * gram.diagonal().mean()
    grid = fmt.fit(weight, params, hessian.diagonal().float())
    error = weight - fmt.value(fmt.code(weight, grid, params), grid, params)
    if decision.rank:
        up, down = low_rank(error, decision.rank, torch.Generator().manual_seed(0), damped(gram, 1e-4, layer.name))
        error = error - up.float() @ down.float()
    return objective(error, torch.zeros_like(error), hessian).sum().item()


def choices(
    decisions: Sequence[LayerDecision],
    read: Callable[[str], Tensor],
    statistics: Mapping[str, Any],
    params: Params,
) -> tuple[list[list[Choice]], int]:
    """The worthwhile stored forms of every linear, and the number of weights."""
    table, weights = [], 0
    for decision in decisions:
        weight = read(decision.site)
        shape = (weight.shape[0], weight.shape[1])
        weights += weight.numel()
        free = any(step.name == "mixed" for step in decision.steps)
        forms = [decision, *(_forms(decision, params, shape) if free else ())]
        found = [
            Choice(stored_bits(f, shape), rounding_cost(f, weight, statistics[f.site]) if free else 0.0, f)
            for f in forms
        ]
        table.append(hull(found))
    return table, weights


def choose(
    decisions: Sequence[LayerDecision],
    read: Callable[[str], Tensor],
    statistics: Mapping[str, Any],
    params: Params,
) -> list[LayerDecision]:
    """`decisions` with the forms that the budget allows; only those whose steps name `mixed` may change."""
    table, weights = choices(decisions, read, statistics, params)
    return chosen(table, path(table, params.target_bits * weights)[-1])


def chosen(table: Sequence[Sequence[Choice]], point: Point) -> list[LayerDecision]:
    """The decisions at one point of the path."""
    return [forms[place].decision for forms, place in zip(table, point.places, strict=True)]


def _forms(decision: LayerDecision, params: Params, shape: tuple[int, int]) -> list[LayerDecision]:
    forms = []
    for bits in params.widths if not params.options else ():
        if bits != decision.weight.params.get("bits", 8):
            spec = WeightSpec(decision.weight.format, {**decision.weight.params, "bits": bits})
            forms.append(replace(decision, weight=spec, reason=f"{decision.reason}, {bits} bits by sensitivity"))
    for option in params.options:
        keys = {key: value for key, value in option.weight.items() if key != "format"}
        spec = WeightSpec(str(option.weight.get("format", decision.weight.format)), dict(sorted(keys.items())))
        if option.rank <= min(shape) // 8:
            said = f"{decision.reason}, {spec.format}{keys.get('bits', '')} by sensitivity"
            forms.append(replace(decision, weight=spec, rank=option.rank, reason=said))
    return forms

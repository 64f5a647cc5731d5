"""Mixed formats under a budget of stored bits: the layers on which the output depends most get more of them.

The damage of a stored form is tr((W - Q) H (W - Q)^T) with rounding to nearest; H is weighted by the output's
sensitivity (calibration weighting "fisher"), so damages of different layers can be compared and added: their sum is
the expected relative error of the output. Which forms a linear may take is said by `widths` (other widths of its own
format) or `options` (any format, group and rank). `mean over all planned weights <= target_bits` holds for what is
stored, scales, zeros, factors and signs included. What is predicted of a budget is that damage times the share of it
that the step which rounds leaves, as measured on a few linears of the choice. The choice is data: it is in the plan and
the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..errors import DitcompressError
from ..formats.base import StrictParams
from ..measures import ratio_db
from ..plan import LayerDecision, Plan, TradeOff, WeightSpec
from ..runtime.scheme import Scheme
from ._damage import gain, rounding_cost
from ._knapsack import Choice, Point, hull, path

NEEDS = ("gram",)
HEADROOM_DB = 4.0  # what was measured lay 2 to 5 dB below what was predicted; doing it again costs more than bits


class Option(StrictParams):
    """A stored form: keys of the weight (`format` and its parameters) and the rank of a low-rank part."""

    weight: dict[str, Any]
    rank: int = Field(0, ge=0)


class Params(StrictParams):
    """`target_bits`: mean stored bits per planned weight; `target_db`: the least output SQNR that the statistics must
    predict, in place of a number of bits; `share`: the part of rounding to nearest's damage that is known to remain
    (None: estimated on a few linears of the choice); `widths`: bits of the own format that a layer may get; `options`:
    other stored forms that it may get."""

    target_bits: float = Field(4.65, gt=1, le=16)
    target_db: float | None = Field(None, gt=0, le=200)
    share: float | None = Field(None, gt=0)
    widths: tuple[int, ...] = (5, 6, 8)
    options: tuple[Option, ...] = ()


def stored_bits(decision: LayerDecision, shape: tuple[int, int]) -> int:
    """Bits that a weight of `shape` takes, with everything stored beside it."""
    smooth = "none" if decision.smooth == "fold" else decision.smooth
    scheme = Scheme(decision.weight, decision.activation, smooth, decision.rank, decision.rotate)
    return sum(8 * torch.Size(size).numel() * dtype.itemsize for size, dtype in scheme.layout(shape).values())


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
        known = statistics[decision.site] if free else None  # looked up once: it may move to a device
        found = [Choice(stored_bits(f, shape), rounding_cost(f, weight, known) if free else 0.0, f) for f in forms]
        table.append(hull(found))
    return table, weights


def choose(
    decisions: Sequence[LayerDecision],
    read: Callable[[str], Tensor],
    statistics: Mapping[str, Any],
    params: Params,
) -> Plan:
    """`decisions` with the forms that the budget allows, and the curve of what other budgets would give; only those
    whose steps name `mixed` may change. E202 names the nearest target where none meets it."""
    table, weights = choices(decisions, read, statistics, params)
    points = path(table)

    def gain_at(point: Point) -> float:
        chosen = [choices[place] for choices, place in zip(table, point.places, strict=True)]
        return gain(chosen, read, statistics)

    if params.target_db is None:
        found = path(table, params.target_bits * weights)[-1]
        reachable = found.bits <= params.target_bits * weights
        target, nearest = f"{params.target_bits:g} bits", f"{points[0].bits / weights:.2f} bits"
        share = gain_at(found) if reachable else 1.0
    else:
        found, share, reachable = _reaching(params.target_db, points, gain_at, params.share)
        target, nearest = f"{params.target_db:g} dB", f"{ratio_db(found.cost * share):.1f} dB"
    if not reachable:
        raise DitcompressError("E202", "mixed", f"no choice of formats meets {target}", f"the nearest is {nearest}")
    layers = [forms[place].decision for forms, place in zip(table, found.places, strict=True)]
    return Plan(tuple(layers), _curve([*points[:: max(1, len(points) // 16)], points[-1]], found, weights, share))


def _reaching(
    target: float, points: Sequence[Point], gain_at: Callable[[Point], float], known: float | None
) -> tuple[Point, float, bool]:
    """The cheapest point of the predicted dB, the share of its damage that the encoders leave, and whether it does
    reach; else the last point. Unless the share is `known`, the point follows from it and it from the point, so both
    are found twice, with some headroom."""

    def cheapest(share: float, headroom: float = HEADROOM_DB) -> Point:
        return next((p for p in points if ratio_db(p.cost * share) >= target + headroom), points[-1])

    if known is not None:
        found = cheapest(known, 0)
        return found, known, ratio_db(found.cost * known) >= target
    found = cheapest(1.0)
    for _ in range(2):
        share = gain_at(found)
        found = cheapest(share)
    return found, share, ratio_db(found.cost * share) >= target


def _curve(points: Sequence[Point], found: Point, weights: int, share: float) -> tuple[TradeOff, ...]:
    """Some points of the path and the chosen one, by falling budget."""

    def at(point: Point) -> TradeOff:
        return TradeOff(point.bits / weights, ratio_db(point.cost * share), ratio_db(point.cost), chosen=point is found)

    known = {(p.bits, p.cost): at(p) for p in (*points, found)}
    return tuple(known[key] for key in sorted(known))


def _forms(decision: LayerDecision, params: Params, shape: tuple[int, int]) -> list[LayerDecision]:
    forms = []
    for bits in params.widths if not params.options else ():
        if bits != decision.weight.params.get("bits", 8):
            spec = WeightSpec(decision.weight.format, {**decision.weight.params, "bits": bits})
            forms.append(replace(decision, weight=spec, reason=f"{decision.reason}, {bits} bits by sensitivity"))
    for option in params.options:
        keys = {key: value for key, value in option.weight.items() if key != "format"}
        spec = WeightSpec(str(option.weight.get("format", decision.weight.format)), dict(sorted(keys.items())))
        if (spec, option.rank) != (decision.weight, decision.rank) and option.rank <= min(shape) // 8:
            said = f"{decision.reason}, {spec.format}{keys.get('bits', '')} by sensitivity"
            forms.append(replace(decision, weight=spec, rank=option.rank, reason=said))
    return forms

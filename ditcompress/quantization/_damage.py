"""What rounding a weight costs: the expected relative error of the model's output, by the weighted Gram matrix of its
input (calibration weighting "fisher"). Rounding to nearest is cheap enough to be tried in every form; what the step
that will round leaves of its damage is measured on a few linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats.base import resolve
from ..hadamard import signs
from ..plan import LayerDecision
from ._knapsack import Choice
from ._low_rank import low_rank
from ._rounding import damped, objective
from .base import Layer, encoder_of, step_module

MOST = 2**18  # values of a weight that rounding to nearest is measured on
SAMPLE = 8  # linears that are encoded


def rounding_cost(decision: LayerDecision, weight: Tensor, statistics: Any) -> float:
    """Expected relative output error of rounding this weight to nearest in the decision's format; smoothing is left
    out."""
    fmt, params = resolve(decision.weight)
    most = MOST
    if hasattr(fmt, "draft"):  # fitting takes much longer than rounding
        params, most = fmt.draft(params), MOST // 4
    stride = max(1, weight.numel() // most)  # rows are independent: some of them tell enough of a large weight
    layer = _layer(decision, weight[::stride], statistics)
    gram, weight = layer.gram(), layer.effective_weight().float()
    hessian = _hessian(gram, layer.name)
    grid = fmt.fit(weight, params, hessian.diagonal().float())
    error = weight - fmt.value(fmt.code(weight, grid, params), grid, params)
    if decision.rank:
        up, down = low_rank(error, decision.rank, layer.generator, damped(gram, 1e-4, layer.name))
        error = error - up.float() @ down.float()
    return stride * _cost(error, hessian)


def encoded_cost(decision: LayerDecision, weight: Tensor, statistics: Any) -> float:
    """The same of the weight as its step rounds it, all of it."""
    layer = _layer(decision, weight, statistics)
    module, params = step_module(encoder_of(decision))
    error = layer.effective_weight().float() - module.encode(layer, params).dequantize()
    return _cost(error, _hessian(layer.gram(), layer.name))


def _layer(decision: LayerDecision, weight: Tensor, statistics: Any) -> Layer:
    sign = signs(weight.shape[1], 0) if decision.rotate else None
    return Layer(decision, weight.float(), statistics, sign=sign, generator=torch.Generator().manual_seed(0))


def _hessian(gram: Tensor, where: str) -> Tensor:
    return damped(gram, 1e-6, where) * gram.diagonal().mean()


def _cost(error: Tensor, hessian: Tensor) -> float:
    return objective(error, torch.zeros_like(error), hessian).sum().item()


def sampled(choices: Sequence[Choice], count: int = SAMPLE) -> list[tuple[Choice, int]]:
    """Those at `count` even distances along the sum of their costs, with how many of these places each one has: each
    place stands for as much damage."""
    total = sum(choice.cost for choice in choices)
    found: list[tuple[Choice, int]] = []
    passed, turn = 0.0, 0
    for choice in choices:
        passed, before = passed + choice.cost, turn
        while turn < count and passed > (turn + 0.5) / count * total:
            turn += 1
        if turn > before:
            found.append((choice, turn - before))
    return found


def gain(choices: Sequence[Choice], read: Callable[[str], Tensor], statistics: Mapping[str, Any]) -> float:
    """Damage of the encoders over damage of rounding to nearest, which is the choices' cost; 1 where nothing is
    damaged."""
    left, places = 0.0, 0
    for choice, times in sampled([c for c in choices if c.cost > 0]):
        site = choice.decision.site
        left += times * encoded_cost(choice.decision, read(site), statistics[site]) / choice.cost
        places += times
    return left / places if places else 1.0

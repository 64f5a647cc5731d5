"""What a decision's own rounding leaves of the damage that rounding to nearest would do, measured on a few linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hadamard import signs
from ..plan import LayerDecision
from ._knapsack import Choice
from ._rounding import damped, objective
from .base import Layer, encoder_of, step_module

SAMPLE = 8  # linears


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


def gain(
    choices: Sequence[Choice], read: Callable[[str], Tensor], statistics: Mapping[str, Any], cost: Callable[..., float]
) -> float:
    """Damage of the encoders over damage of rounding to nearest; 1 where nothing is damaged. `cost(decision, weight,
    statistics)` is the latter."""
    left, places = 0.0, 0
    for choice, times in sampled([c for c in choices if c.cost > 0]):
        decision = choice.decision
        known, weight = statistics[decision.site], read(decision.site)
        left += times * encoded_cost(decision, weight.float(), known) / cost(decision, weight, known)
        places += times
    return left / places if places else 1.0


def encoded_cost(decision: LayerDecision, weight: Tensor, statistics: Any) -> float:
    """Expected relative output error of this weight as its step rounds it; smoothing is left out."""
    sign = signs(weight.shape[1], 0) if decision.rotate else None
    layer = Layer(decision, weight, statistics, sign=sign, generator=torch.Generator().manual_seed(0))
    module, params = step_module(encoder_of(decision))
    error = layer.effective_weight().float() - module.encode(layer, params).dequantize()
    gram = layer.gram()
    hessian = damped(gram, 1e-6, layer.name) * gram.diagonal().mean()
    return objective(error, torch.zeros_like(error), hessian).sum().item()

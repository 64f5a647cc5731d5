"""HQ-DiT (Liu & Zhang, arXiv 2405.19751): the FP4 split of exponent and mantissa is chosen from the weight's spread.

s_w = quantile_0.999(|W|) / quantile_0.25(|W|) per output channel of the rotated weight; the format whose own ratio of
largest to smallest value is nearest to the mean log2 s_w wins (the implementable rule of the card; the paper gives the
ratio but not the quantiles). No official code exists. GPTQ on the float grid follows as a step of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..formats.base import StrictParams
from ..hadamard import signs
from ..plan import LayerDecision, WeightSpec
from .base import Layer

NEEDS: tuple[str, ...] = ()
SETS = "element"  # of the weight's format
LOG_RATIOS = {"e1m2": 2.81, "e2m1": 3.58, "e3m0": 6.0}  # log2 of largest / smallest positive value


class Params(StrictParams):
    """No parameters."""


def spread(weight: Tensor) -> float:
    """Mean over output channels of log2 of the 0.999 over the 0.25 quantile of |W|."""
    shares = torch.tensor([0.25, 0.999], device=weight.device)
    quantiles = torch.quantile(weight.float().abs(), shares, dim=1).clamp_min(1e-30)
    return float((quantiles[1] / quantiles[0]).log2().mean())


def element_for(weight: Tensor) -> str:
    """The FP4 element whose ratio is nearest to the weight's."""
    found = spread(weight)
    return min(LOG_RATIOS, key=lambda name: abs(found - LOG_RATIOS[name]))


def choose(
    decisions: Sequence[LayerDecision],
    read: Callable[[str], Tensor],
    statistics: Mapping[str, Any],
    params: Params,
) -> list[LayerDecision]:
    return [_chosen(d, read) if any(step.name == "hq_dit" for step in d.steps) else d for d in decisions]


def _chosen(decision: LayerDecision, read: Callable[[str], Tensor]) -> LayerDecision:
    weight = read(decision.site).float()
    sign = signs(weight.shape[1], 0) if decision.rotate else None
    element = element_for(Layer(decision, weight, sign=sign).effective_weight())
    spec = WeightSpec(decision.weight.format, {**decision.weight.params, "element": element})
    return replace(decision, weight=spec, reason=f"{decision.reason}, {element} by its spread")

"""ViDiT-Q's metric-decoupled mixed precision (Zhao et al., ICLR 2025, arXiv 2406.02540, section 4.3).

Linears form groups by what they act on: cross-attention the content, temporal attention the motion, self-attention and
feed-forward the picture. Every group of every block is rounded alone to the least bits and the metric of its group is
measured. The budget is split between groups by the squared error of the whole group, within a group by its metric, and
the most sensitive are widened until mean bits reach the target. The paper's metrics (CLIP score, VQA, ImageReward, CLIP
temporal) need downloads; here they are errors of the difference that the condition makes, of the guided output, and
of differences between frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import Tensor

from ..errors import DitcompressError
from ..formats.base import StrictParams, resolve
from ..hadamard import signs, unrotate
from ..plan import LayerDecision, WeightSpec
from ._runner import Runner
from .base import Layer

NEEDS: tuple[str, ...] = ()
SETS = "bits"  # of the weight's format
METRIC = {"cross": "text", "temporal": "time", "self": "quality", "ffn": "quality"}


class Params(StrictParams):
    """`bits` that a layer may get; `target_bits`: mean of the codes' bits over weights, scales not counted (as in the
    paper)."""

    bits: tuple[int, ...] = (4, 6, 8)
    target_bits: float = Field(6.0, gt=1, le=8)


def group_of(decision: LayerDecision) -> str:
    """ "cross", "temporal", "self" or "ffn"."""
    name = decision.site
    if "temp" in name:
        return "temporal"
    if decision.role in ("qkv", "attn_out"):
        return "cross" if ".attn2." in name or ".cross_attn" in name else "self"
    return "ffn"


def choose_measured(
    decisions: Sequence[LayerDecision], read: Callable[[str], Tensor], params: Params, runner: Runner
) -> list[LayerDecision]:
    """The decisions with the bits that each unit (a group in a block) has won."""
    units = _units(decisions)
    priority = _priorities(units, read, params, runner)
    sizes = {unit: sum(read(d.site).numel() for d in members) for unit, members in units.items()}
    level = spend(priority, sizes, params)
    bits = {d.site: params.bits[level[unit]] for unit, members in units.items() for d in members}
    return [_with_bits(d, bits[d.site]) if d.site in bits else d for d in decisions]


def spend(priority: Mapping[Any, float], sizes: Mapping[Any, int], params: Params) -> dict[Any, int]:
    """The level (index of `bits`) of each unit: the most sensitive for its size is widened first, level by level."""
    total, level = sum(sizes.values()), dict.fromkeys(sizes, 0)
    used = params.bits[0] * total
    if used > params.target_bits * total:
        raise DitcompressError(
            "E202", "vidit_mp", f"no choice of bits meets {params.target_bits:g}", f"the nearest is {params.bits[0]}"
        )
    order = sorted(sizes, key=lambda unit: (-priority[unit] / sizes[unit], unit))
    for step in range(1, len(params.bits)):
        for unit in order:
            more = (params.bits[step] - params.bits[step - 1]) * sizes[unit]
            if used + more <= params.target_bits * total and level[unit] == step - 1:
                level[unit], used = step, used + more
    return level


def _units(decisions: Sequence[LayerDecision]) -> dict[tuple[str, str], list[LayerDecision]]:
    """Linears of one group in one block."""
    found: dict[tuple[str, str], list[LayerDecision]] = {}
    for decision in decisions:
        if any(step.name == "vidit_mp" for step in decision.steps):
            block = ".".join(decision.site.split(".")[:2])
            found.setdefault((group_of(decision), block), []).append(decision)
    return found


def _priorities(
    units: Mapping[tuple[str, str], Sequence[LayerDecision]], read: Callable[[str], Tensor], params: Params,
    runner: Runner,
) -> dict[tuple[str, str], float]:  # fmt: skip
    """The squared error of a unit's whole group, shared among its units by the group's own metric."""
    rounded = {d.site: _rounded(d, read, params) for members in units.values() for d in members}
    own, whole = {}, {}
    for unit, members in units.items():
        effects = runner.effects({d.site: rounded[d.site] for d in members})
        own[unit] = effects.get(METRIC[unit[0]], effects["quality"])
    for group in {unit[0] for unit in units}:
        sites = [d.site for unit, members in units.items() if unit[0] == group for d in members]
        whole[group] = runner.effects({site: rounded[site] for site in sites})["quality"]
    sums = {group: sum(v for unit, v in own.items() if unit[0] == group) or 1.0 for group in whole}
    return {unit: whole[unit[0]] * value / sums[unit[0]] for unit, value in own.items()}


def _rounded(decision: LayerDecision, read: Callable[[str], Tensor], params: Params) -> Tensor:
    """The weight rounded to the least bits, rotated as it will be and back."""
    weight = read(decision.site).float()
    lowest = _with_bits(decision, params.bits[0])
    sign = signs(weight.shape[1], 0) if decision.rotate else None
    effective = Layer(lowest, weight, sign=sign).effective_weight()
    fmt, format_params = resolve(lowest.weight)
    grid = fmt.fit(effective, format_params)
    value = fmt.value(fmt.code(effective, grid, format_params), grid, format_params)
    return value if sign is None else unrotate(value, sign, decision.rotate)


def _with_bits(decision: LayerDecision, bits: int) -> LayerDecision:
    spec = WeightSpec(decision.weight.format, {**decision.weight.params, "bits": bits})
    return replace(decision, weight=spec, reason=f"{decision.reason}, {bits} bits by metric")

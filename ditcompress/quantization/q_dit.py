"""Q-DiT (Chen et al., CVPR 2025, arXiv 2406.17343): the group size of every layer, by evolutionary search.

Genes are group sizes, the same for weight and input of a layer; the mean may not fall below a limit. The official code
ranks a candidate by the FID of 800 images; here its fitness is the expected output error of rounding to nearest on the
calibration statistics, a sum over layers (the paper's own ablation puts search at the last 4 % of the gain).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import Tensor

from ..formats.base import StrictParams, resolve
from ..plan import LayerDecision, WeightSpec
from ._trial import trial
from .base import Layer

NEEDS = ("gram", "tokens")
SETS = "group"  # of the weight's format


class Params(StrictParams):
    """`groups` that a layer may have (those that divide its width); `mean`: least mean group size; the others as in
    the paper."""

    groups: tuple[int, ...] = (32, 64, 128, 192, 288)
    mean: float = Field(128, gt=1)
    population: int = Field(50, ge=4)
    keep: int = Field(10, ge=2)
    generations: int = Field(10, ge=0)
    mutation: float = Field(0.1, ge=0, le=1)
    tokens: int = Field(256, ge=8)


def choose(
    decisions: Sequence[LayerDecision],
    read: Callable[[str], Tensor],
    statistics: Mapping[str, Any],
    params: Params,
) -> list[LayerDecision]:
    tables = []
    for decision in decisions:
        if any(step.name == "q_dit" for step in decision.steps):
            weight, known = read(decision.site).float(), statistics[decision.site]
            forms = [with_group(decision, g) for g in allowed(weight.shape[1], params)]
            tables.append([(form, error(form, weight, known, params)) for form in forms])
        else:
            tables.append([(decision, 0.0)])
    genes = search([[e for _, e in table] for table in tables], [[_group(d) for d, _ in t] for t in tables], params)
    return [table[gene][0] for table, gene in zip(tables, genes, strict=True)]


def allowed(width: int, params: Params) -> list[int]:
    """Group sizes that divide the width; the width itself where none does."""
    return [g for g in params.groups if width % g == 0] or [width]


def with_group(decision: LayerDecision, group: int) -> LayerDecision:
    """The decision with this group size for weight and input."""
    spec = WeightSpec(decision.weight.format, {**decision.weight.params, "group": group})
    activation = replace(decision.activation, group=group) if decision.activation.mode == "token" else None
    said = f"{decision.reason}, group {group} by search"
    return replace(decision, weight=spec, activation=activation or decision.activation, reason=said)


def _group(decision: LayerDecision) -> int:
    return int(decision.weight.params.get("group", 128))


def error(decision: LayerDecision, weight: Tensor, statistics: Any, params: Params) -> float:
    """Relative output error of rounding weight and tokens to nearest."""
    measured = trial(Layer(decision, weight, statistics), params.tokens)
    fmt, format_params = resolve(decision.weight)
    grid = fmt.fit(weight, format_params)
    quantized = fmt.value(fmt.code(weight, grid, format_params), grid, format_params)
    return measured.error(quantized) / measured.output.square().sum().clamp_min(1e-30).item()


def search(errors: Sequence[Sequence[float]], groups: Sequence[Sequence[int]], params: Params) -> list[int]:
    """One choice a layer: the least total error with a mean group size of at least `params.mean`."""
    draw = random.Random(0)
    start = [_nearest(sizes, params.mean) for sizes in groups]

    def fits(genes: Sequence[int]) -> bool:
        least = min(params.mean, sum(max(s) for s in groups) / len(groups))  # narrow layers may not reach the mean
        return sum(s[g] for s, g in zip(groups, genes, strict=True)) / len(genes) >= least

    def fitness(genes: Sequence[int]) -> float:
        return sum(e[g] for e, g in zip(errors, genes, strict=True))

    def mutated(genes: Sequence[int]) -> list[int]:
        return [draw.randrange(len(e)) if draw.random() < params.mutation else g
                for e, g in zip(errors, genes, strict=True)]  # fmt: skip

    def offspring(make: Callable[[], list[int]], count: int) -> list[list[int]]:
        found = (make() for _ in range(20 * count))
        return [genes for genes in found if fits(genes)][:count]

    pool = [start, *offspring(lambda: mutated(start), params.population - 1)]
    for _ in range(params.generations):
        best = sorted(pool, key=fitness)[: params.keep]
        half = params.population // 2

        def crossed(best: list[list[int]] = best) -> list[int]:
            one, two = draw.choice(best), draw.choice(best)
            return [draw.choice(pair) for pair in zip(one, two, strict=True)]

        def changed(best: list[list[int]] = best) -> list[int]:
            return mutated(draw.choice(best))

        pool = [*best, *offspring(crossed, half), *offspring(changed, half)]
    feasible = [genes for genes in pool if fits(genes)] or [start]
    return min(feasible, key=fitness)


def _nearest(sizes: Sequence[int], mean: float) -> int:
    """The choice nearest to the mean from above, else the largest."""
    above = [place for place, size in enumerate(sizes) if size >= mean]
    return above[0] if above else max(range(len(sizes)), key=lambda place: sizes[place])

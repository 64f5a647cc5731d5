"""Prune-best (ours): depth and width together under one budget, by measured divisions or by a set that was learned.

Blocks go in the order of `oracle-greedy`; what they leave of the budget is taken from the width of all other blocks by
`obs-diff`, which refits what stays. Every division of the budget between the two is measured, weighted as the sampler
uses the prediction. Beside them stands a set of blocks that `tinyfusion` learns with the loss in the clean latents,
with what its adapters learned merged into the blocks that stay. The best of all on the measured inputs is made: with a
small budget width wins, with a large one the learned set does (three quarters of the embedded model's blocks: 10.3 dB
and 98 % of the classes right before any training, 9.8 dB and 45 % without it). Depth alone is one of the divisions, so
it is never worse than `oracle-greedy` on those inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from ..distill.noising import Noising
from ..errors import DitcompressError
from ..measures import ratio_db
from ..models import Depth, account, depth_of, shortened
from ..models.base import Axis
from ..structure import without_blocks
from . import oracle_greedy, tinyfusion
from ._learned import fits
from ._probes import spread
from .base import Context, ProbeParams, Scores, staying

NEEDS = ("probes", "training", "journal")
SENSITIVITY = "oracle-greedy"  # whose scores are shown where importance alone is asked for
MOST_WIDTH = 0.9


class Params(ProbeParams):
    """`divisions`: how many of the divisions are measured (0: all), spread evenly; `rounds` of `obs-diff` when they are
    compared; `updates` of the learned set (0: none is learned, nor where memory is too small to train) on `rows`
    states each."""

    divisions: int = Field(6, ge=0)
    rounds: int = Field(128, ge=1)
    updates: int = Field(400, ge=0)
    rows: int = Field(32, ge=1)

    def learned(self, clean: bool) -> tinyfusion.Params:
        """How the set is learned: to be kept, so ten times as fast as `tinyfusion` learns what it throws away."""
        return tinyfusion.Params(
            samples=self.samples, steps=self.steps, updates=self.updates, rows=self.rows, keep=True,
            loss="clean" if clean else "output", learning_rate=1e-3,
        )  # fmt: skip


def scores(context: Context, params: Params) -> Scores:
    """Damage of each single removal; the units of the best division or of the learned set are noted as `chosen`, with
    the new tensors of the latter."""
    single = oracle_greedy.scores(context, oracle_greedy.Params())
    error, chosen = _division(context, params, single)
    if not params.updates:
        return Scores(single.values, notes={"chosen": chosen})
    how = params.learned(_has_clean_latents(context))
    room = lambda: fits(context, params.rows * tinyfusion.state_bytes(context, how))  # noqa: E731
    if not context.remembered("room", [], room):  # memory may be another one when a killed run goes on
        return Scores(single.values, notes={"chosen": chosen})
    learned = tinyfusion.scores(context, how)
    units = tinyfusion.select(context, how, learned)
    tensors = staying(context, learned, units)
    own = damage(context, params, units, tensors) if _can_be(context, width(context, units)) else math.inf
    told = {"division_db": error, "learned_db": own}
    notes: dict[str, Any] = {name: ratio_db(value) if 0 < value < math.inf else None for name, value in told.items()}
    notes |= learned.notes
    if own < error:
        return Scores(single.values, notes={**notes, "chosen": units}, tensors=tensors)
    return Scores(single.values, notes={**notes, "chosen": chosen})


def _has_clean_latents(context: Context) -> bool:
    """Whether the scheduler says how a prediction and the clean latents belong together."""
    assert context.data is not None
    data = context.data(images=1)
    try:
        Noising(data.scheduler, data.adapter, data.config)
    except DitcompressError:
        return False
    return True


def select(context: Context, params: Params, scores: Scores) -> list[str]:
    """The blocks that were chosen; `width` tells the rest of a division."""
    return list(scores.notes["chosen"])


def _division(context: Context, params: Params, single: Scores) -> tuple[float, list[str]]:
    """The damage of the best division and the blocks that go in it."""
    order = oracle_greedy.select(context, oracle_greedy.Params(), single)
    prefixes = [order[: len(order) - k] for k in spread(len(order) + 1, params.divisions)]
    able = [units for units in prefixes if _can_be(context, width(context, units))]
    with context.reporter.task("divisions between depth and width", len(able)) as advance:
        found: list[tuple[float, int]] = []
        for units in able:
            error = context.remembered("division", units, lambda units=units: damage(context, params, units))  # type: ignore[misc]
            found.append((error, len(found)))
            advance(1)
    if not found:
        return math.inf, order
    error, place = min(found)
    return error, able[place]


def width(context: Context, units: Sequence[str]) -> float:
    """The share of heads and neurons of the blocks that stay which fills what `units` leave of the budget; 0 where
    that is less than half of a unit of width, infinite where they have not so much."""
    left = context.target - context.saved(units)
    gone = context.depth.of(units)
    narrowable = sum(cost for block, cost in _narrowable(context).items() if block not in gone)
    most = max((axis.size // axis.unit_size for axis in _axes(context)), default=1)
    if left <= narrowable / most / 2:
        return 0.0
    return left / narrowable if narrowable else float("inf")


def _can_be(context: Context, ratio: float) -> bool:
    """Whether so much of the width can go: not nearly all of it, and not all heads of an attention."""
    from .width import emptied

    return ratio <= MOST_WIDTH and emptied(_axes(context), ratio) is None


def _axes(context: Context) -> list[Axis]:
    from .width import cut_axes

    return cut_axes(context.layout, "both")


def _narrowable(context: Context) -> dict[str, float]:
    """The cost of each block that narrowing can take: its share of the parameters. Blocks that must stay cost as much
    for a parameter as the others do."""
    axes = {axis.name for axis in _axes(context)}
    touched = {s.name for s in context.layout.sites if axes & {*s.reads, *s.writes}}
    inside, total = dict.fromkeys(context.layout.blocks, 0), dict.fromkeys(context.layout.blocks, 0)
    for entry in account(context.model, context.layout):
        if entry.block:
            total[entry.block] += entry.params
            inside[entry.block] += entry.params if entry.name.rpartition(".")[0] in touched else 0
    rate = sum(context.costs.values()) / max(1, sum(total[b] for b in context.depth.of(context.names)))
    return {block: rate * count for block, count in inside.items()}


def damage(
    context: Context, params: Params, units: Sequence[str], tensors: Mapping[str, Tensor] | None = None
) -> float:
    """Share of the prediction's energy that is wrong without `units` and the width that fills the budget, with
    `tensors` rewritten."""
    from . import width as widths
    from .width import obs_diff

    ratio = width(context, units)
    if not ratio:
        return context.damage(units, tensors)
    references = context.references()
    config = {**dict(context.model.config), "_class_name": type(context.model).__name__}  # type: ignore[arg-type]
    blocks = context.depth.of(units)
    with context.rewritten(tensors or {}), without_blocks(context.model, context.depth, blocks) as model:
        layout = context.adapter.layout(model)
        depth = Depth((), {}, {}, depth_of(shortened(config, context.depth, blocks), layout).lists)
        inner = widths.Context(model, context.adapter, layout, depth, {}, 0.0, context.probes, context.seed,
                               context.reporter, ratio=ratio, config=config, _outputs=references)  # fmt: skip
        found = widths.narrowing(
            inner, obs_diff, widths.cut_axes(layout, "both"), obs_diff.Params(rounds=params.rounds)
        )
    assert found.damage is not None
    return found.damage

"""OBS-Diff: optimal brain surgeon on the linears after attention and activation (arXiv 2510.06751, without training).

C = sum over the sampler of w_t x x^T of a reader's input x. Removing the columns P and refitting the rest raises the
squared output error by tr(W_P ([C^-1]_PP)^-1 W_P^T). The units that raise it least go one after the other (neurons some
at a time), and what stays is compensated at once: W_K -= W_P ([C^-1]_PP)^-1 [C^-1]_PK. Heads that several linears read
are scored by the sum over all, so that both streams of a joint attention drop the same ones. Ours: tokens are counted
by how much the output depends on them (`weighting` output), so that errors of all blocks have one unit and `scope` can
be global; `weighting` timestep has the paper's weights, which fall logarithmically from 1.2 (first step) to 0.8. The
matrices C of some blocks are gathered, used and dropped before those of the next ones, in as many sweeps over the
recorded inputs as `hold` asks for; the result is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import Field
from torch import Tensor

from ...models.base import Axis
from ...offload import loaded
from ...surgeon import Surgeon, turns
from ..base import Probe
from ._axes import count_of
from ._refit import RefitParams, Weighting, all_readers, augmented, grams, refit, sweeps
from .base import Context, places

NEEDS = ("probes",)


class Params(RefitParams):
    """`rounds`: in how many parts all neurons of an axis go; `weighting` of tokens: output or timestep; `compensate`
    false leaves the weights that stay as they are."""

    rounds: int = Field(128, ge=1)
    weighting: Weighting = "output"
    compensate: bool = True


def scores(context: Context, axes: Sequence[Axis], params: Params) -> dict[str, Tensor]:
    """Error that a unit's removal adds when its turn comes, (units,) float64, never falling along the turns."""

    def one(part: Sequence[Axis]) -> dict[str, Tensor]:
        found = reader_grams(context, part, params.weighting)
        return {axis.name: removal(context, axis, found, params.damp, params.rounds) for axis in part}

    result: dict[str, Tensor] = {}
    for part in sweeps(context.layout, axes, params.hold):
        result |= one(part)
    return result


def rewrite(
    context: Context, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]], params: Params
) -> dict[str, Tensor]:
    """The readers' weights and biases, compensated."""
    return compensated(context, axes, kept, params.weighting, params) if params.compensate else {}


def compensated(
    context: Context, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]], weighting: Weighting,
    params: RefitParams,
) -> dict[str, Tensor]:  # fmt: skip
    """Weights and biases of every linear that reads one of `axes`, refitted on what is kept."""

    def one(part: Sequence[Axis]) -> dict[str, Tensor]:
        inside = {axis.name: kept[axis.name] for axis in part if axis.name in kept}
        return refit(context, inside, reader_grams(context, part, weighting), params.damp) if inside else {}

    result: dict[str, Tensor] = {}
    for part in reversed(sweeps(context.layout, axes, params.hold)):  # those of the last scores are still there
        result |= one(part)
    return result


def timestep_weight(step: int, steps: int) -> float:
    """The paper's weight of a sampler step: 1.2 at the first (noisiest), 0.8 at the last."""
    return 0.8 + (0.4 * math.log(steps - step) / math.log(steps) if steps > 1 else 0.4)


def reader_grams(context: Context, axes: Sequence[Axis], weighting: Weighting) -> Mapping[str, Tensor]:
    """C of every reader of `axes`; kept until those of others are asked for."""
    steps = 1 + max((probe.step for probe in context.probes), default=0)

    def scale(probe: Probe) -> float:
        return probe.weight if weighting == "output" else timestep_weight(probe.step, steps)

    readers = all_readers(context.layout, axes)
    key = (weighting, *(site.name for site in readers))
    if context.cache.get("grams of") != key:
        context.cache.pop("grams", None)  # before the next ones are made
        context.cache |= {"grams": grams(context, readers, weighting, scale), "grams of": key}
    return context.cache["grams"]  # type: ignore[no-any-return]


def removal(context: Context, axis: Axis, found: Mapping[str, Tensor], damp: float, rounds: int) -> Tensor:
    """Scores (units,) of one axis: the error of each unit in the greedy order, the last that is left infinite."""
    count, size = count_of(axis), axis.unit_size
    parts = []
    for name, start, _ in places(context.layout, axis):
        if name in found:
            with loaded(context.model, name, deep=False) as module:
                parts.append(Surgeon(augmented(module), found[name], damp, start))
    return turns(parts, count, size, 1 if size > 1 else max(1, count // rounds))

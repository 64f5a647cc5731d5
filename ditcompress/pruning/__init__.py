"""Depth pruning: which blocks a model can do without. One file a method; `choose` runs one and checks what it chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from ..errors import DitcompressError
from ._costs import MEASURES, operations, parameters, seconds, unit_costs
from ._probes import record_probes
from .base import Context, Probe, ProbeParams, Scores, lowest_first, method, registry, staying

__all__ = [
    "MEASURES", "Choice", "Context", "Probe", "ProbeParams", "Scores", "check_target", "choose",
    "method", "operations", "parameters", "record_probes", "registry", "seconds",
    "unit_costs",
]  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """`units` in the order in which the method gave them up, their `blocks` in forward order, every unit's scores, and
    the share of all blocks' cost that goes. `damage`: share of the prediction's energy that is wrong afterwards,
    weighted as the sampler uses it, or None where the model was not run. `tensors`: new values, by their old names.
    `shared`: for a module's old path that of the module which takes its place. `width_ratio`: the share of heads and
    neurons that has to go as well."""

    units: tuple[str, ...]
    blocks: tuple[str, ...]
    scores: Scores
    saved: float
    damage: float | None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    width_ratio: float = 0.0


def check_target(context: Context, ratio: float, total: float) -> None:
    """E203 where even all units that may go save less than asked; E205 where none may go."""
    if not context.names:
        why = next(iter(context.depth.fixed.values()), "it has no blocks")
        raise DitcompressError("E205", type(context.model).__name__, f"no block can go: {why}", "quantize it instead")
    most: list[str] = []
    while left := list(context.removable(most)):
        most.append(left[0])
    if not context.enough(most):
        what = f"leaves no block; at most {context.saved(most) / total:.3f} can go"
        raise DitcompressError("E203", f"--ratio {ratio:g}", what, "give a smaller ratio")


def choose(context: Context, module: ModuleType, params: Any, total: float) -> Choice:
    """Run a method. `total` is the cost of all blocks. E203 where its own rules keep too much for the target."""
    scores: Scores = module.scores(context, params)
    picked: Sequence[str] = module.select(context, params, scores) if hasattr(module, "select") else ()
    if not hasattr(module, "select"):
        picked = lowest_first(context, scores)
    narrower = module.width(context, picked) if hasattr(module, "width") else 0.0
    if not narrower:
        _check(context, module, picked)
    blocks = context.depth.of(picked)
    tensors = staying(context, scores, picked)
    tensors |= dict(module.rewrite(context, params, picked)) if hasattr(module, "rewrite") else {}
    shared = dict(module.share(context, params, picked)) if hasattr(module, "share") else {}
    damage = context.damage(picked, tensors | _copies(context, shared, tensors)) if context.probes else None
    damage = module.damage(context, params, picked, tensors) if narrower else damage
    saved = context.target if narrower else context.saved(picked)
    return Choice(tuple(picked), blocks, scores, saved / total, damage, tensors, shared, narrower)


def _copies(context: Context, shared: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the tensors of the modules in `shared` become, by name."""
    found = {}
    for copy, owner in shared.items():
        for name, tensor in context.model.get_submodule(owner).state_dict().items():
            found[f"{copy}.{name}"] = tensors.get(f"{owner}.{name}", tensor).clone()
    return found


def _check(context: Context, module: ModuleType, picked: Sequence[str]) -> None:
    name = module.__name__.rpartition(".")[2]
    if len(set(picked)) != len(picked) or not set(picked) <= set(context.names):
        raise TypeError(f"{name} must select every unit at most once, and known ones only")
    if not context.enough(picked):
        what = "keeps so many blocks that the ratio cannot be reached"
        raise DitcompressError("E203", f"--method {name}", what, "give a smaller ratio or another method")

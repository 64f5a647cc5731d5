"""Feed-forwards become one linear, fitted by least squares (PPCL, arXiv 2511.16156, its width stage).

P and b of y = P x + b give a feed-forward's output y from its input x over all tokens of the model's own sampler
steps: one solution of normal equations that are summed over all of them, with a ridge towards 0, which leaves the
feed-forward out. By `weighting` output, a token counts as much as the prediction depends on what its feed-forward
gives, gates included. The feed-forward goes whose linear hurts the prediction least for what it saves, measured; then
the others are measured again beside it, until a share --width-ratio of the feed-forwards' parameters is gone. No
neuron of the others goes, and no head.

The paper's linear also stands for the norm and the modulation before the feed-forward, in a block written anew for one
model, its layers are given by number, and it fits text streams too. Here norm and modulation stay, so that every model
whose feed-forwards are modules of their own can run it; text streams keep their attention. Training follows by
`distill`; the paper's is 2000 steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...calibration.sensitivity import token_weights
from ...errors import DitcompressError
from ...experts import convertible
from ...linear_ffn import blank, standing_in
from ...models.base import Axis
from ...offload import device_of
from ...structure import readers, writers
from ...surgeon import damped
from ..base import Probe, ProbeParams
from ._axes import count_of
from ._refit import CHUNK, batched
from .base import Context

NEEDS = ("probes", "journal")


class Params(ProbeParams):
    """`ridge` in units of the mean diagonal of the inputs' Gram matrix; `weighting` of tokens: output or none;
    `hold`: MiB of normal equations in memory at a time, at least those of one feed-forward; `again`: whether the others
    are measured again after each choice (n + (n - 1) + ... sweeps instead of n)."""

    samples: int = Field(24, ge=1, le=100_000)
    ridge: float = Field(1e-4, gt=0)
    weighting: Literal["output", "none"] = "output"
    hold: int = Field(1024, ge=0)
    again: bool = True


@dataclass
class Sums:
    """Normal equations of one feed-forward, float64: sum of w [x, 1] [x, 1]^T and of w [x, 1] y^T."""

    gram: Tensor
    cross: Tensor

    @staticmethod
    def of(width: int, out: int, device: torch.device) -> Sums:
        kind: dict[str, Any] = {"dtype": torch.float64, "device": device}
        return Sums(torch.zeros(width + 1, width + 1, **kind), torch.zeros(width + 1, out, **kind))

    def add(self, x: Tensor, y: Tensor, weight: Tensor | float = 1.0) -> None:
        """Tokens x (n, width), y (n, out), with weights (n, 1) or one for all."""
        wide = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
        weighed = wide * weight
        self.gram += weighed.T @ wide
        self.cross += weighed.T @ y.double()

    def solve(self, ridge: float) -> Tensor:
        """[P, b]^T (width + 1, out)."""
        return torch.linalg.solve(damped(self.gram, ridge), self.cross)

    @torch.no_grad()
    def fill(self, linear: nn.Linear, ridge: float) -> None:
        """Give `linear` (width to out) the solution as its weight and bias."""
        solved = self.solve(ridge)
        linear.weight.copy_(solved[:-1].T)
        linear.bias.copy_(solved[-1])


def scores(context: Context, axes: Sequence[Axis], params: Params) -> dict[str, Tensor]:
    """The damage of each feed-forward's linear alone, the same for all neurons (units,); infinite for other axes."""
    found = {axis.name: torch.full((count_of(axis),), torch.inf, dtype=torch.float64) for axis in axes}
    for path, damage in _singles(context, axes, params).items():
        found[_places(context, axes)[path]].fill_(damage)
    return found


def linear(context: Context, axes: Sequence[Axis], params: Params) -> dict[str, nn.Linear]:
    """The linears by path, in the order in which they were chosen. E205 where no feed-forward is a module of its own,
    E203 where all of them save less than asked."""
    places, fits = _places(context, axes), _fits(context, axes, params)
    if not places:
        what = "has no feed-forward that is a module of its own"
        raise DitcompressError("E205", type(context.model).__name__, what, "use another --width-method or units")
    before = {path: _count(context.model.get_submodule(path)) for path in places}
    saves = {path: before[path] - _count(fits[path]) for path in places}
    target, small = context.ratio * sum(before.values()), min(saves.values())
    if sum(saves.values()) < target - small / 2:
        most = sum(saves.values()) / sum(before.values())
        what = f"linears save at most {most:.3f} of the feed-forwards"
        raise DitcompressError("E203", f"--width-ratio {context.ratio:g}", what, "give a smaller ratio")
    chosen: list[str] = []
    trials, damage = dict(_singles(context, axes, params)), 0.0
    with context.reporter.task("feed-forwards that become linear", len(places)) as advance:
        while (saved := sum(saves[path] for path in chosen)) < target - small / 2:
            left = [p for p in places if p not in chosen and saved + saves[p] / 2 <= target * (1 + 1e-9)]
            if not left:
                break
            if chosen and params.again:
                trials = {path: _damage(context, {p: fits[p] for p in (*chosen, path)}) for path in left}
            start = damage if params.again else 0.0
            best = min(left, key=lambda path: (trials[path] - start) / saves[path])
            chosen.append(best)
            damage = trials[best]
            advance(1)
    return {path: fits[path] for path in chosen}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _places(context: Context, axes: Sequence[Axis]) -> dict[str, str]:
    """Path and axis of every feed-forward that may go."""
    names = {axis.name for axis in axes}
    return {path: axis for path, axis in convertible(context.model, context.layout).items() if axis in names}


def _damage(context: Context, modules: Mapping[str, nn.Module]) -> float:
    context.references()  # of the model as it is

    def measure() -> float:
        with standing_in(context.model, modules):
            return context.damage(())

    return float(context.remembered("linear", list(modules), measure))


def _singles(context: Context, axes: Sequence[Axis], params: Params) -> Mapping[str, float]:
    """The damage of each linear alone; measured once for a context."""
    if "linear singles" not in context.cache:
        fits, found = _fits(context, axes, params), {}
        with context.reporter.task("single linears", len(fits)) as advance:
            for path, fit in fits.items():
                found[path] = _damage(context, {path: fit})
                advance(1)
        context.cache["linear singles"] = found
    return context.cache["linear singles"]  # type: ignore[no-any-return]


def _fits(context: Context, axes: Sequence[Axis], params: Params) -> Mapping[str, nn.Linear]:
    """The fitted linear of every feed-forward; made once for a context."""
    if "linear fits" not in context.cache:
        places, found = _places(context, axes), dict[str, nn.Linear]()
        for part in batched(_sizes(context, places).items(), params.hold * 2**20):
            found |= _fitted(context, {path: places[path] for path in part}, params)
        context.cache["linear fits"] = found
    return context.cache["linear fits"]  # type: ignore[no-any-return]


def _sizes(context: Context, places: Mapping[str, str]) -> dict[str, int]:
    """Bytes of the normal equations of each feed-forward."""
    sites = {path: readers(context.layout, axis)[0] for path, axis in places.items()}
    inputs = {path: writers(context.layout, axis)[0].in_features + 1 for path, axis in places.items()}
    return {path: 8 * wide * (wide + sites[path].out_features) for path, wide in inputs.items()}


def _fitted(context: Context, places: Mapping[str, str], params: Params) -> dict[str, nn.Linear]:
    """The solutions of normal equations that are gathered in one sweep."""
    found = {}
    for path, sums in _sums(context, places, params).items():
        found[path] = blank(context.model, context.layout, places[path])
        sums.fill(found[path], params.ridge)
    return found


def _sums(context: Context, places: Mapping[str, str], params: Params) -> dict[str, Sums]:
    """Normal equations over all probes; a step counts as the sampler uses it."""
    device = device_of(context.model)
    found = {}
    for path, axis in places.items():
        fit = blank(context.model, context.layout, axis)
        found[path] = Sums.of(fit.in_features, fit.out_features, device)
    even = not any(probe.weight for probe in context.probes)
    with context.reporter.task("normal equations", len(context.probes)) as advance:
        for number, probe in enumerate(context.probes):
            for start in range(0, len(probe.latents), CHUNK):
                part = probe.rows(slice(start, start + CHUNK))
                for path, x, y, weight in _seen(context, places, part, params, 1009 * (context.seed + number) + start):
                    found[path].add(x, y, weight * (1.0 if even else probe.weight))
            advance(1)
    return found


def _seen(
    context: Context, places: Mapping[str, str], probe: Probe, params: Params, seed: int
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(path, inputs (n, width), outputs (n, out), weights (n, 1)) of every call of a feed-forward."""
    sites = {path: readers(context.layout, axis)[0] for path, axis in places.items()}
    weights: Mapping[str, Sequence[tuple[Tensor, Tensor]]] = {}
    with _watched(context.model, places) as calls:
        if params.weighting == "output":
            # each reader's input as one of its own, so that its tokens have weights of their own
            alone = replace(context.layout, sites=tuple(replace(site, reads=("",)) for site in sites.values()))
            device = device_of(context.model)
            latents, timestep = probe.latents.to(device), probe.timestep.to(device)
            weights = token_weights(context.model, context.adapter, alone, latents, timestep, probe.cond, seed)
        else:
            with torch.no_grad():
                context.predict(probe)
    for path, pairs in calls.items():
        given = weights.get(f"{sites[path].name}:in", ())
        for place, (x, y) in enumerate(pairs):
            one = given[place][1].reshape(-1, 1).double() if weights else x.new_ones(len(x), 1).double()
            yield path, x, y, one


@contextmanager
def _watched(model: nn.Module, paths: Mapping[str, str]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """What goes into the modules at `paths` and comes out of them inside, tokens first."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            calls[path].append((x.detach().flatten(0, -2), output.detach().flatten(0, -2)))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path), with_kwargs=True) for path in paths]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()

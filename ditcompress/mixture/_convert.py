"""A method applied to every feed-forward of a model, one layer at a time: expert modules with their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..console import Reporter, Silent
from ..distill.data import Trajectories
from ..errors import DitcompressError
from ..experts import ExpertLayer, build, convertible
from ..models.base import Layout
from ..runtime.moe import Choice, Gate, MoEFeedForward
from ..structure import feed_forward_path, readers, writers
from ._weighed import Weighed
from .base import FeedForward, Split


def specs_for(
    model: nn.Module, layout: Layout, slices: int, shared: int, active: int, gate: Gate = "one", offset: bool = False,
    copies: bool = False, choice: Choice = "token",
) -> dict[str, ExpertLayer]:  # fmt: skip
    """The layer of every feed-forward whose neurons are cut into `slices` equal parts: `shared` of them always on, the
    others one expert each, `active` of which run; with `copies` each expert holds all of these others.

    E203 for numbers that do not fit, E205 for a model without any."""
    if not 0 <= shared < slices:
        raise DitcompressError("E203", f"--shared {shared}", f"leaves no routed one of {slices}", "give fewer")
    if not 0 <= active <= slices - shared or shared + active == 0:
        what = f"{slices - shared} of {slices} experts are routed, {active} cannot run"
        raise DitcompressError("E203", f"--active {active}", what, f"give {0 if shared else 1} to {slices - shared}")
    found = {}
    for path, size in neurons_of(model, layout).items():
        if size % slices:
            near = [n for n in range(shared + max(active, 1), size) if size % n == 0]
            nearest = min(near, key=lambda n: abs(n - slices), default=1)
            what = f"does not divide the {size} neurons of {path}"
            raise DitcompressError("E203", f"--experts {slices}", what, f"give for example {nearest}")
        width = size // slices
        own = (slices - shared) * width if copies else width
        found[path] = ExpertLayer(shared * width, slices - shared, own, active, gate, offset, copies, choice)
    return found


def neurons_of(model: nn.Module, layout: Layout) -> dict[str, int]:
    """The number of neurons of every feed-forward that can become experts; E205 for a model without any."""
    axes = convertible(model, layout)
    if not axes:
        raise DitcompressError(
            "E205", type(model).__name__, "has no feed-forward that is a module of its own", "see `ditcompress inspect`"
        )
    return {path: layout.axes[axis].size for path, axis in axes.items()}


def hidden_of(dense: nn.Module, output: nn.Module, tokens: Tensor) -> Tensor:
    """The input (T, H) of the output linear when the feed-forward reads tokens (T, D)."""
    seen: list[Tensor] = []
    handle = output.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().float()))
    try:
        with torch.no_grad():
            dense(tokens)
    finally:
        handle.remove()
    return seen[0]


def neuron_importance(
    model: nn.Module, layout: Layout, axes: Mapping[str, str], data: Trajectories, *, batches: int, size: int, seed: int
) -> dict[str, Tensor]:
    """Taylor score (H,) of every neuron by path: sum over its weights of |dL/dw * w|, summed over batches.

    L is <v, y / |y|> with a random direction v for each batch: the first-order change of a distillation loss whose
    target is a perturbed output, because against the model's own output every gradient is zero.
    """
    sites = {path: (*writers(layout, axis), *readers(layout, axis)) for path, axis in axes.items()}
    linears = {s.name: model.get_submodule(s.name) for group in sites.values() for s in group}
    scores = {path: torch.zeros(layout.axes[axis].size) for path, axis in axes.items()}
    parameters = [p for linear in linears.values() for p in linear.parameters()]
    before = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for number in range(batches):
            batch = data.batch(number, size)
            direction = torch.Generator().manual_seed(seed + number)
            with torch.enable_grad():
                y = data.adapter.predict(model, batch.latents, batch.timestep, batch.cond).float().flatten(1)
                v = torch.randn(y.shape, generator=direction).to(y.device)
                (v * y / y.detach().norm(dim=1, keepdim=True)).sum().backward()
            for path, axis in axes.items():
                scores[path] += _taylor(layout, axis, linears)
            for parameter in parameters:
                parameter.grad = None
    finally:
        for parameter, wanted in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)
    return scores


def head_importance(
    model: nn.Module, layout: Layout, axes: Mapping[str, str], data: Trajectories, *, batches: int, size: int, seed: int
) -> dict[str, Tensor]:
    """Taylor score (heads,) of every head by path: the sum over its channels' (see `neuron_importance`)."""
    scores = neuron_importance(model, layout, axes, data, batches=batches, size=size, seed=seed)
    return {path: score.reshape(-1, layout.axes[axes[path]].unit_size).sum(1) for path, score in scores.items()}


def _taylor(layout: Layout, axis: str, linears: Mapping[str, Any]) -> Tensor:
    """Scores (H,) of one axis from the gradients that are there; gated layers write the axis more than once."""
    size = layout.axes[axis].size
    total = torch.zeros(size)
    for site in writers(layout, axis):
        linear = linears[site.name]
        for parameter in (linear.weight, linear.bias):
            if parameter is not None and parameter.grad is not None:
                part = (parameter.grad * parameter.detach()).abs().reshape(len(parameter), -1).sum(1)
                total += part.reshape(-1, size).sum(0).float().cpu()
    for site in readers(layout, axis):
        weight = linears[site.name].weight
        if weight.grad is not None:
            total += (weight.grad * weight.detach()).abs().sum(0).float().cpu()
    return total


def seed_of(seed: int, name: str) -> int:
    """A seed for one part of a model."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def _layer(
    model: nn.Module, layout: Layout, axis: str, path: str, spec: ExpertLayer, tokens: Mapping[str, Tensor],
    weights: Mapping[str, Tensor], seed: int,
) -> FeedForward:  # fmt: skip
    (out,) = readers(layout, axis)
    output: nn.Module = model.get_submodule(out.name)
    weight: Tensor = output.weight  # type: ignore[assignment]
    given = tokens.get(path)
    given = torch.zeros(1, weight.shape[0]) if given is None else given
    given = given.to(weight.device)
    return FeedForward(
        path, spec, weight.detach().float(), given.float(),
        hidden_of(model.get_submodule(path), output, given.to(weight.dtype)) if path in tokens
        else torch.zeros(1, weight.shape[1], device=weight.device),
        None, torch.Generator().manual_seed(seed_of(seed, path)),
        weights[path].to(weight.device) if path in weights else None,
    )  # fmt: skip


def prepared(
    model: nn.Module, layout: Layout, specs: Mapping[str, ExpertLayer], method: ModuleType, params: Any,
    weighed: Mapping[str, Weighed], *, seed: int = 0, reporter: Reporter | None = None,
) -> tuple[dict[str, ExpertLayer], dict[str, Any]]:  # fmt: skip
    """What a method that has `prepare` measures of every path in `specs`, and the entries that follow from it."""
    axes, found = convertible(model, layout), {}
    tokens, weights = ({p: getattr(w, name) for p, w in weighed.items()} for name in ("tokens", "weights"))
    with (reporter or Silent()).task("measure", len(specs)) as advance:
        for path, spec in specs.items():
            layer = _layer(model, layout, axes[path], path, spec, tokens, weights, seed)
            found[path] = method.prepare(layer, params)
            advance(1)
    return method.sized(specs, found, params), found


def convert(
    model: nn.Module, layout: Layout, specs: Mapping[str, ExpertLayer], method: ModuleType, params: Any,
    tokens: Mapping[str, Tensor], importance: Mapping[str, Tensor], *, weights: Mapping[str, Tensor] | None = None,
    measured: Mapping[str, Any] | None = None, seed: int = 0, reporter: Reporter | None = None,
) -> dict[str, MoEFeedForward]:  # fmt: skip
    """The expert layer of every path in `specs`. `tokens` (T, D) are inputs of the feed-forwards by path (empty where
    the method needs none), `importance` (H,) scores of their neurons, `weights` (T,) the costs of errors, `measured`
    what `prepared` gave. The model is left as it is."""
    axes, found = convertible(model, layout), {}
    with (reporter or Silent()).task("experts", len(specs)) as advance:
        for path, spec in specs.items():
            layer = _layer(model, layout, axes[path], path, spec, tokens, weights or {}, seed)
            score = importance[path].to(layer.down.device) if path in importance else None
            layer = replace(layer, importance=score, prepared=(measured or {}).get(path))
            split = method.split(layer, params)
            if not all(bool(torch.isfinite(t).all()) for t in (split.router_weight, split.router_bias)):
                raise DitcompressError("E701", path, "the router is not finite", "calibrate with more samples")
            found[path] = _filled(model, layout, axes[path], spec, split)
            advance(1)
    return found


def _filled(model: nn.Module, layout: Layout, axis: str, spec: ExpertLayer, split: Split) -> MoEFeedForward:
    """The expert layer with the router and the offsets of `split`."""
    groups = [own.tolist() for own in split.experts] if spec.of else None
    moe = build(model, layout, axis, spec, None if spec.of else split.order, groups)
    (out,) = readers(layout, axis)
    inner = out.name[len(feed_forward_path(model, axis, layout)) + 1 :]
    parts: list[tuple[nn.Module, Tensor]] = [(moe.shared, split.shared)] if moe.shared is not None else []
    with torch.no_grad():
        moe.router.weight.copy_(split.router_weight)
        moe.router.bias.copy_(split.router_bias)
        if split.down is not None:
            for part, own in [*parts, *zip(moe.experts, split.experts, strict=True)]:
                part.get_submodule(inner).weight.copy_(split.down[:, own])  # type: ignore[union-attr, operator]
        for expert, down in zip(moe.experts, split.downs, strict=True) if split.downs is not None else ():
            expert.get_submodule(inner).weight.copy_(down)  # type: ignore[union-attr, operator]
        if split.offsets is not None:
            assert moe.bias is not None
            moved = split.offsets.double().sum(0) + (0 if split.shift is None else split.shift.double())
            moe.bias.copy_((moe.bias.double() + moved).to(moe.bias.dtype))
            for expert, offset in zip(moe.experts, split.offsets, strict=True):
                expert.get_submodule(inner).bias.copy_(-offset)  # type: ignore[union-attr, operator]
    return moe.eval()

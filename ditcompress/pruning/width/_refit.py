"""Least squares for the linears that read a narrowed axis: what they read is left gives what they read before.

A reader y = W x + b whose columns P go keeps K. With C = sum of w x x^T over tokens with weights w, the weight that
changes the output least is W' = W C[:, K] (C[K, K])^-1; where the reader has a bias, x carries a constant 1 that stays,
so that the bias takes up the mean of what went. This equals the compensation of optimal brain surgeon for all of P at
once. Shapes: K columns, with bias K + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ...calibration.sensitivity import See, see_token_weights
from ...errors import DitcompressError
from ...models.base import Axis, Layout, Site
from ...offload import device_of, loaded
from ...structure import narrow_index, readers
from ...surgeon import refitted
from ..base import Probe, ProbeParams
from ._axes import Scope
from .base import Context, WidthParams

Weighting = Literal["timestep", "output"]
Item = TypeVar("Item")
CHUNK = 8  # images of a backward pass at once


class RefitParams(ProbeParams, WidthParams):
    """`damp`: share of the mean diagonal added to C, towards the old weight; `hold`: MiB of Gram matrices in memory at
    a time, at least those of one block (less memory means more sweeps over the recorded inputs)."""

    samples: int = Field(24, ge=1, le=100_000)
    damp: float = Field(0.001, ge=0)
    scope: Scope = "global"
    hold: int = Field(1024, ge=0)


def batched(parts: Iterable[tuple[Item, int]], most: int) -> list[list[Item]]:
    """Items with their bytes in consecutive groups of at most `most` bytes, or of one item that is larger."""
    groups: list[list[Item]] = []
    held = 0
    for item, size in parts:
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += size
    return groups


def sweeps(layout: Layout, axes: Sequence[Axis], hold: int) -> list[list[Axis]]:
    """`axes` in the groups whose Gram matrices are in memory together: consecutive blocks, of no more than `hold` MiB
    or than the largest block has."""
    by_block: dict[str, list[Axis]] = {}
    for axis in axes:
        by_block.setdefault(readers(layout, axis.name)[0].block, []).append(axis)
    sizes = {block: sum(8 * (site.in_features + 1) ** 2 for site in all_readers(layout, inside))
             for block, inside in by_block.items()}  # fmt: skip
    most = max(hold * 2**20, max(sizes.values(), default=0))
    return [[axis for block in group for axis in by_block[block]] for group in batched(sizes.items(), most)]


def all_readers(layout: Layout, axes: Sequence[Axis]) -> list[Site]:
    """Every linear that reads one of `axes`, once, in forward order."""
    names = {site.name for axis in axes for site in readers(layout, axis.name)}
    return [site for site in layout.sites if site.name in names]


def augmented(module: nn.Module) -> Tensor:
    """Weight and bias of a linear side by side, (rows, K + 1) or (rows, K), float64."""
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    parts = [weight.detach().double()] if bias is None else [weight.detach().double(), bias.detach().double()[:, None]]
    return torch.cat(parts, dim=1)


def with_one(x: Tensor, module: nn.Module) -> Tensor:
    """Tokens (n, K) float64, with the constant where the reader has a bias."""
    x = x.detach().reshape(-1, x.shape[-1]).double()
    return x if getattr(module, "bias", None) is None else torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def grams(
    context: Context, sites: Sequence[Site], weighting: Weighting, scale: Callable[[Probe], float]
) -> dict[str, Tensor]:
    """C of every reader by name, float64, over all probes times `scale`. Weighting "output" counts a token by how much
    the model's output depends on what the reader makes of it (calibration/sensitivity.py)."""
    modules = {site.name: context.model.get_submodule(site.name) for site in sites}
    found: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, weight: Tensor | float) -> None:
        tokens = with_one(x, modules[name])
        w = weight.reshape(-1, 1).double() if isinstance(weight, Tensor) else weight
        product = tokens.T @ (tokens * w)
        found[name] = found[name] + product if name in found else product

    alone = replace(context.layout, sites=tuple(replace(site, reads=("",)) for site in sites))  # of each its own
    for number, probe in enumerate(context.probes):
        factor = scale(probe)
        if weighting == "output":
            for start in range(0, len(probe.latents), CHUNK):
                seed = 1009 * (context.seed + number) + start
                part = probe.rows(slice(start, start + CHUNK))
                _weighed(context, alone, part, seed, lambda name, x, w, factor=factor: add(name, x, w * factor))  # type: ignore[misc]
        else:
            with torch.no_grad(), listening(modules, lambda name, x, factor=factor: add(name, x, factor)):  # type: ignore[misc]
                context.predict(probe)
    for name, gram in found.items():
        if not bool(gram.isfinite().all()):
            raise DitcompressError("E701", name, "its input is not finite", "use --dtype float32, or `inspect` it")
    return found


def _weighed(context: Context, alone: Layout, probe: Probe, seed: int, see: See) -> None:
    """`see` (reader, input, token weights) for one backward pass; in `alone` no two readers share an input."""
    names = {site.input_key: site.name for site in alone.sites}
    device = device_of(context.model)
    latents, timestep = probe.latents.to(device), probe.timestep.to(device)
    see_token_weights(
        context.model, context.adapter, alone, latents, timestep, probe.cond, seed, None,
        lambda key, x, weight: see(names[key], x, weight),
    )  # fmt: skip


@contextmanager
def listening(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Any:
    """`see(name, input)` whenever one of the modules runs."""
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: see(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kept_columns(context: Context, kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The columns (K',) that each reader keeps, the place of the bias not among them."""
    return {site.name: index for site, dim, index in narrow_index(context.layout, kept) if dim == 1}


def refit(
    context: Context, kept: Mapping[str, Sequence[int]], found: Mapping[str, Tensor], damp: float
) -> dict[str, Tensor]:
    """New weights and biases of every reader that loses columns, in their old shapes."""
    tensors = {}
    for name, index in kept_columns(context, kept).items():
        if name not in found:  # it never ran
            continue
        with loaded(context.model, name, deep=False) as module:
            target = augmented(module)
        columns = index.to(target.device)
        size = int(module.weight.shape[1])  # type: ignore[index, union-attr, arg-type]
        if target.shape[1] > size:
            columns = torch.cat([columns, columns.new_tensor([size])])
        new = refitted(target, found[name], columns, damp).float().cpu()
        tensors[f"{name}.weight"] = new[:, :size].contiguous()
        if new.shape[1] > size:
            tensors[f"{name}.bias"] = new[:, size].contiguous()
    return tensors

"""Experts that calibration never reached: their statistics come from tokens that went elsewhere.

A router may use an expert so rarely that a pass does not meet it, and rounding needs a Gram matrix of every linear.
Tokens of the layer's own input are then sent through the expert, whether or not the router would.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..models.base import Layout, Site
from ..offload import device_of
from ..runtime.moe import feed_forwards
from .statistics import InputStatistics


@torch.no_grad()
def fill_idle(model: nn.Module, layout: Layout, inputs: dict[str, InputStatistics], grams: bool) -> None:
    """Add what is missing (or an empty Gram matrix) of the linears in expert layers to `inputs`, in place."""
    for path, layer in feed_forwards(model).items():
        inside = [site for site in layout.sites if site.name.startswith(f"{path}.")]
        known = [inputs[site.input_key] for site in inside if site.role == "ffn_in" and site.input_key in inputs]
        if not known:
            continue
        tokens = torch.cat([value.reservoir for value in known])
        bucket = torch.cat([value.reservoir_bucket for value in known])
        for number, expert in enumerate(layer.experts):
            own = [site for site in inside if site.name.startswith(f"{path}.experts.{number}.")]
            idle = [site for site in own if _empty(inputs.get(site.input_key))]
            for site, x in zip(idle, _seen(model, expert, idle, tokens), strict=True):
                inputs[site.input_key] = _statistics(x, bucket, inputs.get(site.input_key), known[0], grams)


def _empty(value: InputStatistics | None) -> bool:
    return value is None or (value.gram is not None and not bool(value.gram.any()))


def _seen(model: nn.Module, expert: nn.Module, sites: list[Site], tokens: Tensor) -> list[Tensor]:
    """The inputs (T, K) of the sites when the expert reads tokens (T, D), float32 on CPU."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> object:
        return lambda module, args: found.__setitem__(name, args[0].detach().float().cpu())

    handles = [model.get_submodule(s.name).register_forward_pre_hook(hook(s.name)) for s in sites]  # type: ignore[arg-type]
    dtype = next(model.parameters()).dtype
    try:
        if sites:
            expert(tokens.to(device_of(model), dtype))
    finally:
        for handle in handles:
            handle.remove()
    return [found[site.name] for site in sites]


def _statistics(
    x: Tensor, bucket: Tensor, known: InputStatistics | None, like: InputStatistics, grams: bool
) -> InputStatistics:
    """Of tokens (T, K) alone; an expert that was met and has only an empty Gram matrix keeps the rest."""
    gram = x.T @ x if grams else None
    if known is not None:
        return replace(known, gram=gram)
    low, high = x.amin(0).expand(len(like.low), -1).clone(), x.amax(0).expand(len(like.low), -1).clone()
    count = torch.tensor([float(len(x))], dtype=torch.float64)
    return InputStatistics(low, high, x.double().sum(0), count, gram, x, bucket.clone(), torch.zeros(len(x)))

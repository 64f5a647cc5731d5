"""Masks on a running model: hard-concrete gates on heads, neurons and modulation outputs, and the gradient of a loss on
the sampler's last latents through all steps with the activations of one step at a time.

Shapes: a group of gates has n units of `size` channels, one gate a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.trajectory import Walk
from ...errors import DitcompressError

BETA, LOW, HIGH = 0.83, -0.1, 1.1  # temperature and stretch of the hard-concrete distribution


@dataclass(frozen=True)
class Gates:
    """One group: `places` are (module, first channel, last channel + 1) of its inputs, or of its outputs."""

    name: str
    count: int
    size: int
    places: tuple[tuple[str, int, int], ...]
    outputs: bool = False


def gate(logit: Tensor, u: Tensor, eps: float) -> Tensor:
    """Hard-concrete values in 0..1 for logits and uniform draws `u` (n,); `eps` bounds the logistic noise to
    ln((1 + eps) / eps). EcoDiff, arXiv 2412.02852, after Louizos et al. 2018."""
    noise = torch.log(u + eps) - torch.log(1 - u + eps)
    return ((HIGH - LOW) * torch.sigmoid((noise + logit) / BETA) + LOW).clamp(0, 1)


@contextmanager
def masked(model: nn.Module, groups: Sequence[Gates], values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with the channels of each unit multiplied by its value; keyed by module, not by order of calls."""
    factors: dict[tuple[str, bool], list[tuple[int, int, Tensor]]] = {}
    for group in groups:
        if group.name in values:
            channels = values[group.name].repeat_interleave(group.size)
            for module, start, stop in group.places:
                factors.setdefault((module, group.outputs), []).append((start, stop, channels))

    def scaled(x: Tensor, parts: list[tuple[int, int, Tensor]]) -> Tensor:
        pieces, end = [], 0
        for start, stop, channels in sorted(parts, key=lambda part: part[0]):
            pieces += [x[..., end:start], x[..., start:stop] * channels.to(x.dtype)]
            end = stop
        return torch.cat([*pieces, x[..., end:]], dim=-1)

    def before(parts: list[tuple[int, int, Tensor]]) -> Any:
        return lambda module, args: (scaled(args[0], parts), *args[1:])

    def after(parts: list[tuple[int, int, Tensor]]) -> Any:
        return lambda module, args, output: scaled(output, parts)

    handles = []
    try:
        for (name, outputs), parts in factors.items():
            part = model.get_submodule(name)
            handles.append(
                part.register_forward_hook(after(parts)) if outputs else part.register_forward_pre_hook(before(parts))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def through_sampler(
    walk: Walk, draw: Callable[[int], Mapping[str, Tensor]], groups: Sequence[Gates], logits: Sequence[Tensor],
    target: Tensor,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Mean squared error of the masked sampler's last latents against `target` (n, ...), and its gradient by each of
    `logits`; `draw(step)` gives the gate values of a step, the same whenever it is asked. A first pass keeps only the
    latents of each step, a second one goes backwards and repeats one step at a time, so memory does not grow with the
    steps; what a multistep scheduler remembers of earlier outputs counts as given.

    E205 for a scheduler that cannot be differentiated.
    """
    latents, states = [walk.start], []
    with torch.no_grad():
        for index in range(walk.count):
            states.append(walk.remember())
            with masked(walk.model, groups, draw(index)):
                latents.append(walk.step(index, latents[-1]))
    error = latents[-1] - target
    loss, slope = error.square().mean(), 2 * error / error.numel()
    total = [torch.zeros_like(logit) for logit in logits]
    for index in reversed(range(walk.count)):
        walk.recall(states[index])
        z = latents[index].detach().requires_grad_(True)
        with torch.enable_grad(), masked(walk.model, groups, draw(index)):
            moved = walk.step(index, z)
        if not moved.requires_grad:
            name = type(walk.sampler).__name__
            raise DitcompressError("E205", name, "gives no gradient", "use another --scheduler or width method")
        *found, slope_z = torch.autograd.grad(moved, [*logits, z], slope, allow_unused=True)
        slope = torch.zeros_like(z) if slope_z is None else slope_z
        for place, gradient in enumerate(found):
            if gradient is not None:
                total[place] += gradient
    return loss, total

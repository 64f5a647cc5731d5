"""FuseGPT (Pei et al. 2024, arXiv 2411.14507): removed blocks are fused into their neighbours.

The unit goes without which the prediction keeps most of its direction (the macro influence, 1 - cosine, is least), then
all the others are measured again without it. Every linear W of the blocks in a window around a removed block i becomes

    W + B A + (C1 C2) * W_i        with the bias b + c * b_i

where W_i is the weight of the same name in the removed block, * is elementwise, and B, C1 and c begin at zero: as plain
removal does. The factors learn to give the outputs that whole windows have at their ends, and the prediction; then they
are merged, and stock diffusers loads the result. Of several removed blocks near one linear each has its own C1, C2, c.

Departures: the influence is that of the prediction, not of a hidden state, against the whole model; all removals are
fused in one training with a relative squared error (the code's loss is a softmax over the batch), so that later windows
see what earlier ones left wrong. States are those of the model's own trajectories.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..calibration.trajectory import generator
from ..distill.data import Data
from ..distill.lora import Adapters, linears
from ..distill.losses import BlockOutputs, normalised_features, output_loss
from ..distill.trainer import Plain, train
from ..structure import without_blocks
from ._greedy import greedy
from ._learned import LearnedParams, settings, states, used_outside
from .base import Context, Scores

NEEDS = ("probes", "training")


class Params(LearnedParams):
    """`window`: blocks that take part around a removed one, itself included; `rank` of all factors; `learning_rate` is
    that of A and B, `fuse_rate` that of C1, C2 and c; `train`: false removes only."""

    learning_rate: float = Field(3e-4, gt=0)
    window: int = Field(8, ge=2)
    rank: int = Field(128, ge=1)
    fuse_rate: float = Field(1e-3, gt=0)
    train: bool = True


def influence(context: Context, units: Collection[str]) -> float:
    """1 - cosine between the predictions with and without `units`, mean over images and probes."""
    references, total, count = context.references(), 0.0, 0
    with torch.no_grad(), without_blocks(context.model, context.depth, context.depth.of(units)):
        for probe, reference in zip(context.probes, references, strict=True):
            found = context.predict(probe).cpu().double().flatten(1)
            total += float((1 - functional.cosine_similarity(found, reference.double().flatten(1))).sum())
            count += len(found)
    return total / max(count, 1)


def scores(context: Context, params: Params) -> Scores:
    """The macro influence of every unit alone."""
    found = {}
    with context.reporter.task("single removals", len(context.names)) as advance:
        for name in context.names:
            found[name] = context.remembered("influence", [name], lambda name=name: influence(context, [name]))  # type: ignore[misc]
            advance(1)
    return Scores(found)


def select(context: Context, params: Params, scores: Scores) -> list[str]:
    """Units in the order in which they go."""
    return greedy(context, scores, "influence", lambda units: influence(context, units), by_cost=False)


@dataclass(frozen=True)
class Window:
    """A removed block, the blocks around it that stay, and the last block of the window, which may be a removed one."""

    removed: str
    stay: tuple[str, ...]
    end: str


def windows(context: Context, removed: Collection[str], size: int) -> list[Window]:
    """The window of every removed block, clipped at both ends of its list."""
    found = []
    for block in removed:
        owner, _, number = block.rpartition(".")
        count = context.depth.lists[owner]
        first = max(0, min(int(number) - size // 2, count - size))
        names = [f"{owner}.{n}" for n in range(first, min(first + size, count))]
        found.append(Window(block, tuple(n for n in names if n not in removed), names[-1]))
    return [window for window in found if window.stay]


@dataclass(frozen=True)
class _Term:
    """C1 (out, rank), C2 (rank, in) and c (out,) with the removed linear that they bring in."""

    left: Tensor
    right: Tensor
    shift: Tensor
    source: nn.Linear

    def weight(self) -> Tensor:
        return (self.left @ self.right) * self.source.weight.detach().float()

    def bias(self) -> Tensor | None:
        return None if self.source.bias is None else self.shift * self.source.bias.detach().float()


class Fused:
    """Hooks that bring removed linears into those of the same name in the blocks that stay, while `enabled`."""

    def __init__(self, model: nn.Module, around: Sequence[Window], rank: int, seed: int, skip: Collection[str]) -> None:
        self.enabled = True
        self.terms: dict[str, list[_Term]] = {}
        self.handles: list[Any] = []
        for window in around:
            given = linears(model, [window.removed])
            for block in window.stay:
                for name, linear in linears(model, [block], skip).items():
                    source = given.get(window.removed + name[len(block) :])
                    if source is not None and source.weight.shape == linear.weight.shape:
                        self._add(name, linear, source, rank, generator(seed, len(self.handles), 6_000_000))

    def _add(self, name: str, linear: nn.Linear, source: nn.Linear, rank: int, draw: torch.Generator) -> None:
        out, into = linear.weight.shape
        rank, device = min(rank, out, into), linear.weight.device
        right = (torch.randn(rank, into, generator=draw) * into**-0.5).to(device).requires_grad_(True)
        left = torch.zeros(out, rank, device=device, requires_grad=True)
        term = _Term(left, right, torch.zeros(out, device=device, requires_grad=True), source)
        self.terms.setdefault(name, []).append(term)

        def hook(module: nn.Linear, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.enabled:
                return output
            bias = term.bias() if module.bias is not None else None
            return output + functional.linear(arguments[0].float(), term.weight(), bias).to(output.dtype)

        self.handles.append(linear.register_forward_hook(hook))

    def parameters(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, terms in self.terms.items():
            for number, term in enumerate(terms):
                key = f"{name}.fuse.{number}"
                found |= {f"{key}.left": term.left, f"{key}.right": term.right, f"{key}.shift": term.shift}
        return found

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


class Fusion(Plain):
    """The training task: the model without `removed`, its linears fused, against the whole model."""

    def __init__(self, context: Context, params: Params, removed: Collection[str], data: Data) -> None:
        self.context, self.params, self.data, self.removed = context, params, data, removed
        around = windows(context, removed, params.window)
        order = {name: number for number, name in enumerate(context.layout.blocks)}
        blocks = sorted({block for window in around for block in window.stay}, key=lambda block: order[block])
        fixed = used_outside(context, blocks)
        self.adapters = Adapters(context.model, blocks, params.rank, context.seed, skip=fixed)
        self.fused = Fused(context.model, around, params.rank, context.seed, fixed)
        ends = sorted({(order[window.stay[-1]], order[window.end]) for window in around})
        names = context.layout.blocks
        self.outputs = [BlockOutputs(context.model, [names[pair[i]] for pair in ends]) for i in (0, 1)]
        self.enable(False)

    def enable(self, on: bool) -> None:
        self.adapters.enabled = self.fused.enabled = on

    def parameters(self) -> dict[str, Tensor]:
        return self.adapters.parameters() | self.fused.parameters()

    def rates(self) -> dict[str, float]:
        return dict.fromkeys(self.fused.parameters(), self.params.fuse_rate)

    def student(self, *given: Any) -> Tensor:
        """The prediction of the fused model."""
        self.enable(True)
        try:
            with without_blocks(self.context.model, self.context.depth, self.removed):
                return self.data.adapter.predict(self.context.model, *given).float()  # type: ignore[no-any-return]
        finally:
            self.enable(False)  # the model samples the next states and teaches

    def loss(self, step: int, part: int) -> Tensor:
        batch = self.data.batch(step, self.params.rows, part)
        given = (batch.latents, batch.timestep, batch.cond)
        self._take()
        with torch.no_grad():
            wanted = self.data.adapter.predict(self.context.model, *given).float()
        _, theirs = self._take()
        found = self.student(*given)
        mine, _ = self._take()
        return output_loss(found, wanted) + normalised_features(mine, theirs)

    def _take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of the windows' last blocks that stay, and of their last blocks."""
        mine, theirs = ([tensor.float() for tensor in outputs.take()] for outputs in self.outputs)
        return mine, theirs

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The plain linears' tensors that do the same."""
        found: dict[str, Tensor] = {}
        for name, change in self.adapters.changes().items():
            linear = self.context.model.get_submodule(name)
            terms = self.fused.terms.get(name, [])
            weight = linear.get_parameter("weight")
            total = weight.float() + change + sum(term.weight() for term in terms)
            found[f"{name}.weight"] = total.to(weight.dtype)
            shifts = [shift for term in terms if (shift := term.bias()) is not None]
            if linear.bias is not None and shifts:
                bias = linear.get_parameter("bias")
                found[f"{name}.bias"] = (bias.float() + torch.stack(shifts).sum(0)).to(bias.dtype)
        return found

    def release(self) -> None:
        """Take all hooks off."""
        self.adapters.remove()
        self.fused.remove()
        for outputs in self.outputs:
            outputs.remove()


def rewrite(context: Context, params: Params, units: Sequence[str]) -> dict[str, Tensor]:
    """The merged linears of all windows."""
    removed = context.depth.of(units)
    if not removed or not params.train:
        return {}
    data = states(context, params)
    with context.still():
        task = Fusion(context, params, removed, data)
        try:
            train(task, settings(params), journal=context.journal, reporter=context.reporter)
            return task.merged()
        finally:
            task.release()

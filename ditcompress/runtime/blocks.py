"""Mixture of Blocks: of a group of consecutive blocks only some run, chosen for each sample (Dense2MoE, section 3.3).

    S = top-k of alpha * W_x [mean x ; mean c] + (1 - alpha) * W_y y

x and c are the streams that enter the group, y the global embedding of time and condition. A block that is not chosen
is the identity on all streams; samples that choose differently are run apart, so that nothing is computed and dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .moe import Routed, Router, Routing, idle_parameters, straight_through

Embedding = Callable[[nn.Module, dict[str, Any]], Tensor]


class BlockRouter(Routed):
    """Belongs to the first block of a group of `count`. `streams`: number of token streams of width `features`;
    `embedding` (block, arguments) -> y (n, condition)."""

    def __init__(
        self, features: int, streams: int, condition: int, size: int, active: int, alpha: float, embedding: Embedding
    ) -> None:
        super().__init__()
        self.count, self.active, self.alpha, self.streams, self.embedding = size, active, alpha, streams, embedding
        self.router = Router(features * streams, size)
        self.condition = Router(condition, size)
        self.gates: Tensor | None = None  # (n, count): 0 where a sample skips the block

    def route(self, block: nn.Module, given: dict[str, Any]) -> Tensor:
        """Gates (n, count) of the samples that enter the group with the arguments `given` of its first block."""
        names = ("hidden_states", "encoder_hidden_states")[: self.streams]
        pooled = torch.cat([given[name].float().mean(1) for name in names], dim=-1)
        mixed = self.alpha * self.router(pooled) + (1 - self.alpha) * self.condition(self.embedding(block, given))
        probabilities = mixed.softmax(-1)
        top, chosen = probabilities.topk(self.active, dim=-1)
        found = self.tell(Routing(probabilities, chosen, straight_through(top)))
        self.gates = torch.zeros_like(probabilities).scatter(1, chosen, found.gates)
        return self.gates

    def extra_repr(self) -> str:
        return f"{self.active} of {self.count} blocks active"


class Member:
    """The `forward` of a block of a group: runs the block's own on the samples that chose it."""

    def __init__(self, block: nn.Module, router: BlockRouter, place: int) -> None:
        self.parts, self.place = (block, router), place
        self.rows: Tensor | None = None  # the samples of the last call that ran it; None for all

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block, router = self.parts
        bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
        given = {name: value for name, value in bound.items() if name != "self"}
        gates = router.route(block, given) if self.place == 0 else router.gates
        assert isinstance(gates, Tensor)
        own = gates[:, self.place]
        if self.place == router.count - 1:
            router.gates = None  # nothing of a call outlives it
        kept = own.detach() != 0
        self.rows = None if bool(kept.all()) else kept.nonzero()[:, 0]
        if bool(kept.all()):
            return self._joined(given, self._run(given), own, None)
        if not bool(kept.any()):
            return self._joined(given, None, own, None)
        rows = self.rows
        assert rows is not None
        return self._joined(given, self._run(_taken(given, rows, len(own))), own[rows], rows)

    def _run(self, given: dict[str, Any]) -> Any:
        block = self.parts[0]
        return type(block).forward(block, **given)

    def _joined(self, given: dict[str, Any], output: Any, gates: Tensor, rows: Tensor | None) -> Any:
        """All samples after the block, `output` being of those in `rows` (None: of all, or of none)."""
        streams = [given["hidden_states"]]
        double = self.parts[1].streams == 2
        if double:  # in the order in which such blocks return them
            streams.insert(0, given["encoder_hidden_states"])
        if output is None:
            return tuple(streams) if double else streams[0]
        parts = output if double else (output,)
        joined = []
        for before, after in zip(streams, parts, strict=True):
            old = before if rows is None else before[rows]
            new = old + gates[:, None, None].to(old.dtype) * (after - old) if gates.requires_grad else after
            joined.append(new if rows is None else before.index_copy(0, rows, new.to(before.dtype)))
        return tuple(joined) if double else joined[0]


def routes_blocks(model: nn.Module) -> bool:
    """Whether the first block of a group decides what the others do: such blocks cannot be called by themselves, nor
    by several passes in turns."""
    return any(isinstance(module, BlockRouter) for module in model.modules())


def members(model: nn.Module) -> dict[str, Member]:
    """The blocks of groups by path."""
    found = {path: vars(module).get("forward") for path, module in model.named_modules()}
    return {path: call for path, call in found.items() if isinstance(call, Member)}


def member_of(path: str, known: Mapping[str, Member]) -> Member | None:
    """The block of a group that `path` lies in, but for the group's router: what is inside sees only the samples that
    run the block."""
    inside = next((block for block in known if path.startswith(f"{block}.")), None)
    return None if inside is None or path == f"{inside}.block_router" else known[inside]


def idle_in_blocks(model: nn.Module) -> float:
    """Parameters that a sample does not meet because it skips their block, on average over the blocks of a group."""
    total = 0.0
    for path, router in model.named_modules():
        if isinstance(router, BlockRouter):
            owner, _, first = path.rpartition(".")[0].rpartition(".")
            for place in range(router.count):
                block = model.get_submodule(f"{owner}.{int(first) + place}")
                met = sum(p.numel() for p in block.parameters()) - idle_parameters(block)
                total += met * (1 - router.active / router.count)
    return total


def _taken(given: dict[str, Any], rows: Tensor, size: int) -> dict[str, Any]:
    """The arguments of some samples: of every tensor with a place for each."""

    def take(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value

    return {name: take(value) for name, value in given.items()}

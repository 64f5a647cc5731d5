"""Residual linear probes of blocks, chains of them, and how alike their output is to the model's (PPCL, stage 1.1-1.2).

The probe of a block is h -> h + W [h, 1] of its input, one for each stream, in closed form from all tokens that were
seen; a chain applies the probes of consecutive blocks to the input of the first. It is compared with the last block's
output by linear CKA (Kornblith et al. 2019) on a sample of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration.trajectory import generator
from ._streams import Streams, watched
from .base import Context


def linear_cka(x: Tensor, y: Tensor) -> float:
    """||Yc' Xc||^2 / (||Xc' Xc|| ||Yc' Yc||) of (tokens, width), columns centred; 1 where both are constant."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    if len(x) < x.shape[1]:
        first, second = x @ x.T, y @ y.T
        cross = (first * second).sum()
    else:
        first, second = x.T @ x, y.T @ y
        cross = (y.T @ x).square().sum()
    both = first.norm() * second.norm()
    return float(cross / both) if float(both) > 0 else 1.0


@dataclass
class Record:
    """One stream of one block: sums over all tokens, and `inputs` and `outputs` (tokens, width) of a sample."""

    gram: Tensor
    cross: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor, chosen: Tensor) -> None:
        """One batch (tokens, width), of which the rows `chosen` are kept."""
        wide = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
        self.gram += (wide.T @ wide).cpu()
        self.cross += (wide.T @ (y - x).double()).cpu()
        self.inputs.append(x[chosen].float().cpu())
        self.outputs.append(y[chosen].float().cpu())

    def probe(self, ridge: float) -> Tensor:
        """W (width + 1, width), float64, with a ridge in units of the Gram matrix's mean diagonal."""
        ridge *= float(self.gram.diagonal().mean())
        damped = self.gram + ridge * torch.eye(len(self.gram), dtype=self.gram.dtype)
        return torch.linalg.solve(damped, self.cross)


def record(context: Context, tokens: int) -> dict[str, list[Record]]:
    """The streams of every removable block over all probes, about `tokens` of each kept: the same ones in all blocks.

    Sums of a stream of width d take 16 d^2 bytes of main memory a block."""
    blocks = context.depth.of(context.names)
    found: dict[str, list[Record]] = {block: [] for block in blocks}
    number = 0
    each = -(-tokens // max(len(context.probes), 1))

    def see(block: str, pairs: Streams) -> None:
        for place, (before, after) in enumerate(pairs):
            x, y = before.detach().flatten(0, -2), after.detach().flatten(0, -2)
            if place == len(found[block]):
                width = x.shape[1]
                found[block].append(Record(torch.zeros(width + 1, width + 1, dtype=torch.float64),
                                           torch.zeros(width + 1, width, dtype=torch.float64)))  # fmt: skip
            chosen = torch.randperm(len(x), generator=generator(context.seed, number, 5_000_000))[:each]
            found[block][place].add(x, y, chosen.to(x.device))

    with (
        context.reporter.task("linear probes", len(context.probes)) as advance,
        torch.no_grad(),
        watched(context.model, blocks, see),
    ):
        for number, probe in enumerate(context.probes):  # noqa: B007 - `see` reads it
            context.predict(probe)
            advance(1)
    return found


class Chains:
    """Similarity of chains of probes to what they stand for. Blocks are named (list, number)."""

    def __init__(self, records: Mapping[str, Sequence[Record]], ridge: float) -> None:
        self.probes = {block: [r.probe(ridge) for r in rows] for block, rows in records.items()}
        self.inputs = {block: [torch.cat(r.inputs).double() for r in rows] for block, rows in records.items()}
        self.outputs = {block: [torch.cat(r.outputs).double() for r in rows] for block, rows in records.items()}
        self.known: dict[tuple[str, int, int], float] = {}

    def has(self, owner: str, number: int) -> bool:
        """Whether the block was recorded: it may go."""
        return f"{owner}.{number}" in self.probes

    def similarity(self, owner: str, first: int, last: int) -> float:
        """CKA, averaged over streams, after the blocks `first` to `last` became their probes; 1 for none of them."""
        if first > last:
            return 1.0
        key = (owner, first, last)
        if key not in self.known:
            self._walk(owner, first, last)
        return self.known[key]

    def _walk(self, owner: str, first: int, last: int) -> None:
        streams = self.inputs[f"{owner}.{first}"]
        for number in range(first, last + 1):
            block = f"{owner}.{number}"
            streams = [h + h @ w[:-1] + w[-1] for h, w in zip(streams, self.probes[block], strict=True)]
            if (owner, first, number) not in self.known:
                alike = [linear_cka(h, y) for h, y in zip(streams, self.outputs[block], strict=True)]
                self.known[owner, first, number] = sum(alike) / max(len(alike), 1)


def runs(blocks: Sequence[str]) -> list[tuple[str, int, int]]:
    """(list, first, last) of every run of consecutive blocks."""
    found: list[tuple[str, int, int]] = []
    for owner, number in sorted((b.rpartition(".")[0], int(b.rpartition(".")[2])) for b in blocks):
        if found and found[-1][0] == owner and found[-1][2] == number - 1:
            found[-1] = (owner, found[-1][1], number)
        else:
            found.append((owner, number, number))
    return found

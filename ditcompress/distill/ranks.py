"""Several processes that train one student: gradients are averaged, the first process writes.

They are started by `accelerate launch` or `torchrun`; every one holds teacher, student and optimiser (data parallel).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_BUCKET = 1 << 26  # values that are averaged in one message
_PATIENCE = timedelta(hours=2)  # the others wait while the first one hashes and writes


class Ranks:
    """One process of `count`; alone, every method is the identity."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, size: int) -> slice:
        """This process's samples of a batch of `size`, which `count` divides."""
        each = size // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the processes."""
        if self.count == 1:
            return
        for group in _buckets(tensors):
            flat = torch.cat([tensor.detach().flatten().float() for tensor in group])
            dist.all_reduce(flat)
            flat /= self.count
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def mean(self, value: float, device: torch.device) -> float:
        """The mean of a number; the same in every process."""
        if self.count == 1:
            return value
        held = torch.tensor([value], dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        dist.all_reduce(held)
        return held.item() / self.count

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The tensors (of one shape) of all processes, one after another along `dim`."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim)

    def share(self, value: Any) -> Any:
        """The first process's value, for all; also a point that all reach before any goes on."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


ALONE = Ranks()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for tensor in tensors:
        if group and sum(t.numel() for t in group) + tensor.numel() > _BUCKET:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes of this run and the device of this one: a group that is there already, that of a launcher's
    environment (WORLD_SIZE, RANK, LOCAL_RANK), or this process alone."""
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
        return
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ:
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()

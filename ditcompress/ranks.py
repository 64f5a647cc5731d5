"""Several processes that do one piece of work: each a part of the batch or of the images, the first one writes.

They are started by `accelerate launch` or `torchrun`, and every one holds the models (data parallel). A failure in one
of them is a failure of all: they exchange how it went (`together`, `lead`, `agree`) before they exchange data, so none
waits for one that has given up, and only the first one speaks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .errors import TOLD, DitcompressError, as_ours, printable

T = TypeVar("T")
_BUCKET = 1 << 26  # values that are averaged in one message
_PATIENCE = timedelta(hours=2)  # the others wait while the first one hashes and writes


class Ranks:
    """One process of `count`; alone, every method is the identity. Messages travel over `device`."""

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.count, self.device = rank, count, device or torch.device("cpu")

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

    # --- one failure for all ------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work without messages, which ends in every process or in none: a failure in one is raised in all. They may be
        nested; an error that all know of is not told again."""
        try:
            yield
        except Exception as error:
            if not hasattr(error, TOLD):
                self._meet(error)
            raise
        self._meet(None)

    def lead(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all; its failure is that of all."""
        value, error = None, None
        try:
            value = make() if self.first else None
        except Exception as caught:
            error = caught
        self._meet(error)
        return self.share(value)  # type: ignore[no-any-return]

    def agree(self, value: T) -> T:
        """The first process's value once all are here, or the failure of one that will not come."""
        return self.lead(lambda: value)

    def leave(self) -> None:
        """What follows concerns each process alone. The others may end now; call it in all after they have met."""
        self.rank, self.count = 0, 1

    def _meet(self, error: Exception | None) -> None:
        """Tell all how it went here; raises what went wrong, of several failures that of the lowest number."""
        if self.count == 1:
            if error is not None:
                raise error
            return
        try:
            found = self.everyone(_packed(error))
        except RuntimeError:
            lost = DitcompressError("E605", "a process", "ended without a word", "see its output, run the same again")
            raise _told(error or lost) from None
        failed = next(((number, problem) for number, problem in enumerate(found) if problem is not None), None)
        if failed is not None:
            raise _told(error or _unpacked(*failed))

    # --- shares -------------------------------------------------------------------------------------------------------

    def own(self, items: Sequence[T]) -> list[T]:
        """This process's items, dealt out in turn."""
        return list(items[self.rank :: self.count])

    def undealt(self, rows: Tensor | None) -> Tensor | None:
        """Rows that were dealt out by `own` (None for no row) in their order, on the first process; None on others."""
        if self.count == 1:
            return rows
        found = self.collect(rows)
        if not self.first:
            return None
        parts = [part for part in found if part is not None]
        joined_rows = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
        for number, part in enumerate(parts):
            joined_rows[number :: self.count] = part
        return joined_rows

    def collect(self, value: T) -> list[T]:
        """Every process's value on the first one; nothing on the others."""
        if self.count == 1:
            return [value]
        found: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(value, found, dst=0)
        return found or []

    def everyone(self, value: T) -> list[T]:
        """Every process's value, in every process."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def reduce(self, tensor: Tensor, kind: str) -> Tensor:
        """The "sum", "min" or "max" over all processes, on the first one; what the others get has no meaning."""
        if self.count == 1:
            return tensor
        kinds = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
        held = tensor.contiguous().to(self.device)
        dist.reduce(held, dst=0, op=kinds[kind])
        return held.to(tensor.device)


ALONE = Ranks()


def _told(error: Exception) -> Exception:
    setattr(error, TOLD, True)
    return error


def _packed(error: Exception | None) -> tuple[str, ...] | None:
    """A failure as texts: classes of other libraries may not survive a message."""
    if error is None:
        return None
    known = as_ours(error)
    if known is None:
        return (f"{type(error).__name__}: {printable(error, 200)}",)
    return known.code, known.where, known.what, known.remedy


def _unpacked(number: int, packed: tuple[str, ...]) -> Exception:
    by = f"process {number}: "
    if len(packed) == 1:
        return RuntimeError(by + packed[0])
    code, where, what, remedy = packed
    return DitcompressError(code, where if number == 0 else by + where, what, remedy)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for tensor in tensors:
        if group and sum(t.numel() for t in group) + tensor.numel() > _BUCKET:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _launched() -> bool:
    """Whether a launcher's environment names other processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def alone(what: str) -> None:
    """E203 under a launcher, for work that several processes would do several times, in one another's way."""
    if _launched():
        raise DitcompressError(
            "E203", what, "runs as one process", "start it without a launcher, or its steps one by one"
        )


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes of this run and the device of this one: a group that is there already, that of a launcher's
    environment (WORLD_SIZE, RANK, LOCAL_RANK), or this process alone."""
    if dist.is_available() and dist.is_initialized():
        yield _group(device), device
        return
    if not _launched():
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield _group(device), device
    finally:
        dist.destroy_process_group()


def _group(device: torch.device) -> Ranks:
    """The group as it is; NCCL carries only what lies on its devices."""
    carries = device if dist.get_backend() == "nccl" else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), carries)

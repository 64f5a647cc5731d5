"""What methods that learn share: their training options, states, and gates on the units of a running model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..calibration.footprint import free_memory
from ..distill.data import Trajectories
from ..distill.settings import Settings
from ..offload import device_of
from ._streams import replaced
from .base import Context, ProbeParams


class LearnedParams(ProbeParams):
    """Beside the probes, with which the result is measured: `updates` of the optimiser on `rows` states each; the
    states are those of `images` trajectories, which are renewed after `refresh` updates."""

    updates: int = Field(400, ge=1)
    rows: int = Field(32, ge=1)
    images: int = Field(64, ge=1)
    refresh: int = Field(200, ge=1)
    learning_rate: float = Field(1e-4, gt=0)


def states(context: Context, params: LearnedParams) -> Trajectories:
    """Training states along the whole model's own trajectories."""
    assert context.data is not None, 'the method must name "training" among its NEEDS'
    return context.data(images=params.images, refresh=params.refresh, sample_steps=params.steps)


def settings(params: LearnedParams, **others: Any) -> Settings:
    """Of the trainer, with a state to go on from at least every quarter."""
    every = max(1, min(200, params.updates // 4))
    return Settings(
        steps=params.updates, batch=params.rows, learning_rate=params.learning_rate, save_every=every, **others
    )


def journal(context: Context, name: str) -> Path | None:
    """A folder for the states of one of several trainings, where states are kept at all."""
    if context.journal is None:
        return None
    folder = context.journal / name
    folder.mkdir(exist_ok=True)
    return folder


def kept_bytes(run: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """What autograd would keep of `run` beside the tensors `own`; it is counted, and not kept."""
    kept: dict[int, tuple[StorageWeakRef, int]] = {}  # a weak reference keeps an address from being used again
    known = {tensor.untyped_storage()._cdata for tensor in own}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return torch.empty(0)

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda empty: empty):
        run()
    return sum(size for _, size in kept.values())


def fits(context: Context, needed: int) -> bool:
    """Whether a training step that keeps so many bytes has room in memory; else a note says so."""
    free = free_memory(device_of(context.model))
    if needed > free:
        told = f"that needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        context.reporter.note(f"no set of blocks is learned: {told}")
    return needed <= free


def casting(model: nn.Module) -> torch.autocast:
    """Runs float32 copies of a model's weights, which are what learns, in the model's own lower precision."""
    first = next(model.parameters())
    lower = next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    return torch.autocast(first.device.type, dtype=lower or torch.bfloat16, enabled=lower is not None)


class Gates:
    """`factors` by unit, () or one for each sample (n,): its blocks give m * output + (1 - m) * input in every stream.
    A unit without a factor runs as it is, so at first the model is whole."""

    def __init__(self) -> None:
        self.factors: Mapping[str, Tensor] = {}

    @contextmanager
    def at(self, factors: Mapping[str, Tensor]) -> Iterator[None]:
        """The gates at these factors inside, open again afterwards."""
        self.factors = factors
        try:
            yield
        finally:
            self.factors = {}

    def hook(self, unit: str) -> Callable[..., Any]:
        def gated(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            factor = self.factors.get(unit)
            if factor is None:
                return output
            return replaced(block, args, kwargs, output, lambda x, y: _blend(factor, x, y))

        return gated


def _blend(factor: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if factor.ndim:  # video models may run the frames of a sample as samples of their own
        factor = factor.repeat_interleave(len(x) // len(factor)).reshape(-1, *[1] * (x.ndim - 1))
    factor = factor.to(y.device, y.dtype)
    return factor * y + (1 - factor) * x


@contextmanager
def gated(context: Context) -> Iterator[Gates]:
    """Gates on every unit of the model; they are taken off in the end."""
    gates = Gates()
    handles = [
        context.model.get_submodule(block).register_forward_hook(gates.hook(name), with_kwargs=True)
        for name in context.names
        for block in context.blocks(name)
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def used_outside(context: Context, blocks: Sequence[str]) -> set[str]:
    """Parts of `blocks` that the model also calls while their block does not run, by full name: changing them changes
    more than the block (DiT's head is modulated by the first block's embedding)."""
    running: set[str] = set()
    found: set[str] = set()
    handles: list[Any] = []

    def watch(block: str, path: str, part: nn.Module) -> None:
        def begin(*_: Any) -> None:
            if not path:
                running.add(block)
            elif block not in running:
                found.add(f"{block}.{path}")

        handles.append(part.register_forward_pre_hook(begin))
        if not path:
            handles.append(part.register_forward_hook(lambda *_: running.discard(block)))

    for block in blocks:
        for path, part in context.model.get_submodule(block).named_modules():
            watch(block, path, part)
    try:
        with torch.no_grad():
            context.predict(context.probes[0])
    finally:
        for handle in handles:
            handle.remove()
    return found

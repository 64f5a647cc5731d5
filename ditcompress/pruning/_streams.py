"""What goes into a block and what comes out of it, stream by stream, while the model runs.

A block takes `hidden_states` and, in two-stream models, `encoder_hidden_states`; it returns one of them or both, in an
order that differs between families. Shapes tell them apart; where both have one shape, the order in which the outputs
are nearer to the inputs is taken: a residual block changes its streams little.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from .base import Context

Streams = list[tuple[Tensor, Tensor]]  # (input, output) of each stream, (batch, tokens, width)
_NAMES = ("hidden_states", "encoder_hidden_states")


def streams(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Streams:
    """Pairs of one call. A stream that the block only reads has no pair; empty where nothing matches."""
    names = [name for name in inspect.signature(block.forward).parameters if name != "self"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    inputs = [given[name] for name in _NAMES if isinstance(given.get(name), Tensor)]
    if not inputs:
        inputs = [value for value in given.values() if isinstance(value, Tensor) and value.is_floating_point()][:1]
    outputs = [y for y in (output if isinstance(output, (tuple, list)) else (output,)) if isinstance(y, Tensor)]
    found: list[Streams] = []
    for chosen in permutations(inputs, min(len(outputs), len(inputs))):
        pairs = list(zip(chosen, outputs, strict=False))
        if all(x.shape == y.shape for x, y in pairs):
            found.append(pairs)
    return found[0] if len(found) == 1 else min(found, key=_change, default=[])


def _change(pairs: Streams) -> float:
    return sum(float((y - x).detach().float().square().mean()) for x, y in pairs)


def replaced(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any,
    change: Callable[[Tensor, Tensor], Tensor],
) -> Any:  # fmt: skip
    """The output of one call with `change(input, output)` in the place of every stream."""
    new = {id(y): change(x, y) for x, y in streams(block, args, kwargs, output)}
    if isinstance(output, (tuple, list)):
        return type(output)(new.get(id(part), part) for part in output)
    return new.get(id(output), output)


@contextmanager
def watched(model: nn.Module, blocks: Sequence[str], see: Callable[[str, Streams], None]) -> Iterator[None]:
    """Calls `see(block, pairs)` after every block inside."""

    def hook(name: str) -> Callable[..., None]:
        return lambda block, args, kwargs, output: see(name, streams(block, args, kwargs, output))

    handles = [model.get_submodule(b).register_forward_hook(hook(b), with_kwargs=True) for b in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measured(context: Context, value: Callable[[Streams], float]) -> dict[str, list[float]]:
    """`value` of every removable block for every probe; one forward pass a probe, nothing is kept of it."""
    blocks = context.depth.of(context.names)
    table: dict[str, list[float]] = {block: [] for block in blocks}
    with (
        context.reporter.task("blocks", len(context.probes)) as advance,
        torch.no_grad(),
        watched(context.model, blocks, lambda block, pairs: table[block].append(value(pairs))),
    ):
        for probe in context.probes:
            context.predict(probe)
            advance(1)
    return table

"""A backward pass block by block: memory holds what enters the blocks and the inside of one.

The graph of a forward pass is cut where tensors enter and leave blocks. Blocks run without a graph; on the way back,
last one first, each runs again with one, from the inputs that were kept, and gets the gradients of its outputs. What
lies outside the blocks keeps its graph and is differentiated once, at the end, with the gradients of all blocks; on the
way it is only asked for the gradients that the blocks before need. Gradients are those of an ordinary backward pass but
for the order of sums.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

CHANGED = "changed by an in-place operation"


@dataclass
class _Entered:
    """A tensor with a graph from outside the blocks, and the leaf that stands for it inside."""

    outside: Tensor
    leaf: Tensor


@dataclass
class _Ran:
    """A call of a block; `leaves` stand for its outputs."""

    block: nn.Module
    args: Any
    kwargs: Any
    leaves: list[Any]


class Blockwise:
    """The cut graph of the forward pass that ran inside `cut`, in the thread that ran it. Hooks are called for passes
    of other threads too, and without keywords by those that entered a block before they were removed."""

    def __init__(self) -> None:
        self.tape: list[_Entered | _Ran] = []
        self.known: dict[int, _Entered] = {}
        self.own: set[int] = set()  # outputs of blocks, as others see them
        self.versions: list[int] = []
        self.thread, self.running = threading.get_ident(), False

    def before(self, block: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Hook of a block: leaves in the place of what has a graph, and no graph until `after`."""
        if threading.get_ident() != self.thread or not torch.is_grad_enabled():
            return None
        args, kwargs = tree_map(self._enter, (args, kwargs))
        self.versions = _versions(args, kwargs)
        self.tape.append(_Ran(block, args, kwargs, []))
        self.running = True
        torch.set_grad_enabled(False)
        return args, kwargs

    def after(self, block: nn.Module, args: Any, *rest: Any) -> Any:
        """Hook of a block: leaves in the place of its outputs. RuntimeError for a block that changed its inputs."""
        if threading.get_ident() != self.thread or not self.running:
            return None
        self.running = False
        torch.set_grad_enabled(True)
        output = tree_map(_leaf, rest[-1])
        ran = self.tape[-1]
        assert isinstance(ran, _Ran) and ran.block is block
        if _versions(ran.args, ran.kwargs) != self.versions:
            raise RuntimeError(f"an input of {type(block).__name__} was {CHANGED}")
        ran.leaves = tree_leaves(output)
        self.own.update(id(leaf) for leaf in ran.leaves)
        return output

    def _enter(self, value: Any) -> Any:
        if not _differs(value) or id(value) in self.own:
            return value
        if id(value) not in self.known:
            self.known[id(value)] = _Entered(value, _leaf(value))
            self.tape.append(self.known[id(value)])
        return self.known[id(value)].leaf

    def backward(self, loss: Tensor, again: Callable[[Callable[[], None]], None], muted: Callable[[], Any]) -> None:
        """Gradients of everything that hooks listen to. Every block is run by `again`, with a graph; inside `muted` is
        what happens a second time at the end."""
        with muted():
            self._upstream(loss, None, len(self.tape))
        ends, gradients = [loss], [torch.ones_like(loss)]
        for place in range(len(self.tape) - 1, -1, -1):
            entry = self.tape.pop()
            if isinstance(entry, _Ran):
                again(lambda entry=entry: _run(entry))  # type: ignore[misc]
            elif entry.leaf.grad is not None:
                with muted():
                    self._upstream(entry.outside, entry.leaf.grad, place)
                ends.append(entry.outside)
                gradients.append(entry.leaf.grad)
        torch.autograd.backward(ends, gradients)

    def _upstream(self, end: Tensor, gradient: Tensor | None, place: int) -> None:
        """Add to the outputs of the calls before `place` the gradients that reach them from outside the blocks."""
        calls = [entry for entry in self.tape[:place] if isinstance(entry, _Ran)]
        leaves = [leaf for call in calls for leaf in call.leaves if _differs(leaf)]
        if not leaves:
            return
        found = torch.autograd.grad(end, leaves, gradient, retain_graph=True, allow_unused=True)
        for leaf, part in zip(leaves, found, strict=True):
            if part is not None:
                leaf.grad = part if leaf.grad is None else leaf.grad + part


def _differs(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _versions(args: Any, kwargs: Any) -> list[int]:
    return [value._version for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _run(entry: _Ran) -> None:
    """The block with a graph, and back through it; gradients arrive at the leaves that entered it."""
    outputs = tree_leaves(entry.block(*entry.args, **entry.kwargs))
    pairs = [
        (output, leaf.grad)
        for output, leaf in zip(outputs, entry.leaves, strict=True)
        if _differs(leaf) and leaf.grad is not None and output.requires_grad
    ]
    entry.leaves = []
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


@contextmanager
def cut(model: nn.Module, blocks: Sequence[str]) -> Iterator[Blockwise]:
    """A forward pass of this thread inside is cut at the blocks."""
    found, handles = Blockwise(), []
    try:
        for path in blocks:
            block = model.get_submodule(path)
            handles.append(block.register_forward_pre_hook(found.before, with_kwargs=True))
            handles.append(block.register_forward_hook(found.after, with_kwargs=True))
        yield found
    finally:
        for handle in handles:
            handle.remove()

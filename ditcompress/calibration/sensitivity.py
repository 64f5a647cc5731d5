"""How much the output of the whole model depends on each token of each linear: one backward pass serves all layers.

For a random direction v, the gradient g of <v, y / |y|> with respect to a linear's output satisfies
E|g|^2 = |d(y / |y|) / d(output)|^2, so a rounding error D of the weight costs about sum over tokens of
w(token) |D x(token)|^2 in relative output error, with w the mean of g^2 over the output channels. A Gram matrix
weighted by w therefore measures errors in units of the final output, alike for every layer and timestep (the diagonal
Fisher approximation of Hessian-based rounding, as in OBD and its successors, with the network's own output as loss).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..models.base import Layout
from ..offload import ATTRIBUTE, holding, reread
from ..runtime.blocks import routes_blocks
from .blockwise import cut

See = Callable[[str, Tensor, Tensor], None]


class TokenWeights:
    """Inputs and squared output gradients of every linear during one forward and backward pass of this thread."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.weights: dict[str, list[Tensor]] = {}
        self.thread, self.deaf = threading.get_ident(), False
        self.handles = []
        for site in layout.sites:
            self.handles.append(model.get_submodule(site.name).register_forward_hook(self._hook(site.input_key)))

    def _hook(self, key: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if threading.get_ident() != self.thread or not torch.is_grad_enabled():
                return output
            if not output.requires_grad:  # layers that see only time and condition start a graph of their own
                output = output.detach().requires_grad_(True)
            weights = self._place(key, args[0].detach())

            def seen(gradient: Tensor) -> None:
                if not self.deaf:
                    weights.add_(gradient.detach().float().square().mean(-1))

            output.register_hook(seen)
            return output

        return hook

    def _place(self, key: str, x: Tensor) -> Tensor:
        """The weights of an input: the readers of one tensor add to the same ones."""
        inputs, weights = self.inputs.setdefault(key, []), self.weights.setdefault(key, [])
        for known, place in zip(inputs, weights, strict=True):
            if known.data_ptr() == x.data_ptr() and known.shape == x.shape:
                return place
        inputs.append(x)
        weights.append(torch.zeros(x.shape[:-1], device=x.device))
        return weights[-1]

    def __enter__(self) -> TokenWeights:
        return self

    def __exit__(self, *args: object) -> None:
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Gradients that arrive inside do not count."""
        self.deaf = True
        try:
            yield
        finally:
            self.deaf = False

    @contextmanager
    def apart(self, see: See) -> Iterator[None]:
        """What is found inside goes to `see` at the end and is dropped."""
        kept, (self.inputs, self.weights) = (self.inputs, self.weights), ({}, {})
        try:
            yield
            _tell(self.pairs(), see)
        finally:
            self.inputs, self.weights = kept

    def pairs(self) -> Mapping[str, list[tuple[Tensor, Tensor]]]:
        """For each input key its inputs (..., K) and the token weights (...)."""
        return {key: list(zip(self.inputs[key], self.weights[key], strict=True)) for key in self.weights}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters take no gradient inside: only outputs are differentiated, and a gradient of every weight would cost
    the memory of a second model and stay on the caller's. Weights of an offloaded model are read again on the way back.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with reread(model):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def token_weights(
    model: nn.Module,
    adapter: ModuleType,
    layout: Layout,
    latents: Tensor,
    timestep: Tensor,
    cond: Mapping[str, Tensor],
    seed: int,
    among: tuple[Tensor, int] | None = None,
) -> Mapping[str, list[tuple[Tensor, Tensor]]]:
    """Inputs and weights of every linear at latents (n, ...); one forward and one backward pass.

    `among`: the latents are these rows (n,) of so many, and their directions are those they have there.
    """
    with frozen(model), torch.enable_grad(), TokenWeights(model, layout) as found:
        output = adapter.predict(model, latents.detach().requires_grad_(True), timestep, cond)
        _loss(output, seed, among).backward()
        return found.pairs()


def see_token_weights(
    model: nn.Module,
    adapter: ModuleType,
    layout: Layout,
    latents: Tensor,
    timestep: Tensor,
    cond: Mapping[str, Tensor],
    seed: int,
    among: tuple[Tensor, int] | None,
    see: See,
) -> None:
    """`see(key, x, weight)` of what `token_weights` gives. An offloaded model is run block by block: memory holds what
    enters its blocks and the inside of one of them, and each block is read twice."""
    given = (model, adapter, layout, latents, timestep, cond, seed, among)
    if getattr(model, ATTRIBUTE, None) is not None and not routes_blocks(model):
        try:
            return _by_block(*given, see)
        except RuntimeError as error:
            if "in-place operation" not in str(error):
                raise
            # a block whose inputs do not stay what they were cannot be run again
    _tell(token_weights(*given), see)


def _by_block(
    model: nn.Module, adapter: ModuleType, layout: Layout, latents: Tensor, timestep: Tensor,
    cond: Mapping[str, Tensor], seed: int, among: tuple[Tensor, int] | None, see: See,
) -> None:  # fmt: skip
    with frozen(model), holding(model), torch.enable_grad(), TokenWeights(model, layout) as found:
        with cut(model, layout.blocks) as graph:
            output = adapter.predict(model, latents.detach().requires_grad_(True), timestep, cond)

        def again(run: Callable[[], None]) -> None:
            with found.apart(see):
                run()

        graph.backward(_loss(output, seed, among), again, found.muted)
        _tell(found.pairs(), see)


def _tell(pairs: Mapping[str, list[tuple[Tensor, Tensor]]], see: See) -> None:
    for key, parts in pairs.items():
        for x, weight in parts:
            see(key, x, weight)


def _loss(output: Tensor, seed: int, among: tuple[Tensor, int] | None) -> Tensor:
    """Sum over samples of <v, y / |y|>."""
    flat = output.float().flatten(1)
    rows, size = (slice(None), len(flat)) if among is None else among
    direction = torch.randn(size, flat.shape[1], generator=torch.Generator().manual_seed(seed))[rows].to(flat.device)
    loss: Tensor = (direction * flat / flat.detach().norm(dim=1, keepdim=True)).sum()
    return loss

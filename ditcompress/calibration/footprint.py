"""How much memory running a model takes, told from its configuration: a pass without data under a ledger of storages.

Tensors of such a pass have shapes, dtypes and lifetimes but no bytes (torch's fake tensors), so it takes seconds
whatever the size of the model, for any family, and it sees what a formula would forget: what attention keeps, what
autograd saves, what the collector's own arithmetic needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..models import build_meta
from ..models.base import Layout
from .blockwise import cut
from .collector import GRAM_TOKENS, TOKENS_A_PASS, CalibrationSettings
from .walking import FISHER_CHUNK, FISHER_IMAGES, Abreast

HELD = 1 << 30  # bytes of hidden states of passes that go through an offloaded model together
ONE_ROW = ("modulation", "time_embedding")  # roles that see one row a sample
Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


def free_memory(device: torch.device) -> int:
    """Bytes that a device can still give, without swapping."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch holds it for later
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


class Ledger(TorchDispatchMode):
    """Bytes of all storages that operations inside make, while they live: `peak` is the most at one time. Those of
    `model` do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Followed:
    """Bytes of one pass beside the weights: at most; at most at the entrance of a block; and those that a pass which is
    cut at the blocks keeps for its way back."""

    peak: int
    between: int = 0
    kept: int = 0


def pass_bytes(
    config: Mapping[str, Any], adapter: ModuleType, rows: int, dtype: torch.dtype, *, backward: bool = False,
    hooks: Mapping[str, Hook] | None = None,
) -> int:  # fmt: skip
    """Peak bytes of one prediction for `rows` latents beside the weights: activations, conditions and what `hooks` (by
    module path, as of a forward hook) make. `backward`: with the gradient of the latents."""
    return follow(config, adapter, rows, dtype, backward="whole" if backward else "none", hooks=hooks).peak


def follow(
    config: Mapping[str, Any], adapter: ModuleType, rows: int, dtype: torch.dtype, *,
    backward: Literal["none", "whole", "blockwise"] = "none", hooks: Mapping[str, Hook] | None = None,
    blocks: Sequence[str] = (), dropped: Callable[[], None] | None = None,
) -> Followed:  # fmt: skip
    """As `pass_bytes`, with what is held between `blocks`. `dropped` is called after each of them on the way back."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import

    generator = torch.Generator().manual_seed(0)
    cond = adapter.random_conditions(config, rows, generator)
    latents = torch.zeros(rows, *adapter.latent_shape(config))
    plain = {key: value for key, value in config.items() if key != "quantization_config"}  # experts choose by values
    empty = build_meta(plain).requires_grad_(False)
    between, kept = [0], 0
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.set_grad_enabled(backward != "none"):
        model = _without_data(empty, dtype)
        modules = dict(model.named_modules())  # of a model with experts the dense one
        handles = [modules[path].register_forward_hook(hook) for path, hook in (hooks or {}).items() if path in modules]
        given = {name: fake.from_tensor(tensor) for name, tensor in cond.items()}
        timestep = fake.from_tensor(torch.full((rows,), 500))
        with ExitStack() as stack:
            ledger = stack.enter_context(Ledger(model))
            for path in blocks:
                block = model.get_submodule(path)
                handles.append(block.register_forward_pre_hook(lambda module, args: between.append(ledger.now)))
            x = fake.from_tensor(latents).clone().requires_grad_(backward != "none")
            with ExitStack() as inner:
                graph = inner.enter_context(cut(model, blocks)) if backward == "blockwise" else None
                output = adapter.predict(model, x, timestep, {name: tensor.clone() for name, tensor in given.items()})
            kept = ledger.now
            if graph is not None:

                def again(run: Callable[[], None]) -> None:
                    run()
                    (dropped or (lambda: None))()

                graph.backward(output.float().sum(), again, nullcontext)
            elif backward == "whole":
                output.float().sum().backward()
        for handle in handles:
            handle.remove()
    return Followed(ledger.peak, max(between), kept)


def _without_data(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The meta model with tensors that claim to lie on the CPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def collector_hooks(layout: Layout, settings: CalibrationSettings) -> dict[str, Hook]:
    """The collector's own arithmetic at every input: a part of the tokens in float64, and products of it."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tokens = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        part = tokens[:: max(1, len(tokens) // GRAM_TOKENS)]
        part.double().sum(0)
        if settings.grams:
            part.new_empty(part.shape[1], part.shape[1]) * 1.0

    return {site.name: hook for site in layout.sites}


def fisher_hooks(layout: Layout) -> tuple[dict[str, Hook], list[Tensor]]:
    """What sensitivity.py does at every linear; the list holds the inputs until it is dropped."""
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)
        kept.append(args[0].detach())
        output.register_hook(lambda gradient: kept.append(gradient.detach().float().square().mean(-1)))
        return output

    return {site.name: hook for site in layout.sites}, kept


def branches_of(config: Mapping[str, Any], adapter: ModuleType, guidance: float | None) -> int:
    """2 where a pass holds the prediction without condition too."""
    asked = adapter.default_guidance(config) if guidance is None else guidance
    cond = adapter.random_conditions(config, 1, torch.Generator().manual_seed(0))
    return 2 if asked != 1 and adapter.null_conditions(config, cond) is not None else 1


def collect_bytes(
    config: Mapping[str, Any], adapter: ModuleType, layout: Layout, settings: CalibrationSettings, dtype: torch.dtype,
    *, offloaded: bool = False,
) -> tuple[int, Abreast]:  # fmt: skip
    """Peak bytes of the calibration's passes beside weights and statistics, and how many passes of an offloaded model
    go together: as many as hold `HELD` bytes between its blocks, one at least."""
    branches = branches_of(config, adapter, settings.guidance)
    blocks = layout.blocks if offloaded else ()
    rows = branches * min(settings.batch, settings.samples)
    found = follow(config, adapter, rows, dtype, hooks=collector_hooks(layout, settings), blocks=blocks)
    batches = side_by_side(found.between, -(-settings.samples // settings.batch)) if offloaded else 1
    peak = found.peak + (batches - 1) * found.between
    if settings.weighting != "fisher":
        return peak, Abreast(batches)
    hooks, held = fisher_hooks(layout)
    images = min(settings.samples, settings.batch, FISHER_CHUNK)
    way: Literal["blockwise", "whole"] = "blockwise" if offloaded else "whole"
    back = follow(
        config, adapter, branches * images, dtype, backward=way, hooks=hooks, blocks=blocks, dropped=held.clear
    )
    jobs = batches * -(-min(settings.batch, settings.samples, FISHER_IMAGES) // FISHER_CHUNK)
    backward = side_by_side(back.kept, jobs) if offloaded else 1
    return max(peak, back.peak + (backward - 1) * back.kept), Abreast(batches, backward)


def side_by_side(held: int, most: int) -> int:
    """How many of `most` passes that hold so many bytes between blocks go through an offloaded model together."""
    return max(1, min(most, HELD // max(held, 1)))


def statistics_bytes(layout: Layout, settings: CalibrationSettings) -> int:
    """Bytes of what is gathered, at the end of the pass: Gram matrices, ranges and kept tokens of every input."""
    passes = settings.steps * -(-settings.samples // settings.batch)
    most = settings.buckets * -(-settings.reservoir // settings.buckets)
    gram = 4 if settings.grams else 0
    total = 0
    for site in {site.input_key: site for site in layout.sites}.values():
        rows = 2 * min(settings.batch, settings.samples) if site.role in ONE_ROW else TOKENS_A_PASS
        kept = min(most, min(rows, TOKENS_A_PASS) * passes)
        total += site.in_features * (gram * site.in_features + 8 * settings.buckets + 8 + 4 * kept)
    return total

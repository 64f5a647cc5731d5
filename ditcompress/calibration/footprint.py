"""How much memory running a model takes, told from its configuration: a pass without data under a ledger of storages.

Tensors of such a pass have shapes, dtypes and lifetimes but no bytes (torch's fake tensors), so it takes seconds
whatever the size of the model, for any family, and it sees what a formula would forget: what attention keeps, what
autograd saves, what the collector's own arithmetic needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..models import build_meta
from ..models.base import Layout
from .collect import FISHER_CHUNK
from .collector import GRAM_TOKENS, TOKENS_A_PASS, CalibrationSettings

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


def pass_bytes(
    config: Mapping[str, Any], adapter: ModuleType, rows: int, dtype: torch.dtype, *, backward: bool = False,
    hooks: Mapping[str, Hook] | None = None,
) -> int:  # fmt: skip
    """Peak bytes of one prediction for `rows` latents beside the weights: activations, conditions and what `hooks` (by
    module path, as of a forward hook) make. `backward`: with the gradient of the latents."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import

    generator = torch.Generator().manual_seed(0)
    cond = adapter.random_conditions(config, rows, generator)
    latents = torch.zeros(rows, *adapter.latent_shape(config))
    plain = {key: value for key, value in config.items() if key != "quantization_config"}  # experts choose by values
    empty = build_meta(plain).requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.set_grad_enabled(backward):
        model = _without_data(empty, dtype)
        handles = [model.get_submodule(path).register_forward_hook(hook) for path, hook in (hooks or {}).items()]
        given = {name: fake.from_tensor(tensor) for name, tensor in cond.items()}
        timestep = fake.from_tensor(torch.full((rows,), 500))
        with Ledger(model) as ledger:
            x = fake.from_tensor(latents).clone().requires_grad_(backward)
            output = adapter.predict(model, x, timestep, {name: tensor.clone() for name, tensor in given.items()})
            if backward:
                output.float().sum().backward()
        for handle in handles:
            handle.remove()
    return ledger.peak


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
    config: Mapping[str, Any], adapter: ModuleType, layout: Layout, settings: CalibrationSettings, dtype: torch.dtype
) -> int:
    """Peak bytes of the calibration's passes beside weights and statistics."""
    branches = branches_of(config, adapter, settings.guidance)
    rows = branches * min(settings.batch, settings.samples)
    found = pass_bytes(config, adapter, rows, dtype, hooks=collector_hooks(layout, settings))
    if settings.weighting != "fisher":
        return found
    hooks, _ = fisher_hooks(layout)
    few = branches * min(FISHER_CHUNK, settings.samples)
    return max(found, pass_bytes(config, adapter, few, dtype, backward=True, hooks=hooks))


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

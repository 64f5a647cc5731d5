"""What each model costs: bytes on disk, stored bits, parameters, operations, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.trajectory import prepare
from ..checkpoint.reader import Checkpoint
from ..runtime.linear import PackedLinear
from ..runtime.moe import Router, idle_parameters, router_parameters
from .integrity import Fresh
from .layers import LayerOutput
from .subject import Subject


def disk_bytes(checkpoint: Checkpoint) -> int:
    """Size of the weight files."""
    return sum(file.stat().st_size for file in checkpoint.files)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(_bytes(t) for t in {id(t): t for t in tensors}.values())


def _bytes(tensor: Any) -> int:
    """Of a tensor, or of the parts that another library's tensor type consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())


def logical_parameters(model: nn.Module) -> int:
    """Parameters as the model computes with them: a packed linear counts its weight matrix."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    plain = sum(p.numel() for p in model.parameters()) + router_parameters(model)
    return plain + sum(m.in_features * m.out_features for m in packed)


def tensor_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors by their headers."""
    return sum(entry.stop - entry.start for entry in checkpoint.tensors.values())


def sizes(subject: Subject, layers: list[LayerOutput], fresh: Mapping[str, Fresh]) -> dict[str, Any]:
    """Sizes of both models; bits are counted from what is stored, block bytes from the headers, operations from a
    forward pass of one image, memory by processes of their own (load and one forward pass, imports not counted)."""
    rows: dict[str, Any] = {}
    blocks = tuple(b + "." for b in subject.adapter.layout(subject.original).blocks)
    for key, checkpoint, model in (
        ("original", subject.source, subject.original),
        ("compressed", subject.result, subject.compressed),
    ):
        entries = checkpoint.tensors.items()
        rows[key] = {
            "disk_bytes": disk_bytes(checkpoint),
            "tensor_bytes": tensor_bytes(checkpoint),
            "block_bytes": sum(e.stop - e.start for n, e in entries if n.startswith(blocks)),
            "resident_bytes": resident_bytes(model),
            "parameters": logical_parameters(model),
            "active_parameters": logical_parameters(model) - idle_parameters(model),
            "flops": forward_flops(subject, model),
            "loaded_bytes": fresh[key].resident if key in fresh else None,
            "peak_bytes": fresh[key].peak if key in fresh else None,
        }
    quantized = sum(layer.weights for layer in layers)
    stored = sum(layer.weights * layer.bits for layer in layers)
    rows["quantized_weights"] = quantized
    rows["bits_per_quantized_weight"] = stored / quantized if quantized else None
    rows["ratio"] = rows["original"]["disk_bytes"] / rows["compressed"]["disk_bytes"]
    rows["block_ratio"] = rows["original"]["block_bytes"] / max(rows["compressed"]["block_bytes"], 1)
    roles: dict[str, list[float]] = {}
    for layer in layers:
        entry = roles.setdefault(layer.role, [0, 0.0])
        entry[0] += layer.weights
        entry[1] += layer.weights * layer.bits / 8
    rows["roles"] = {role: {"weights": int(w), "bytes": int(b), "bits": 8 * b / w} for role, (w, b) in roles.items()}
    return rows


# what FlopCounterMode calls the products of linears: they are counted by hooks, so that packed ones count alike
_LINEAR_OPS = ("mm", "addmm", "_int_mm", "linear")


def forward_flops(subject: Subject, model: nn.Module) -> int:
    """Floating or integer operations of one forward pass for one image: two for each multiply and add."""
    from torch.utils.flop_counter import FlopCounterMode

    counted = 0

    def linear(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal counted
        rows = output.numel() // output.shape[-1]
        rank = module.scheme.rank if isinstance(module, PackedLinear) else 0
        if isinstance(module, Router):
            high, wide = module.weight.shape
        else:
            wide, high = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
        counted += 2 * rows * (wide * high + rank * (wide + high))

    linears = [m for m in model.modules() if isinstance(m, (nn.Linear, PackedLinear, Router))]
    handles = [module.register_forward_hook(linear) for module in linears]
    try:
        with FlopCounterMode(display=False) as counter:
            one_forward(subject, model, 1)()
    finally:
        for handle in handles:
            handle.remove()
    others = counter.get_flop_counts().get("Global", {})
    return counted + sum(n for op, n in others.items() if str(op).rpartition(".")[2] not in _LINEAR_OPS)


def one_forward(subject: Subject, model: nn.Module, batch: int) -> Callable[[], Tensor]:
    """A forward pass on random latents of the middle of the trajectory, conditions in turn."""
    index = torch.arange(batch) % subject.conditions.count
    shape = subject.adapter.latent_shape(subject.config)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, *shape, generator=generator).to(subject.settings.device)
    sampler = prepare(subject.scheduler, subject.settings.steps, subject.adapter, subject.config)
    timestep = torch.as_tensor(sampler.timesteps[len(sampler.timesteps) // 2]).expand(batch)
    return lambda: subject.predict(model, latents, timestep, index, False)

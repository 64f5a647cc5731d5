"""What each model costs: bytes on disk, stored bits, parameters, memory of the weights, time of one forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..checkpoint.reader import Checkpoint
from ..runtime.linear import PackedLinear
from .layers import LayerOutput
from .subject import Subject

REPEATS = 5
BATCH = 8


def disk_bytes(checkpoint: Checkpoint) -> int:
    """Size of the weight files."""
    return sum(file.stat().st_size for file in checkpoint.files)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def logical_parameters(model: nn.Module) -> int:
    """Parameters as the model computes with them: a packed linear counts its weight matrix."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    return sum(p.numel() for p in model.parameters()) + sum(m.in_features * m.out_features for m in packed)


def tensor_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors by their headers."""
    return sum(entry.stop - entry.start for entry in checkpoint.tensors.values())


def sizes(subject: Subject, layers: list[LayerOutput]) -> dict[str, Any]:
    """Sizes of both models; bits are counted from what is stored, block bytes from the headers."""
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


def _forward(subject: Subject, model: nn.Module) -> Callable[[], None]:
    index = torch.arange(min(BATCH, subject.conditions.count))
    shape = subject.adapter.latent_shape(subject.config)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(index), *shape, generator=generator).to(subject.settings.device)
    scheduler_time = torch.full((len(index),), 500.0 if subject.scheduler.config.get("num_train_timesteps") else 0.5)
    return lambda: void(subject.predict(model, latents, scheduler_time, index, False))


def void(_: Any) -> None:
    return None


def speed(subject: Subject) -> dict[str, Any]:
    """Seconds of one forward pass of both models, in turns; the ratio is original over compressed."""
    runs = {"original": _forward(subject, subject.original), "compressed": _forward(subject, subject.compressed)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first is warm-up
                times[name].append(time.perf_counter() - start)
    packed = [m for m in subject.compressed.modules() if isinstance(m, PackedLinear)]
    decoded = [m for m in packed if m.scheme.weight.params.get("bits", 8) < 8]
    ratio = statistics.median(times["original"]) / statistics.median(times["compressed"])
    return {
        "batch": min(BATCH, subject.conditions.count),
        "original_s": statistics.median(times["original"]),
        "compressed_s": statistics.median(times["compressed"]),
        "spread": {name: [min(t), max(t)] for name, t in times.items()},
        "ratio": ratio,
        "warning": f"{len(decoded)} of {len(packed)} packed layers decode their weights at each call: "
        "no speed-up is claimed"
        if decoded
        else "",
    }

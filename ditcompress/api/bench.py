"""bench: the speed of checkpoints side by side, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..console import Reporter, Silent
from ..errors import DitcompressError
from ..evaluation.bench import MODES, Bench, measure
from ..evaluation.settings import EvaluateSettings
from ..evaluation.subject import open_single
from ..loading import dequantized, load_model
from ..models import adapter_for
from .calibration import pick_device, pick_dtype


def bench(
    checkpoints: Sequence[str | Path],
    *,
    batch: int = 8,
    modes: Sequence[str] = (),
    seconds: float = 5.0,
    steps: int = 0,
    peers: bool = True,
    device: str = "auto",
    dtype: str = "bfloat16",
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Times of checkpoints of one family, each in eager mode, as a CUDA graph and compiled (`modes`; all that the
    device has by default), at the levels linear, block, forward and (with `steps`) sampling.

    The plain arm that ratios are to is the first checkpoint with its weights decoded to `dtype`; `peers` that are
    installed quantize that too. Errors are SQNRs of a forward pass to the plain arm in float32. E203 for an unknown
    mode, E340 for checkpoints that do not take the same inputs.
    """
    where, reporter = pick_device(device), reporter or Silent()
    target = pick_dtype(dtype)
    able = tuple(m for m in MODES if m != "graph" or where.type == "cuda")
    chosen = tuple(modes) or able
    for mode in chosen:
        if mode not in able:
            raise DitcompressError("E203", f"--mode {mode}", f"is none for {where.type}", f"take {', '.join(able)}")
    settings = EvaluateSettings(steps=max(steps, 1), seed=seed, batch=batch, dtype=dtype, device=str(where))
    first = Path(checkpoints[0])
    subject = open_single(first, settings, batch, reporter=reporter)
    models: dict[str, nn.Module] = {}
    plain = dequantized(load_model(first)[0]).to(target).to(where).eval()
    models[f"{dtype} ({first.name})"] = plain
    shape = subject.adapter.latent_shape(subject.config)
    for path in checkpoints:
        model, source = load_model(path, dtype=target, device=where)
        if (
            source.class_name != subject.source.class_name
            or adapter_for(source.config).latent_shape(source.config) != shape
        ):
            raise DitcompressError("E340", path, f"takes other inputs than {first}", "give versions of one model")
        if source.quantization is None and Path(path) == first:
            continue
        models[_unused(Path(path).name, models)] = model
    facts = measure(
        subject, models, Bench(batch, tuple(m for m in MODES if m in chosen), seconds, steps, peers), reporter
    )
    if where.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(where)
    return facts


def _unused(name: str, taken: dict[str, nn.Module]) -> str:
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique

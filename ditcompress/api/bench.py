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
from ..evaluation.subject import check_versions, open_single
from ..loading import dequantized, load_model
from ..ranks import alone
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
    alone("bench")
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
    packed = subject.source.quantization is not None
    plain = dequantized(load_model(first)[0]).to(target).to(where).eval() if packed else subject.original
    models: dict[str, nn.Module] = {f"{dtype} ({first.name})": plain}
    if packed:
        models[first.name] = subject.original
    for path in checkpoints[1:]:
        model, source = load_model(path, dtype=target, device=where)
        check_versions(subject.source, source)
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

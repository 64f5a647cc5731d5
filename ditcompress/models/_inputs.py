"""Small tools that the families share for calling `forward`: dtypes, moving conditions, random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Conditions = dict[str, Tensor]


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most of the model's floating parameters have; float32 for a model without any."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def moved(cond: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> Conditions:
    """`cond` on `device`, floating tensors as `dtype`; integer labels and masks keep theirs."""
    return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in cond.items()}


def first_channels(output: Tensor, latents: Tensor) -> Tensor:
    """The prediction without the learned variance (its second half of channels), in the dtype of `latents`."""
    return output[:, : latents.shape[1]].to(latents.dtype)


def built(cls: type, config: Mapping[str, Any], seed: int) -> nn.Module:
    """A float32 evaluation-mode model of `cls` with random weights, every one of them far from trivial.

    Matrices have unit gain, norm gains lie around one, biases around zero; the caller's random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = cls(**config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()

"""How far one tensor is from another. Everything is computed in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PART = 1 << 17  # values at a time, so that their float64 copies stay in the cache


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio of whole tensors in dB; +inf when they are equal."""
    signal = noise = torch.zeros((), dtype=torch.float64, device=reference.device)
    for one, other in zip(reference.flatten().split(PART), approximation.flatten().split(PART), strict=True):
        one, other = one.double(), other.double()
        other = other - one
        signal, noise = signal + torch.dot(one, one), noise + torch.dot(other, other)
    given, lost = torch.stack([signal, noise]).tolist()  # one wait for the device
    return ratio_db(lost / given) if given > 0 else (math.inf if lost == 0 else -math.inf)


def output_sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """-10 log10 of the mean over samples (dimension 0) of the relative squared error, in dB."""
    return ratio_db(relative_errors(reference, approximation).mean().item())


def relative_errors(reference: Tensor, approximation: Tensor) -> Tensor:
    """Squared error over squared norm for each sample, shape (samples,), float64."""
    reference, approximation = reference.double().flatten(1), approximation.double().flatten(1)
    return (approximation - reference).square().sum(1) / reference.square().sum(1).clamp_min(1e-300)


def ratio_db(ratio: float) -> float:
    """-10 log10(ratio): a noise-to-signal ratio as dB."""
    return math.inf if ratio == 0 else -10 * math.log10(ratio)


def cosine(reference: Tensor, approximation: Tensor) -> float:
    """Cosine similarity of whole tensors; 1 for two zero tensors."""
    a, b = reference.double().flatten(), approximation.double().flatten()
    norm = (a.norm() * b.norm()).item()
    return torch.dot(a, b).item() / norm if norm > 0 else float(torch.equal(a, b))

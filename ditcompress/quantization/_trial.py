"""Output error of one linear on the calibration tokens, with its activation quantizer: what searches compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.activation import fake_quantize
from .base import Layer


@dataclass(frozen=True)
class Trial:
    """Tokens of one linear as it sees them (rows, in), as it will see them rounded, and its output (rows, out)."""

    tokens: Tensor
    rounded: Tensor
    output: Tensor

    def error(self, weight: Tensor, low_rank: tuple[Tensor, Tensor] | None = None, low_rank_input: str = "") -> float:
        """Squared error of the outputs with `weight` (out, in) and low-rank factors up (out, r) and down (r, in)."""
        output = self.rounded @ weight.t()
        if low_rank is not None:
            x = self.tokens if low_rank_input == "float" else self.rounded
            output = output + (x @ low_rank[1].float().t()) @ low_rank[0].float().t()
        return (output - self.output).square().sum().item()


def trial(layer: Layer, most: int) -> Trial:
    """At most `most` evenly spaced tokens of the layer's reservoir, smoothed and rotated as the layer is."""
    tokens = layer.effective_tokens()
    tokens = tokens[torch.linspace(0, len(tokens) - 1, min(most, len(tokens))).long()]
    spec, layer_weight = layer.decision.activation, layer.effective_weight().float()
    rounded = tokens if spec.mode in ("none", "static") else fake_quantize(tokens, spec)
    return Trial(tokens, rounded, tokens @ layer_weight.t())

"""Biases are trained to undo what rounding did to the output, all together and against the whole model (ours).

Codes stay as the step before left them. Biases are stored in floating point anyway, so nothing grows. Layer-wise bias
correction (matching mean outputs; Nagel et al. 2019, arXiv 1906.04721) finds other values: on the embedded model at
two bits it loses 0.6 dB where these gain 2. Needs a recipe with a section `training` and memory for the model three
times; left out elsewhere. Not for 4-bit inputs, whose rounding no constant can undo.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ..errors import DitcompressError
from ..formats.base import StrictParams
from ..hadamard import unrotate
from ._trained import Quantizer
from .base import Encoded, Layer

NEEDS = ("tokens",)
AFTER = True  # learns on top of what the encoding step made; a plan without training is whole without it


class Params(StrictParams):
    """`rate`: learning rate of the biases, in units of the error that rounding left in their linear's outputs: a bias
    must not move by more than it could mend."""

    rate: float = Field(0.03, gt=0)


class Fixed(Quantizer):
    """A rounded weight that stays as it is, beside a bias that is trained."""

    trains_bias = True

    def __init__(self, layer: Layer, params: Params, encoded: Encoded) -> None:
        super().__init__()
        self.stored, weight = encoded, encoded.dequantize()
        self.rates = {"bias": params.rate * left(layer, weight)}
        weight = weight if layer.sign is None else unrotate(weight, layer.sign, layer.decision.rotate)
        self.rounded = weight  # no buffer: it is no part of a training state

    def forward(self, weight: Tensor) -> Tensor:
        return self.rounded

    def encoded(self, weight: Tensor) -> Encoded:
        return self.stored


def left(layer: Layer, rounded: Tensor) -> float:
    """Root mean square of what rounding changed in the outputs, on the kept tokens."""
    tokens = layer.effective_tokens()
    if not len(tokens):
        raise DitcompressError(
            "E331", layer.name, "no tokens were kept", "calibrate with calibration.reservoir above 0"
        )
    error = tokens @ (rounded - layer.effective_weight().float()).T
    return float(error.square().mean().sqrt())


def trainable(layer: Layer, params: Params, encoded: Encoded) -> Quantizer:
    return Fixed(layer, params, encoded)

"""The digit classifier that judges the embedded model: 8x8 digits, 32 penultimate features."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from safetensors.torch import load
from torch import Tensor, nn


class DigitClassifier(nn.Module):
    """Images (n, 1, 8, 8) float32 in [-1, 1] to logits (n, 10); `features` are (n, 32)."""

    def __init__(self) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(4, outputs), nn.GELU()
            )

        self.body = nn.Sequential(layer(1, 32, 1), layer(32, 48, 2), layer(48, 64, 2))
        self.project = nn.Linear(64 * 4, 32)
        self.head = nn.Linear(32, 10)

    def features(self, images: Tensor) -> Tensor:
        return self.project(self.body(images).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(nn.functional.gelu(self.features(images)))


def digits_folder() -> Path:
    """The folder of the embedded model (a diffusers pipeline folder)."""
    return Path(str(resources.files("ditcompress"))) / "assets" / "digits"


def load_digit_classifier() -> DigitClassifier:
    """The trained classifier in eval mode."""
    model = DigitClassifier().eval()
    model.load_state_dict(load((digits_folder() / "classifier.safetensors").read_bytes()))
    return model


def classifier_accuracy() -> float:
    """Its accuracy on held-out real digits, as measured when it was trained."""
    return float(json.loads((digits_folder() / "training.json").read_text())["classifier_accuracy"])

"""DINOv2 features from a local folder (--weights-dir/dinov2): the class token after the last norm, the extractor of
FD-DINOv2 (Stein et al. 2023, "Exposing flaws of generative model evaluation metrics").

As there, 8-bit images are resized with bicubic interpolation (Pillow) to 224 pixels and normalised with ImageNet's
mean and deviation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..local_weights import Pinned, Unavailable, library
from ..pixels import rgb, to_pil
from . import Extractor, Request
from ._local import opened, pinned

LABEL = "DINOv2"
SIZE = 224
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def open_extractor(request: Request) -> Extractor:
    """E337 without pinned weights."""

    def make() -> tuple[Any, Pinned]:
        weights = pinned(request, "dinov2")
        transformers = library("transformers", "transformers")
        model, info = transformers.Dinov2Model.from_pretrained(
            str(weights.path), use_safetensors=True, dtype=torch.float32, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
        if info["missing_keys"]:
            raise Unavailable(f"{weights.path.name} lacks {len(info['missing_keys'])} tensors of a DINOv2 model")
        model = model.eval().to(request.device)

        def features(images: Tensor) -> Tensor:
            return model(pixel_values=prepared(images).to(request.device)).pooler_output

        return features, weights

    return opened(LABEL, request, make)


def prepared(images: Tensor) -> Tensor:
    """Grey or RGB images in [-1, 1] to normalised (n, 3, 224, 224)."""
    resized = [image.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in to_pil(rgb(images))]
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in resized])
    return (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN) / DEVIATION

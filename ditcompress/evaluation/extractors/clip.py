"""CLIP image features from a local folder (--weights-dir/clip), as CMMD uses them: a transformers CLIP model, pinned
in SHA256SUMS."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..clip import load_clip
from ..local_weights import Pinned
from ..pixels import rgb
from . import Extractor, Request
from ._local import opened, pinned

LABEL = "CLIP"


def open_extractor(request: Request) -> Extractor:
    """E337 without pinned weights."""

    def make() -> tuple[Any, Pinned]:
        weights = pinned(request, "clip")
        clip = load_clip(request, request.argument or "clip", texts=False)

        def features(images: Tensor) -> Tensor:
            return clip.images(rgb(images))

        return features, weights

    return opened(LABEL, request, make)

"""The 2048 pooled features of FID's Inception from a local file (--weights-dir/inception), through torch-fidelity's
port of the TensorFlow network; images are rounded to 8 bits, as FID is published."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..external.inception_fid import WEIGHTS, load_inception
from ..local_weights import Pinned
from ..pixels import rgb, to_bytes
from . import Extractor, Request
from ._local import opened, pinned

LABEL = "Inception"


def open_extractor(request: Request) -> Extractor:
    """E337 without torch-fidelity or pinned weights."""

    def make() -> tuple[Any, Pinned]:
        weights = pinned(request, WEIGHTS[0])
        network = load_inception(weights, request.device)

        def features(images: Tensor) -> Tensor:
            return network(to_bytes(rgb(images)).to(request.device))[0]

        return features, weights

    return opened(LABEL, request, make)

"""The user's own network as a TorchScript file: images (n, channels, height, width) in [-1, 1] to features (n, d)."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch

from . import Extractor, Request, failed

LABEL = "TorchScript file"


def open_extractor(request: Request) -> Extractor:
    """E337 for a file that does not load or run on the model's images."""
    path = Path(request.argument)
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = torch.jit.load(str(path), map_location=request.device).eval()
        with torch.no_grad():
            network(torch.zeros(2, *request.shape, device=request.device))
    except Exception as error:
        raise failed(path, error, f"give a TorchScript network for {request.shape} images") from None
    return Extractor(path.name, digest, lambda images: network(images.to(request.device)))

"""LPIPS (Zhang et al. 2018, version 0.1, AlexNet): perceptual distance of every pair, through the lpips package.

The package brings the heads; the trunk is torchvision's AlexNet from a local file, never fetched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...result import Measurement
from ..intervals import mean_interval
from ..local_weights import Pinned, Unavailable, library, load_state, pinned
from ._rows import BATCH, pairs
from .base import Samples, enough

LABEL = "LPIPS (AlexNet)"
EXTRA = "lpips"
WEIGHTS = ("lpips/alexnet-owt-7be5be79.pth",)


@torch.no_grad()
def measure(samples: Samples) -> list[Measurement]:
    n = enough(samples, 2)
    weights = pinned(samples, WEIGHTS[0])
    model = _model(weights).to(samples.device)
    values, identical = [], True
    for _, first, second in pairs(samples, BATCH):
        identical &= torch.equal(first, second)
        values.append(model(first.to(samples.device), second.to(samples.device)).flatten().double().cpu().numpy())
    found = np.concatenate(values)
    if not np.isfinite(found).all():
        raise Unavailable("some distances are not finite")
    low, high = mean_interval(found)
    return [
        Measurement("lpips", LABEL, "T5", "", False, float(found.mean()), low, high, n=n, identical=identical,
                    note=weights.note)
    ]  # fmt: skip


def _model(weights: Pinned) -> Any:
    """The package's model built without its trunk's weights (`pnet_rand`: no download), then given the local ones."""
    model = library("lpips", f"ditcompress[{EXTRA}]").LPIPS(net="alex", pnet_rand=True, verbose=False)
    given = load_state(weights.path)
    trunk = {}
    for key in model.net.state_dict():  # "slice2.3.weight" is torchvision's "features.3.weight"
        _, _, layer = key.partition(".")
        if f"features.{layer}" not in given:
            raise Unavailable(f"{WEIGHTS[0]} has no features.{layer}: not torchvision's AlexNet")
        trunk[key] = given[f"features.{layer}"]
    model.net.load_state_dict(trunk)
    return model.eval()

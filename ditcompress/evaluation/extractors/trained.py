"""A small classifier trained on the reference's labels: features for T4 without any download.

Three quarters of the reference train it, the rest give the held-out accuracy that is printed with every number and
must reach the floor. The same reference and seed give the same network; it is kept between runs.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...console import Reporter
from ...errors import DitcompressError
from ..reference import Reference
from . import Extractor, Request, failed, module_digest

LABEL = "classifier trained on the reference"
SIDE = 64  # larger images are averaged down to it
STEPS, BATCH, DIMENSIONS = 800, 128, 64
MOST = 20_000  # images used


class Network(nn.Module):
    """Strided convolutions down to 4x4 or less, (n, 64) features, a linear head."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, side = shape[0], min(SIDE, max(shape[1:]))
        self.side = side
        layers: list[nn.Module] = []
        width, stride = 32, 1
        while side > 4 or not layers:
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.GroupNorm(8, width), nn.GELU()]
            side, channels = -(-side // stride), width
            width, stride = min(width * 2, 128), 2
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2))
        self.project = nn.Linear(channels * 4, DIMENSIONS)
        self.head = nn.Linear(DIMENSIONS, classes)

    def features(self, images: Tensor) -> Tensor:
        if max(images.shape[2:]) > self.side:
            images = F.interpolate(images, (self.side, self.side), mode="area")
        return self.project(self.body(images).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.gelu(self.features(images)))


def open_extractor(request: Request) -> Extractor:
    """The network for this reference, trained now or kept from before; E335 below the floor, E337 without labels."""
    reference = request.reference
    if reference is None or reference.labels is None:
        raise failed("--extractor trained", "the reference has no labels", "give labels, or another extractor")
    classes = int(reference.labels.max()) + 1
    model, key = Network(reference.shape, classes), _key(reference, request.seed)
    kept = request.cache / f"{key}.safetensors" if request.cache else None
    accuracy = _load(model, kept)
    if accuracy is None:
        accuracy = train(model, reference, request.seed, request.reporter)
        _store(model, accuracy, kept)
    if accuracy < request.floor:
        raise DitcompressError(
            "E335", LABEL, f"held-out accuracy {accuracy:.3f} is below {request.floor:g}",
            "give --extractor, or lower --extractor-floor",
        )  # fmt: skip
    model.eval()
    return Extractor(LABEL, module_digest(model), model.features, model, classes, accuracy)


def _key(reference: Reference, seed: int) -> str:
    """Of the images and labels themselves, the seed and this recipe of training."""
    digest = hashlib.sha256(f"{seed}/{SIDE}/{STEPS}/{BATCH}/{DIMENSIONS}/{MOST}".encode())
    for chunk in reference.chunks():
        digest.update(chunk.contiguous().numpy().tobytes())
    assert reference.labels is not None
    digest.update(reference.labels.numpy().tobytes())
    return digest.hexdigest()[:32]


def _load(model: Network, path: Path | None) -> float | None:
    if path is None or not path.is_file():
        return None
    try:
        model.load_state_dict(load_file(path))
        return float(json.loads(path.with_suffix(".json").read_text())["accuracy"])
    except Exception:
        return None  # a damaged copy is trained again


def _store(model: Network, accuracy: float, path: Path | None) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"accuracy": accuracy}))
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, f"{path}.part")
    os.replace(f"{path}.part", path)


def _sample(reference: Reference, model: Network, seed: int) -> tuple[Tensor, Tensor]:
    """Up to MOST seeded-random images, at the network's size, with their labels."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(reference), dtype=torch.bool)
    chosen[torch.randperm(len(reference), generator=generator)[:MOST]] = True
    images, start = [], 0
    for chunk in reference.chunks():
        part = chunk[chosen[start : start + len(chunk)]]
        start += len(chunk)
        if len(part):
            images.append(F.interpolate(part, (model.side, model.side), mode="area"))
    assert reference.labels is not None
    return torch.cat(images), reference.labels[chosen]


def train(model: Network, reference: Reference, seed: int, reporter: Reporter) -> float:
    """Train in place; the accuracy on the held-out quarter."""
    images, labels = _sample(reference, model, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    split = max(1, len(images) * 3 // 4)
    fit, held_out = order[:split], order[split:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    model.train()
    with reporter.task("feature extractor", STEPS) as advance:
        for _ in range(STEPS):
            pick = fit[torch.randint(len(fit), (BATCH,), generator=generator)]
            loss = F.cross_entropy(model(_jittered(images[pick], generator)), labels[pick], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1)
    model.eval()
    with torch.no_grad():
        guesses = torch.cat([model(part).argmax(1) for part in images[held_out].split(256)])
    return float((guesses == labels[held_out]).float().mean()) if len(held_out) else 0.0


def _jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by up to an eighth of its size."""
    most = max(1, images.shape[-1] // 16)
    dy, dx = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
    padded = F.pad(images, (most, most, most, most), mode="replicate")
    size = images.shape[-1]
    return padded[..., most + dy : most + dy + size, most + dx : most + dx + size]

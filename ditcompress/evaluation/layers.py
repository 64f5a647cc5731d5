"""T1, layers: how far each compressed linear's output is from the original's when both models see the same latents.

Outputs and not weights are compared, because smoothing changes a weight without changing the function. The error of
a layer includes what its predecessors added. Diagnostic only: nothing is gated on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bnb import DecodedLinear
from ..calibration.trajectory import StepRecord
from ..distill.matching import read_kept
from ..measures import cosine, sqnr_db
from ..models import renamed
from ..runtime.kernels import choose
from ..runtime.linear import PackedLinear
from .subject import Subject

IMAGES = 4


@dataclass(frozen=True)
class LayerOutput:
    """SQNR in dB and cosine of one linear's output, NaN where it is narrower than the original's; `bits` are stored
    bits per weight; `weight_sqnr_db` is that of the weight itself as `quantize` recorded it (None where there is no
    record)."""

    name: str
    role: str
    block: str
    sqnr_db: float
    cosine: float
    bits: float
    weights: int
    format: str
    activation: str
    kernel: str
    dead: bool
    weight_sqnr_db: float | None = None


@contextmanager
def captured(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of the named modules of the next forward pass, float32 on CPU: in their own place, which is the first,
    where they stand in several."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.setdefault(name, output.detach().float().cpu())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def compare_layers(subject: Subject) -> list[LayerOutput]:
    """One record for each packed linear, in forward order, on a few images in the middle of their trajectory."""
    kinds = (PackedLinear, DecodedLinear)
    known = {name for name, _ in subject.original.named_modules()}  # a linear of an expert has no counterpart
    layout = subject.adapter.layout(subject.original)
    kept = read_kept(subject.result.folder, layout.blocks) or {}  # blocks of a pruned model have other numbers
    was = {n: renamed(n, kept) for n, m in subject.compressed.named_modules() if isinstance(m, kinds)}
    packed = {n: m for n, m in subject.compressed.named_modules() if n in was and was[n] in known}
    if not packed:
        return []
    indices = list(range(min(IMAGES, subject.conditions.count)))
    middle: dict[int, StepRecord] = {}

    def keep(record: StepRecord) -> None:
        if record.index == (subject.settings.steps * 3) // 4:
            middle[0] = record

    subject.sample(subject.original, indices, on_step=keep)
    record = middle[0]
    timestep = torch.as_tensor(record.timestep).expand(len(indices))
    found = {}
    for key, model, places in (
        ("original", subject.original, [was[name] for name in packed]), ("compressed", subject.compressed, list(packed))
    ):  # fmt: skip
        with captured(model, places) as outputs:
            subject.predict(model, record.model_input, timestep, torch.tensor(indices), False)
        found[key] = outputs
    roles = {site.name: (site.role, site.block) for site in layout.sites}
    order = {site.name: place for place, site in enumerate(layout.sites)}
    names = sorted((n for n in packed if was[n] in found["original"]), key=lambda n: order.get(was[n], len(order)))
    recorded = recorded_weight_sqnr(subject.result.folder)
    return [
        _one(name, packed[name], found["original"][was[name]], found["compressed"][name],
             roles.get(was[name], ("other", "")), recorded.get(name))
        for name in names
    ]  # fmt: skip


def recorded_weight_sqnr(folder: Path) -> dict[str, float]:
    """Weight SQNR of each linear from the `layers.json` that `quantize` left: measured there on the smoothed weight,
    which cannot be had back from the stored one. Empty where the file is missing or not ours."""
    try:
        rows = json.loads((folder / "layers.json").read_text(encoding="utf-8"))
        return {str(row["site"]): float(row["weight_sqnr_db"]) for row in rows if row["weight_sqnr_db"] is not None}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _one(
    name: str,
    layer: PackedLinear | DecodedLinear,
    reference: Tensor,
    output: Tensor,
    place: tuple[str, str],
    weight_sqnr: float | None,
) -> LayerOutput:
    role, block = place
    alike = reference.shape == output.shape  # a narrower linear has fewer outputs: there is nothing to compare
    weights = layer.in_features * layer.out_features
    rows = output.flatten(0, -2)
    constant = (
        len(rows) > 1
        and bool((rows == rows[0]).all())
        and not bool((reference.flatten(0, -2) == reference.flatten(0, -2)[0]).all())
    )
    return LayerOutput(
        name=name,
        role=role,
        block=block,
        sqnr_db=sqnr_db(reference, output) if alike else math.nan,
        cosine=cosine(reference, output) if alike else math.nan,
        weights=weights,
        **_stored(layer, weights),
        dead=constant or not bool(torch.isfinite(output).all()),
        weight_sqnr_db=weight_sqnr,
    )


def _stored(layer: PackedLinear | DecodedLinear, weights: int) -> dict[str, Any]:
    """How the weight is stored and run. Decoded weights of bitsandbytes run in floating point here."""
    if isinstance(layer, DecodedLinear):
        bits = 8 * layer.stored.bytes / weights
        activation = "int8 per token" if layer.stored.kind == "int8" else "float"
        return {
            "bits": bits,
            "format": f"bitsandbytes-{layer.stored.kind}",
            "activation": activation,
            "kernel": "decoded",
        }
    spec, inputs = layer.scheme.weight, layer.scheme.activation
    return {
        "bits": 8 * layer.stored_bytes / weights,
        "format": f"{spec.format}{spec.params.get('bits', '')}",
        "activation": str(inputs),
        "kernel": choose(layer.scheme, subject_device(layer)),
    }


def subject_device(layer: PackedLinear) -> str:
    return next(iter(layer.stored_tensors().values())).device.type

"""A plain diffusers folder that stock diffusers loads without us.

Weights are decoded, smoothing is undone, low-rank parts are added. Activation quantization is a matter of running, not
of weights, so it is not part of the export.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint, check_tensors, open_checkpoint
from ..checkpoint.writer import ShardWriter, copy_pipeline
from ..loading import DitcompressConfig, expected_shapes, meta_model
from ..models import build_meta
from ..runtime.linear import PackedLinear

NEEDS_FOLDER = True


def plain_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}


def decoded(checkpoint: Checkpoint, layer: str, packed: PackedLinear) -> Tensor:
    """The float32 weight (out, in) of one packed linear, read from the checkpoint."""
    tensors = {name: checkpoint.read(f"{layer}.{name}") for name in packed.stored}
    full = PackedLinear(packed.in_features, packed.out_features, False, packed.scheme)
    for name, tensor in tensors.items():
        setattr(full, name, tensor)
    return full.weight


def export(checkpoint: Checkpoint, target: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write the folder in `dtype`, one linear at a time, and check its names and shapes against the plain model."""
    component = checkpoint.component if checkpoint.pipeline else ""
    folder = target / component
    folder.mkdir(exist_ok=True)
    model = meta_model(checkpoint.config)
    layers = DitcompressConfig(
        **{k: v for k, v in (checkpoint.quantization or {}).items() if k != "quant_method"}
    ).layers
    stored = {f"{name}.{suffix}" for name in layers for suffix in _packed(model, name).stored}
    writer = ShardWriter(folder)
    for name in layers:
        writer.add(f"{name}.weight", decoded(checkpoint, name, _packed(model, name)).to(dtype))
    for name in checkpoint.tensors:
        if name not in stored:
            tensor = checkpoint.read(name)
            writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    files = writer.finish()
    config = plain_config(checkpoint)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if checkpoint.pipeline:
        copy_pipeline(checkpoint.pipeline, target, component)
    again = open_checkpoint(folder)
    check_tensors(again, expected_shapes(build_meta(config)))
    return {
        "tensors": len(again.tensors),
        "bytes": sum(f.stat().st_size for f in files),
        "verified": "0 missing and 0 unexpected keys against the plain model",
    }


def _packed(model: torch.nn.Module, name: str) -> PackedLinear:
    module = model.get_submodule(name)
    assert isinstance(module, PackedLinear)
    return module

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
from ..checkpoint.writer import ShardWriter, copy_rest
from ..errors import DitcompressError
from ..loading import DitcompressConfig, expected_shapes, meta_model
from ..models import build_meta
from ..runtime.linear import PackedLinear
from ..sharing import everywhere
from ._verify import cast, check_written, digest

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
    """Write the folder in `dtype`, one tensor at a time, then read it back: names and shapes are those of the plain
    model, every value is the one written. Raises E701 when a value does not fit `dtype`."""
    component = checkpoint.component if checkpoint.pipeline else ""
    folder = target / component
    folder.mkdir(exist_ok=True)
    model = meta_model(checkpoint.config)
    config = DitcompressConfig.of(checkpoint.config)
    if config and (config.shapes or config.linear or config.text):
        what = "has layers that no plain config.json can describe"
        raise DitcompressError("E205", checkpoint.folder, what, "load it after `import ditcompress`")
    layers = config.layers if config else {}
    for name in layers:
        if _packed(model, name).scheme.output_norm:
            raise DitcompressError(
                "E205", name, "normalises its output", "use --format safetensors: no plain model does"
            )
    stored = {f"{name}.{suffix}" for name in layers for suffix in _packed(model, name).stored}
    writer = ShardWriter(folder)
    digests: dict[str, str] = {}

    def add(name: str, tensor: Tensor) -> None:
        value = cast(name, tensor, dtype) if tensor.is_floating_point() else tensor
        digests[name] = digest(value)
        writer.add(name, value)

    plain = [*(f"{name}.weight" for name in layers), *(name for name in checkpoint.tensors if name not in stored)]
    for name, owner in everywhere({name: name for name in plain}, config.shared if config else {}).items():
        layer = owner.removesuffix(".weight")
        packed = layer in layers and owner != layer
        add(name, decoded(checkpoint, layer, _packed(model, layer)) if packed else checkpoint.read(owner))
    files = writer.finish()
    _write_rest(checkpoint, target, folder)
    again = open_checkpoint(folder)
    check_tensors(again, expected_shapes(build_meta(plain_config(checkpoint))))
    check_written(again, digests)
    return {
        "tensors": len(again.tensors),
        "bytes": sum(f.stat().st_size for f in files),
        "verified": "0 missing and 0 unexpected keys against the plain model; every tensor reads back equal",
    }


def _write_rest(checkpoint: Checkpoint, target: Path, folder: Path) -> None:
    """config.json without our entry, and the pipeline's other components or the model's own scheduler."""
    text = json.dumps(plain_config(checkpoint), indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")
    copy_rest(checkpoint, target)


def _packed(model: torch.nn.Module, name: str) -> PackedLinear:
    module = model.get_submodule(name)
    assert isinstance(module, PackedLinear)
    return module

"""Students made as `prune` makes them, and cached latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

from ditcompress.calibration.trajectory import generator


def shortened(teacher: Path, folder: Path, kept: list[int], *, note: bool = True, dtype: Any = torch.float32) -> Path:
    """The DiT in `teacher` with the blocks `kept` only, saved in `folder` with prune.json."""
    model = diffusers.DiTTransformer2DModel.from_pretrained(teacher)
    student = diffusers.DiTTransformer2DModel.from_config({**model.config, "num_layers": len(kept)})
    names = {f"transformer_blocks.{new}.": f"transformer_blocks.{old}." for new, old in enumerate(kept)}
    state = model.state_dict()
    for name, tensor in student.state_dict().items():
        start = next((new for new in names if name.startswith(new)), "")
        tensor.copy_(state[names[start] + name[len(start) :] if start else name])
    student.to(dtype).save_pretrained(folder)
    if note:
        rows = [{"block": new[:-1], "was": old[:-1]} for new, old in names.items()]
        (folder / "prune.json").write_text(json.dumps({"kept": rows}))
    return folder


def cached(folder: Path, shape: tuple[int, ...] = (1, 8, 8), counts: tuple[int, ...] = (9, 7)) -> Path:
    """Shards of random latents with class labels."""
    folder.mkdir()
    for number, count in enumerate(counts):
        draw = generator(number, 0)
        tensors = {"latents": torch.randn(count, *shape, generator=draw), "class_labels": torch.arange(count) % 10}
        save_file(tensors, folder / f"{number}.safetensors")
    return folder

"""One packed .safetensors file that holds the configuration too; `load_model` and every command read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..checkpoint.reader import Checkpoint, open_checkpoint
from ..checkpoint.writer import ShardWriter
from ..errors import DitcompressError

NEEDS_FOLDER = False


def export(checkpoint: Checkpoint, target: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write `target` with the tensors as they are stored; `dtype` has no say. Reads it back bit by bit."""
    writer = ShardWriter(target.parent, stem=target.stem, max_shard_bytes=2**62, metadata={"config": checkpoint.config})
    for name in checkpoint.tensors:
        writer.add(name, checkpoint.read(name))
    (file,) = writer.finish()
    again = open_checkpoint(file)
    for name in checkpoint.tensors:
        if not torch.equal(again.read(name).view(torch.uint8), checkpoint.read(name).view(torch.uint8)):
            raise DitcompressError("E323", f"{file.name}: {name}", "reads back other bytes", "check the disk")
    return {
        "tensors": len(checkpoint.tensors),
        "bytes": file.stat().st_size,
        "verified": "every tensor reads back equal",
    }

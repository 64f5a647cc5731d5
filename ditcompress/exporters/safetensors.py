"""One packed .safetensors file that holds the configuration too; `load_model` and every command read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..checkpoint.reader import Checkpoint, open_checkpoint
from ..checkpoint.writer import ShardWriter
from ._verify import check_written, digest

NEEDS_FOLDER = False


def export(checkpoint: Checkpoint, target: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write `target` with the tensors as they are stored; `dtype` has no say. Reads it back bit by bit."""
    writer = ShardWriter(target.parent, stem=target.stem, max_shard_bytes=2**62, metadata={"config": checkpoint.config})
    digests: dict[str, str] = {}
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        digests[name] = digest(tensor)
        writer.add(name, tensor)
    (file,) = writer.finish()
    check_written(open_checkpoint(file), digests)
    return {
        "tensors": len(checkpoint.tensors),
        "bytes": file.stat().st_size,
        "verified": "every tensor reads back equal",
    }

"""The folder of a pruned model: tensors, config.json, prune.json, the pipeline's other parts, a card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.reader import Checkpoint, check_tensors, open_checkpoint
from ..checkpoint.writer import ShardWriter, copy_rest
from ..loading import expected_shapes, meta_model
from ..report.card import pruned_card

NOTE = "prune.json"


def write_pruned(
    checkpoint: Checkpoint, partial: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]],
    facts: Mapping[str, Any], max_shard_bytes: int,
) -> None:  # fmt: skip
    """Write what is left of `checkpoint` into `partial`; names and shapes are checked against the model that `config`
    describes."""
    component = checkpoint.component if checkpoint.pipeline else ""
    folder = partial / component
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, max_shard_bytes=max_shard_bytes)
    for name, tensor in tensors:
        writer.add(name, tensor)
    files = writer.finish()
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    check_tensors(open_checkpoint(folder), expected_shapes(meta_model(config)))
    (folder / NOTE).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
    copy_rest(checkpoint, partial)
    size = sum(file.stat().st_size for file in files)
    card = pruned_card(checkpoint.path.name, checkpoint.class_name, facts, checkpoint.total_bytes, size,
                       checkpoint.pipeline is not None)  # fmt: skip
    (partial / "README.md").write_text(card, encoding="utf-8")

"""The folder of a pruned model: tensors, config.json, prune.json, the pipeline's other parts, a card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint, check_tensors, open_checkpoint
from ..checkpoint.writer import ShardWriter, copy_rest
from ..loading import expected_shapes, meta_model
from ..report.card import pruned_card
from .width import Cut

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


def cut_tensors(
    checkpoint: Checkpoint, cut: Cut, names: Mapping[str, str], changed: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a cut leaves, one by one, by their new names; `names`: the old name of each, `changed`: new
    values by old names."""
    added = {f"{path}.{name}": tensor.to("cpu", _dtype_at(path, checkpoint, names))
             for path, linear in cut.linear.items() for name, tensor in linear.state_dict().items()}  # fmt: skip
    for name in sorted({*(name for name in names if not cut.gone(name)), *added}):
        if name in added:
            yield name, added[name]
            continue
        tensor, new = checkpoint.read(names[name]), changed.get(names[name])
        yield name, cut.apply(name, tensor if new is None else new.to("cpu", tensor.dtype))


def _dtype_at(path: str, checkpoint: Checkpoint, names: Mapping[str, str]) -> torch.dtype | None:
    """The dtype of what is stored inside `path`, or around it where a part without tensors was replaced."""
    while path:
        found = [checkpoint.tensors[old].dtype for name, old in names.items() if name.startswith(f"{path}.")]
        if found:
            return found[0]
        path = path.rpartition(".")[0]
    return None

"""plug: of a model pruned by PPCL, choose which intervals keep their trained block and which get their own blocks back.

The blocks of an interval are trained on the original's inputs and outputs, apart from all others, so any of them can
stand beside blocks of the original (PPCL, arXiv 2511.16156, "pluggable"). Nothing is trained or stored for it: the
pruned checkpoint says which blocks went, and the original still has them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import output_folder
from ..console import Reporter, Silent
from ..distill.matching import read_kept
from ..errors import DitcompressError, printable
from ..loading import load_model, open_model
from ..models import Depth, adapter_for, depth_of, renamed, renumbered, shortened
from ..pruning import parameters
from ..pruning.ppcl import Interval, taken
from ..ranks import alone
from ..sharing import stored_once
from ..structure import remove_blocks
from ._pruned import NOTE, write_pruned

ANOTHER = "give the checkpoint that it was pruned from, and the result of prune as it was written"


@dataclass(frozen=True)
class PlugResult:
    """`path` (None for a model in memory or a dry run), `model` (where no folder was asked for), and the facts."""

    path: Path | None
    model: nn.Module | None
    facts: dict[str, Any]


def plug(
    original: str | Path,
    pruned: str | Path,
    intervals: Collection[int] | None = None,
    out: str | Path | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    overwrite: bool = False,
    dry_run: bool = False,
    max_shard_bytes: int = 5 * 2**30,
    reporter: Reporter | None = None,
) -> PlugResult:
    """The model in which the numbered `intervals` (None: all) of `pruned` keep their trained block and all others are
    the blocks of `original` again: a checkpoint in `out`, or without one a model in memory (in `dtype`, on the CPU).

    None of them is the original bit for bit, all are the pruned model. The facts list the intervals by number, what
    each saves, and the parameters of the result. Raises E203 for an interval that is not there, E205 for a checkpoint
    that is no plain result of PPCL, E340 for another original or a result that was trained since.
    """
    alone("plug")
    pair = _opened(Path(original), Path(pruned))
    kept = pair.chosen(intervals)
    facts = pair.facts(kept)
    if dry_run:
        return PlugResult(None, None, facts)
    reporter = reporter or Silent()
    removed = pair.removed(kept)
    if out is None:
        model, _ = load_model(original, dtype=dtype)
        state = model.state_dict()
        for name, tensor, trained in pair.tensors(kept, reporter):
            if trained:
                state[name].copy_(tensor)
        return PlugResult(None, remove_blocks(model, pair.depth, removed).eval() if removed else model, facts)
    target = Path(out)
    with output_folder(
        target, overwrite=overwrite, inputs=[Path(original), Path(pruned)], planned_bytes=pair.big.total_bytes,
        manifest={"plug": {"intervals": sorted(kept)},
                  "input": {"original": pair.big.fingerprint, "pruned": pair.small.fingerprint}},
    ) as partial:  # fmt: skip
        new = renumbered(pair.depth, removed)
        tensors = ((renamed(name, new), tensor) for name, tensor, _ in pair.tensors(kept, reporter))
        config = shortened(pair.big.config, pair.depth, removed)
        write_pruned(pair.big, partial, config, tensors, pair.note_of(kept), max_shard_bytes)
        pair.big.verify_unchanged()
        pair.small.verify_unchanged()
    return PlugResult(target, None, facts)


@dataclass(frozen=True)
class _Pair:
    """The original `big` and the pruned `small`, checked against each other, with the contents of prune.json."""

    big: Checkpoint
    small: Checkpoint
    depth: Depth
    costs: dict[str, float]
    total: int
    intervals: Sequence[Interval]
    note: dict[str, Any]

    def chosen(self, wanted: Collection[int] | None) -> frozenset[int]:
        """E203 for a number that no interval has."""
        numbers = frozenset(range(len(self.intervals)))
        found = numbers if wanted is None else frozenset(wanted)
        if unknown := sorted(found - numbers):
            there = f"has {len(numbers)} intervals: 0 to {len(numbers) - 1}" if numbers else "has no intervals"
            raise DitcompressError("E203", f"--keep {unknown[0]}", f"{self.small.path.name} {there}", "see --dry-run")
        return found

    def removed(self, kept: Collection[int]) -> tuple[str, ...]:
        """The original's blocks that are not in the result, in forward order."""
        gone = {block for number in kept for block in self.intervals[number].gone}
        return tuple(block for block in self.note["removed"] if block in gone)

    def tensors(self, kept: Collection[int], reporter: Reporter) -> Iterator[tuple[str, Tensor, bool]]:
        """(name in the original, tensor, whether it comes from the pruned model) of all that is in the result. E340
        where the two models differ in anything that pruning left alone."""
        gone, new = self.removed(kept), renumbered(self.depth, self.note["removed"])
        inside = tuple(f"{block}." for number in kept for block in self.intervals[number].students)
        changed = set(self.note["changed"])
        left = set(stored_once(list(self.big.tensors), self.note["removed"]))
        names = sorted(stored_once(list(self.big.tensors), gone))
        with reporter.task("blocks together", len(names)) as advance:
            for name in names:
                mine = renamed(name, new)
                if name.startswith(inside) and mine in changed:
                    yield name, self.small.read(mine), True
                else:
                    tensor = self.big.read(name)
                    if name in left and mine not in changed and not _same(tensor, self.small.read(mine)):
                        what = "differs between the two: another original, or trained since it was pruned"
                        raise DitcompressError("E340", printable(name, 80), what, ANOTHER)
                    yield name, tensor, False
                advance(1)

    def facts(self, kept: Collection[int]) -> dict[str, Any]:
        """The intervals by number, and the parameters of the result."""
        rows: list[dict[str, Any]] = [
            {"interval": number, "students": list(each.students), "stand_for": list(each.gone),
             "saves": int(sum(self.costs[block] for block in each.gone)), "kept": number in kept}
            for number, each in enumerate(self.intervals)
        ]  # fmt: skip
        saved = sum(row["saves"] for row in rows if row["kept"])
        return {"intervals": rows, "parameters": self.total - saved, "original_parameters": self.total}

    def note_of(self, kept: Collection[int]) -> dict[str, Any]:
        """prune.json of the result: that of the pruned model where nothing was reverted."""
        removed = self.removed(kept)
        if len(removed) == len(self.note["removed"]):
            return self.note
        new, before = renumbered(self.depth, removed), renumbered(self.depth, self.note["removed"])
        old = {place: block for block, place in before.items()}
        inside = tuple(f"{block}." for number in kept for block in self.intervals[number].students)
        changed = (renamed(name, old) for name in self.note["changed"])
        share = sum(self.costs[block] for block in removed) / sum(self.costs.values())
        return self.note | {
            "removed": list(removed),
            "order": [unit for unit in self.note["order"] if unit in removed],
            "kept": [{"block": block, "was": was} for was, block in new.items()],
            "by": "params",
            "saved": share,
            "output_sqnr_db": None,
            "changed": sorted(renamed(name, new) for name in changed if name.startswith(inside)),
        }


def _same(first: Tensor, second: Tensor) -> bool:
    """Bit for bit, so that NaN equals itself."""
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))


def _opened(original: Path, pruned: Path) -> _Pair:
    small, _ = open_model(pruned)
    note = _note(small)
    big, meta = open_model(original, allow_compressed=False)
    layout = adapter_for(big.config).layout(meta)
    kept = read_kept(small.folder, layout.blocks) if big.class_name == small.class_name else None
    if kept is None:
        what = f"holds no part of {printable(original.name, 60)} by its prune.json"
        raise DitcompressError("E340", pruned, what, ANOTHER)
    depth = depth_of(big.config, layout)
    if shortened(big.config, depth, note["removed"]) != small.config:
        raise DitcompressError("E340", pruned, "its config.json is not that of the shorter original", ANOTHER)
    total = sum(parameter.numel() for parameter in meta.parameters())
    return _Pair(big, small, depth, parameters(meta, layout), total, taken(depth, note["removed"]), note)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "removed": lambda value: _texts(value),
    "order": lambda value: _texts(value),
    "changed": lambda value: _texts(value),
    "kept": lambda value: isinstance(value, list),
}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _note(small: Checkpoint) -> dict[str, Any]:
    """prune.json; E205 where it is not that of whole blocks pruned by PPCL."""
    where, remedy = small.folder / NOTE, "give a result of `ditcompress prune --method ppcl`"
    try:
        note = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DitcompressError("E205", where, "is not there or cannot be read", remedy) from None
    if not isinstance(note, dict) or not all(ok(note.get(key)) for key, ok in _FIELDS.items()):
        raise DitcompressError("E205", where, "is not what prune writes", remedy)
    if note.get("method") != "ppcl":
        what = f"was pruned by {printable(note.get('method'), 40)}, whose blocks do not stand for intervals"
        raise DitcompressError("E205", small.path, what, remedy)
    if small.quantization is not None or note.get("width"):
        what = "is narrowed or quantized as well: its layers do not fit between those of the original"
        raise DitcompressError("E205", small.path, what, "plug the result of --ratio alone, then quantize")
    return note

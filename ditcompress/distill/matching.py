"""Which teacher block a student block answers to, and whether a model is a student of another at all.

A student block that precedes removed blocks is matched to the last of these: it has to do their work as well
(TinyFusion's pairs, BK-SDM).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import DitcompressError, printable
from ..models.base import Layout

Pairs = tuple[tuple[str, str], ...]
OTHER = "give a model made from this teacher"


def read_kept(folder: Path, teacher: Sequence[str]) -> dict[str, str] | None:
    """Of the student's prune.json: the teacher's block that each of its blocks was. None where there is none, or where
    it does not speak of a model with the blocks `teacher` (a student that was pruned twice)."""
    try:
        found = json.loads((folder / "prune.json").read_text(encoding="utf-8"))
        kept = {str(row["block"]): str(row["was"]) for row in found["kept"]}
        every = {*kept.values(), *map(str, found["removed"])} if "removed" in found else set(teacher)
        return kept if every == set(teacher) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def origins(student: Sequence[str], teacher: Sequence[str], kept: Mapping[str, str] | None) -> dict[str, str]:
    """The teacher's block that every student block was: by `kept` where that fits both models, else spread evenly."""
    if kept is not None and set(kept) == set(student) and set(kept.values()) <= set(teacher):
        return dict(kept)
    found = {}
    for owner, mine in _lists(student).items():
        theirs = _lists(teacher).get(owner, [])
        for number, block in enumerate(mine):
            if theirs:
                found[block] = theirs[min(len(theirs) - 1, round(number * len(theirs) / len(mine)))]
    return found


def pairs_of(student: Sequence[str], teacher: Sequence[str], kept: Mapping[str, str] | None) -> Pairs:
    """(student block, teacher block whose output it should give), in forward order."""
    was = origins(student, teacher, kept)
    found = []
    for owner, mine in _lists(student).items():
        theirs = _lists(teacher).get(owner, [])
        if not theirs:
            continue
        for block, following in zip(mine, [*mine[1:], None], strict=True):
            end = len(theirs) if following is None else theirs.index(was[following])
            found.append((block, theirs[max(end - 1, 0)]))
    return tuple(found)


def _lists(blocks: Sequence[str]) -> dict[str, list[str]]:
    """Blocks by the list that holds them."""
    found: dict[str, list[str]] = {}
    for block in blocks:
        found.setdefault(block.rpartition(".")[0], []).append(block)
    return found


def check_student(
    student: nn.Module, teacher: nn.Module, layouts: tuple[Layout, Layout], latents: tuple[Any, Any],
    was: Mapping[str, str],
) -> None:  # fmt: skip
    """E340 unless the student is a sub-model: of the teacher's class and latent shape, with no more blocks, and no
    tensor wider than the teacher's in its place (`was` names the teacher's block of each; what a block has in the place
    of a part of it is not compared). Works on meta models."""
    mine, theirs = type(student).__name__, type(teacher).__name__
    if mine != theirs:
        raise DitcompressError("E340", mine, f"is of another class than the teacher's {theirs}", OTHER)
    if latents[0] != latents[1]:
        raise DitcompressError("E340", mine, f"draws {latents[0]}, the teacher {latents[1]}", OTHER)
    for owner, blocks in _lists(layouts[0].blocks).items():
        most = len(_lists(layouts[1].blocks).get(owner, []))
        if len(blocks) > most:
            raise DitcompressError("E340", owner, f"{len(blocks)} blocks, the teacher has {most}", OTHER)
    shapes = {name: tuple(tensor.shape) for name, tensor in teacher.state_dict().items()}
    for name, tensor in student.state_dict().items():
        there = next((was[b] + name[len(b) :] for b in was if name.startswith(f"{b}.")), name)
        shape, limit = tuple(tensor.shape), shapes.get(there)
        if limit is None and not any(name.startswith(f"{block}.") for block in was):
            raise DitcompressError("E340", printable(name, 80), "the teacher has no such tensor", OTHER)
        if limit and (len(shape) != len(limit) or any(a > b for a, b in zip(shape, limit, strict=True))):
            raise DitcompressError("E340", printable(name, 80), f"is {shape}, the teacher's {limit}", OTHER)

"""What a training leaves beside its output folder: a TensorBoard log, where tensorboard is installed, and notes of
divergence, after which a run may go on from its last good state with a lower learning rate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.writer import work_of
from ..console import Reporter
from ..distill.trainer import Log


@contextmanager
def open_log(target: Path, wanted: bool, reporter: Reporter) -> Iterator[Log | None]:
    """Writes loss and rate into `TARGET.tensorboard`, which is no part of the result; None without tensorboard."""
    if not wanted:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    folder = target.with_name(f"{target.name}.tensorboard")
    reporter.note(f"TensorBoard log in {folder}")
    with SummaryWriter(str(folder)) as writer:

        def log(step: int, loss: float, rate: float) -> None:
            writer.add_scalar("loss", loss, step)
            writer.add_scalar("learning_rate", rate, step)

        yield log


# --- divergence ------------------------------------------------------------------------------------------------------

_NOTE = "diverged.json"


def note_divergence(journal: Path, where: str, rate: float) -> None:
    """Remember in the folder of the states where a run diverged, and at which rate."""
    found = [*divergences(journal), {"at": where, "learning_rate": rate}]
    (journal / _NOTE).write_text(json.dumps(found))


def divergences(journal: Path) -> list[dict[str, Any]]:
    """Where the run diverged before; [] for one that never did."""
    try:
        return list(json.loads((journal / _NOTE).read_text()))
    except (OSError, ValueError, TypeError):
        return []


def lowered(target: Path, marks: Mapping[str, Any]) -> dict[str, Any]:
    """`marks` with the learning rate that the states of a diverged run were begun with, if the new one is lower."""
    found = divergences(work_of(target.absolute()))
    rates = [float(row["learning_rate"]) for row in found]
    if rates and marks["learning_rate"] < rates[-1]:
        return {**marks, "learning_rate": rates[0]}
    return dict(marks)

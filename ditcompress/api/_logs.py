"""A TensorBoard log of a training beside its output folder, where tensorboard is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

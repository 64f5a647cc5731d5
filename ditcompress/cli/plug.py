"""plug: which intervals of a model pruned by PPCL keep their trained block."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import amount, print_table, print_text
from ..errors import DitcompressError
from . import common
from .common import Checkpoint, Debug, DryRun, Json, Overwrite, Quiet


def plug(
    original: Checkpoint,
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED", help="What `prune --method ppcl` made of it.")],
    keep: Annotated[
        str, typer.Option(help="Numbers of the intervals that keep their trained block: 0,2 or none or all.")
    ] = "all",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder (default: PRUNED-plugged).")] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Give intervals that PPCL replaced by one trained block their own blocks back. Nothing is trained.

    --dry-run lists the intervals and what each of them saves.
    """
    with common.command(as_json, debug):
        chosen = _numbers(keep)
        from .. import api

        target = out or pruned.with_name(f"{pruned.name}-plugged")
        result = api.plug(
            original, pruned, chosen, target, overwrite=overwrite, dry_run=dry_run,
            reporter=common.reporter(quiet, as_json),
        )  # fmt: skip
        path = None if result.path is None else str(result.path)
        common.emit(as_json, {"path": path, **result.facts}, lambda: _show(path, result.facts))


def _numbers(text: str) -> list[int] | None:
    """None for all of them; E203 for what is no list of numbers."""
    if text in ("all", "none"):
        return None if text == "all" else []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise DitcompressError("E203", f"--keep {text}", "is no list of intervals", "for example 0,2 or none")
    return [int(part) for part in parts]


def _show(path: str | None, facts: dict[str, Any]) -> None:
    rows = [
        [
            row["interval"],
            " ".join(row["students"]),
            " ".join(row["stand_for"]),
            amount(row["saves"]),
            "kept" if row["kept"] else "the original's",
        ]
        for row in facts["intervals"]
    ]
    print_table("intervals", ["number", "block", "stands also for", "saves", ""], rows)
    print_text(f"{amount(facts['parameters'])} of {amount(facts['original_parameters'])} parameters")
    print_text("nothing was written" if path is None else f"written to {path}: stock diffusers loads it")

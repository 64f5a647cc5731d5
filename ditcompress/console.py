"""The only place that prints. Libraries take a `Reporter`; the silent one is the default.

Data go to stdout; progress, notes and errors to stderr, so that a pipe sees only data.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

from .errors import printable

Advance = Callable[..., None]  # (units finished, a few words that stand beside the bar)
_asked: list[BaseException] = []


def interrupt(error: BaseException) -> NoReturn:
    """For signal handlers: raise `error` now, and again at the next step of progress. Python drops what a handler
    raises inside a destructor or a weak reference's callback, and imports are full of those."""
    _asked.append(error)
    raise error


def _go_on(units: int = 1, said: str = "") -> None:
    """Nothing, unless an interruption was asked for and lost."""
    if _asked:
        raise _asked.pop()


class Reporter(Protocol):
    """What a long computation may tell its caller."""

    def task(self, description: str, total: int) -> Any:
        """Context manager; gives a function that takes the number of units just finished, and a few words."""

    def note(self, text: str) -> None:
        """One line that the user should read (a fallback taken, a default assumed)."""


class Silent:
    """Reports nothing, remembers the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        yield _go_on

    def note(self, text: str) -> None:
        self.notes.append(text)


class Terminal:
    """Progress bars with rate and remaining time, and notes, on stderr."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self.quiet = quiet
        self.notes: list[str] = []
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        if self.quiet or not self.err.is_terminal:
            yield _go_on
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>9}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err, transient=True) as progress:
            bar = progress.add_task(printable(description, 60), total=total, rate="")

            def advance(units: int = 1, said: str = "") -> None:
                _go_on(units)
                speed = progress.tasks[0].speed
                text = printable(f"{description} {said}", 60)
                progress.update(bar, advance=units, rate=f"{speed:.1f}/s" if speed else "", description=text)

            yield advance

    def note(self, text: str) -> None:
        self.notes.append(text)
        if not self.quiet:
            self.err.print(f"note: {printable(text, 300)}", markup=False, style="yellow")


def number(value: float | None, digits: int | None = None) -> str:
    """A number for people: two decimals, three significant digits below 1, a dash for None."""
    if value is None:
        return "–"
    if digits is None:
        small = 0 < abs(value) < 1
        digits = min(6, 2 - math.floor(math.log10(abs(value)))) if small else 1 if abs(value) >= 1000 else 2
        digits = 5 if 0.995 <= abs(value) < 1 else digits  # cosines
    return f"{value:,.{digits}f}"


def size(count: float | None) -> str:
    """Bytes for people: 1.23 MB."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def printable_cell(value: object) -> str:
    """Text for a Markdown table or line: no control characters, nothing that opens markup."""
    line = printable(value, 300)
    for mark in "\\`|<>[]*_":
        line = line.replace(mark, "\\" + mark if mark in "|<>[]*\\" else mark)
    return line.replace("`", "'")


def seconds(value: float | None) -> str:
    """A duration for people: 12.3 ms."""
    if value is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def amount(value: float | None) -> str:
    """A large count for people: 675.1 M."""
    if value is None:
        return "–"
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.0f}"


def speaks() -> bool:
    """Whether this process is the one that prints: the first that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def print_json(value: Any) -> None:
    """One JSON document on stdout, keys in the order given."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


SHORT = 16  # characters of a cell that is not broken


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A plain table on stdout; every cell is escaped. Columns after the first are right-aligned, and where there is
    room those of numbers (nothing longer than `SHORT`) stay on one line: the others fold first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title, 200)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    cells = [[printable(cell, 200) for cell in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    console = Console(highlight=False)
    room = console.width - sum(width + 3 if width <= SHORT else 12 for width in widths)
    for index, name in enumerate(columns):
        whole = index > 0 and widths[index] <= SHORT and room >= 0
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold", no_wrap=whole)
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)


def print_text(text: str) -> None:
    """Plain text on stdout."""
    sys.stdout.write(text + "\n")


def print_error(line: str) -> None:
    """The last line on stderr."""
    sys.stderr.write(line + "\n")

"""What every command shares: its options, its reporter, and how failures become one line and an exit code."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import Silent, Terminal, interrupt, print_error, print_json, speaks
from ..errors import TOLD, DitcompressError, as_ours, printable

Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: of the forward passes.")]
Offload = Annotated[str, typer.Option(help="none, cpu or disk: where blocks are while they do not run.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an earlier result in the output folder.")]
Restart = Annotated[bool, typer.Option("--restart", help="Forget an interrupted run and begin anew.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change a recipe value: key=value (repeatable).")]
Conditions = Annotated[Path | None, typer.Option(help="Safetensors file with the model's forward arguments.")]
Scheduler = Annotated[Path | None, typer.Option(help="Folder with a scheduler_config.json.")]


def finite(value: float | None) -> float | None:
    """For options that take any number but NaN and infinity."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number to work with")
    return value


Guidance = Annotated[float | None, typer.Option(callback=finite, help="Guidance scale (default: the family's).")]
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="Model or pipeline folder, .safetensors or DiT .pt.")]


def reporter(quiet: bool, as_json: bool) -> Terminal | Silent:
    """Progress and notes on stderr, unless they were not wanted."""
    return Silent() if quiet or (as_json and not sys.stderr.isatty()) else Terminal()


@contextmanager
def command(as_json: bool, debug: bool) -> Iterator[None]:
    """Quiet dependencies, and every failure as one line (or one JSON object) on stderr and its exit code."""
    if not debug:
        hush()
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, _interrupted)
    try:
        yield
    except typer.Exit:
        raise
    except BaseException as error:
        raise typer.Exit(report_failure(error, as_json, debug)) from None


def report_failure(error: BaseException, as_json: bool, debug: bool) -> int:
    """Print `error` and give the exit code of the process."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if debug and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        if speaks():
            print_error("interrupted: run the same command again to go on")
        return 130
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    known = as_ours(error)
    if not speaks() and (known is not None or hasattr(error, TOLD)):  # the first process has the same to say
        return 1 if known is None else known.exit_code
    if known is not None:
        _print_known(known, as_json)
        return known.exit_code
    text = f"error[E100 internal]: {type(error).__name__}: {printable(error, 200)}; please report it (see --debug)."
    print_error(text)
    return 1


def _print_known(error: DitcompressError, as_json: bool) -> None:
    if as_json:
        import json

        print_error(json.dumps(error.to_dict()))
    else:
        print_error(error.line())


def _terminated(*_: Any) -> None:
    if speaks():
        print_error("terminated: run the same command again to go on")
    interrupt(SystemExit(143))


def _interrupted(*_: Any) -> None:
    interrupt(KeyboardInterrupt())


def hush() -> None:
    """Keep the import chatter of dependencies off the terminal."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on a busy machine
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    logging.disable(logging.WARNING)
    with contextlib.suppress(ValueError):
        logging.captureWarnings(True)


def not_staged(offload: str) -> None:
    """E203: the stages of a recipe train and evaluate whole models."""
    if offload != "none":
        remedy = "run the commands one by one"
        raise DitcompressError("E203", f"--offload {offload}", "a recipe with stages trains or evaluates", remedy)


def emit(as_json: bool, value: Any, show: Callable[[], None]) -> None:
    """`value` as JSON, or what `show` prints; of several processes the first one speaks."""
    if not speaks():
        return
    if as_json:
        print_json(value)
    else:
        show()

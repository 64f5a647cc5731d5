"""The command line: parse, call one function of api, print. Heavy imports live inside the commands."""

from __future__ import annotations

import sys
from typing import Annotated

import click
import typer

from .. import __version__
from ..console import print_error, print_text
from . import bench, compare, compress, distill, evaluate, inspect, moe, plug, prune, q_sched, recipes

app = typer.Typer(
    name="ditcompress",
    help="Make diffusion transformers smaller and faster, and prove what that cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(evaluate.demo)
app.command("calibrate")(compress.calibrate)
app.command("quantize")(compress.quantize)
app.command("prune")(prune.prune)
app.command("plug")(plug.plug)
app.command("distill")(distill.distill)
app.command("moe")(moe.moe)
app.command("q-sched")(q_sched.q_sched)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("sample")(compare.sample)
app.command("bench")(bench.bench)
app.command("inspect")(inspect.inspect)
app.command("export")(compress.export)
app.command("report")(evaluate.report)
app.command("explain")(recipes.explain)
app.add_typer(recipes.app, name="recipes")


def _version(wanted: bool) -> None:
    if wanted:
        print_text(f"ditcompress {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make diffusion transformers smaller and faster, and prove what that cost.

    Exit codes: 0 ok, 1 internal error, 2 usage or recipe, 3 bad input, 4 refused for safety, 5 output exists,
    6 resources, 7 numerical failure, 8 quality gate failed, 9 quality gate inconclusive.
    """


def run() -> int:
    """The exit code; usage errors are one line too."""
    try:
        code = app(standalone_mode=False)  # the code of typer.Exit comes back as the value
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        print_error("interrupted")
        return 130
    except Exception as error:
        if hasattr(error, "format_message"):  # typer carries its own copy of click's classes
            if type(error).__name__ == "NoArgsIsHelpError":
                print_text(error.format_message())
                return 0
            print_error(f"error[E203 bad-option]: {error.format_message().replace(chr(10), ' ')}; see --help.")
            return 2
        if type(error).__name__ == "Exit":
            return int(getattr(error, "exit_code", 0))
        raise
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(run())

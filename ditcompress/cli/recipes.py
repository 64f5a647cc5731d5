"""recipes list, show, validate; explain."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..console import print_table, print_text
from . import common
from .common import Debug, Device, Dtype, Json, Quiet, Seed, Set

app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")]


@app.command("list")
def list_(
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Every shipped recipe with one line of description."""
    with common.command(as_json, debug):
        from ..recipe import load_recipe, recipe_files

        recipes = [load_recipe(name) for name in recipe_files()]
        value = [{"name": r.name, "description": r.description, "source": r.source} for r in recipes]
        rows = [[r.name, "faithful" if r.source else "ours", r.description] for r in recipes]
        common.emit(as_json, value, lambda: print_table("recipes", ["name", "kind", "description"], rows))


@app.command("show")
def show(
    name: Name,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The text of a recipe."""
    with common.command(as_json, debug):
        from pathlib import Path

        from ..recipe import load_recipe, recipe_files

        recipe = load_recipe(name)
        path = recipe_files().get(name, Path(name))
        common.emit(as_json, recipe.to_json(), lambda: print_text(path.read_text(encoding="utf-8").rstrip()))


@app.command("validate")
def validate(
    name: Name,
    set_: Set = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check a recipe: its keys, its steps and formats and their parameters."""
    with common.command(as_json, debug):
        from ..api import check_recipe
        from ..recipe import load_recipe

        recipe = load_recipe(name, set_ or ())
        check_recipe(recipe)
        value = {"name": recipe.name, "rules": len(recipe.rules), "valid": True}
        common.emit(as_json, value, lambda: print_text(f"{recipe.name}: valid, {len(recipe.rules)} rules"))


def explain(
    name: Annotated[str, typer.Argument(help="A step, format, metric or extractor; or a kind: extractors.")],
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What a step, format, metric or extractor does, and its parameters; for a kind, everything of that kind."""
    with common.command(as_json, debug):
        from .. import api

        facts = api.explain(name)
        common.emit(as_json, facts, lambda: _explained(facts))


def _explained(facts: dict[str, Any]) -> None:
    if "names" in facts:
        print_table(facts["kind"], ["name", "what"], [*facts["names"].items()])
        return
    print_text(f"{facts['name']} ({facts['kind']})\n\n{facts['text']}\n")
    if facts["parameters"]:
        print_text(facts["about"])
        print_table("parameters", ["name", "default"], [*facts["parameters"].items()])

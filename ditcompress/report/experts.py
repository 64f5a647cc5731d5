"""moe.html: how a model with expert layers uses them, over its blocks, timesteps and classes, and token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import plots
from .figures import Figure
from .html import environment


@dataclass(frozen=True)
class Coloured:
    """Sample images (n, channels, height, width), low and high of their values, and by layer and timestep the expert
    of every token (n, rows, columns)."""

    images: Tensor
    low: float
    high: float
    choices: Mapping[str, Mapping[float, Tensor]]


def page(facts: Mapping[str, Any], coloured: Coloured | None) -> str:
    """The whole page from what moe.json holds. Every text is escaped."""
    return (
        environment()
        .get_template("moe.html")
        .render(f=facts, figures=_figures(facts), samples=[] if coloured is None else _samples(coloured))
    )


def _figures(facts: Mapping[str, Any]) -> list[Figure]:
    layers = facts["layers"]
    most = max((len(row["use"]) for row in layers.values()), default=0)
    loads = [[x * len(row["use"]) for x in row["use"]] for row in layers.values()]
    found = [
        Figure(
            "Load of every expert",
            "Share of the choices over an even one: 1 is balanced, 0 is never used.",
            f"Load of every expert: least {min(map(min, loads)):.2f}, most {max(map(max, loads)):.2f}.",
            plots.heat_map(loads, list(layers), [str(e) for e in range(most)], "expert", "load / even"),
        )
    ]
    if "distilled" in facts:
        found += _training(facts["distilled"]["stages"])
    for kind, table in facts.get("routing", {}).items():
        found += _by(kind, table)
    return found


def _training(stages: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The loss over the steps; stages train and compare different parts, so their losses are not of one kind."""
    curve = plots.stage_losses({stage["stage"]: stage["curve"] for stage in stages})
    text = ", ".join(f"{s['stage']} {s['first']:.3g} to {s['last']:.3g} in {s['steps']} steps" for s in stages)
    if curve is None:
        return []
    title, note = "Loss of the training, by stage", "Each stage has a loss of its own."
    return [Figure(title, f"{text}. {note}", f"Loss: {text}.", curve)]


def _by(kind: str, table: Mapping[str, Any]) -> list[Figure]:
    """Blocks against the values of a table: once how concentrated the choices are, once every expert of every block."""
    values, layers = [f"{v:g}" for v in table["values"]], table["layers"]
    if not layers:
        return []
    busiest = [[max(row) * len(row) for row in rows] for rows in layers.values()]
    every = [list(column) for rows in layers.values() for column in zip(*[_loads(r) for r in rows], strict=True)]
    names = [f"{path} {e}" if e == 0 else "" for path, rows in layers.items() for e in range(len(rows[0]))]
    low, high = min(map(min, busiest)), max(map(max, busiest))
    return [
        Figure(
            f"Busiest expert by block and {kind}",
            "Load of the busiest expert over an even one: 1 is balanced.",
            f"Busiest expert by block and {kind}: {low:.2f} to {high:.2f} times an even load.",
            plots.heat_map(busiest, list(layers), values, kind, "busiest / even"),
        ),
        Figure(
            f"Every expert by {kind}",
            f"One row an expert, blocks one below another; experts that prefer a {kind} show as change along a row.",
            f"Every expert by {kind}: loads from {min(map(min, every)):.2f} to {max(map(max, every)):.2f}.",
            plots.heat_map(every, names, values, kind, "load / even"),
        ),
    ]


def _loads(row: Sequence[float]) -> list[float]:
    return [x * len(row) for x in row]


def _samples(coloured: Coloured) -> list[dict[str, Any]]:
    """One record an image: its picture and, by layer and timestep, its tokens in the colours of their experts."""
    return [
        {
            "picture": plots.picture(image, coloured.low, coloured.high),
            "maps": [
                {"layer": path, "timestep": time, "source": plots.tokens(chosen[number])}
                for path, times in coloured.choices.items()
                for time, chosen in times.items()
            ],
        }
        for number, image in enumerate(coloured.images)
    ]

"""Plots and images of the report, as data: URIs.

Colours come from one colour-blind-safe list; backgrounds are transparent with mid-grey text, so that one picture serves
light and dark pages.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

ROLE_COLOURS = {
    "qkv": "#0072B2", "attn_out": "#56B4E9", "ffn_in": "#D55E00", "ffn_out": "#E69F00",
    "modulation": "#009E73", "time_embedding": "#CC79A7", "other": "#888888",
}  # fmt: skip
INK = "#7b8490"
_STYLE: Any = {
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "legend.frameon": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "grid.alpha": 0.25,
    "svg.hashsalt": "ditcompress",
}  # fmt: skip


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _svg(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return _uri(buffer.getvalue(), "svg+xml")


def _axes(x: str, y: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True)
    return figure, axes


def sqnr_over_time(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """SQNR against the timestep with the 5 to 95 % band, one line a branch."""
    drawn = [r for r in rows if r["sqnr_db"] is not None]
    if not drawn:
        return None
    with plt.rc_context(_STYLE):
        figure, axes = _axes("timestep (noise grows to the right)", "SQNR, dB")
        for branch, colour in (("cond", "#0072B2"), ("null", "#D55E00")):
            part = sorted((r for r in drawn if r["branch"] == branch), key=lambda r: r["timestep"])
            if part:
                t = [r["timestep"] for r in part]
                axes.fill_between(t, [r["p05"] for r in part], [r["p95"] for r in part], color=colour, alpha=0.15, lw=0)
                axes.plot(
                    t,
                    [r["sqnr_db"] for r in part],
                    "o-",
                    color=colour,
                    ms=4,
                    label="conditional" if branch == "cond" else "null",
                )
        axes.legend()
        return _svg(figure)


def layer_sqnr(layers: Sequence[Mapping[str, Any]]) -> str | None:
    """Layer SQNR sorted, coloured by role."""
    drawn = sorted((x for x in layers if x["sqnr_db"] is not None), key=lambda x: x["sqnr_db"])
    if not drawn:
        return None
    with plt.rc_context(_STYLE):
        figure, axes = _axes("linears, worst first", "output SQNR, dB")
        for role in dict.fromkeys(x["role"] for x in drawn):
            places = [i for i, x in enumerate(drawn) if x["role"] == role]
            values = [drawn[i]["sqnr_db"] for i in places]
            axes.scatter(places, values, s=14, color=ROLE_COLOURS.get(role, ROLE_COLOURS["other"]), label=role)
        axes.legend(fontsize=8, ncols=2)
        return _svg(figure)


def layer_bits(layers: Sequence[Mapping[str, Any]]) -> str | None:
    """Stored bits of each linear in forward order, coloured by role."""
    if not layers:
        return None
    with plt.rc_context(_STYLE):
        figure, axes = _axes("linears, in forward order", "stored bits per weight")
        colours = [ROLE_COLOURS.get(x["role"], ROLE_COLOURS["other"]) for x in layers]
        axes.bar(range(len(layers)), [x["bits"] for x in layers], width=1.0, color=colours)
        return _svg(figure)


def psnr_distribution(values: Sequence[float | None]) -> str | None:
    """Share of pairs at or below a PSNR."""
    found = np.sort([v for v in values if v is not None])
    if len(found) < 2:
        return None
    with plt.rc_context(_STYLE):
        figure, axes = _axes("paired PSNR, dB", "share of pairs")
        axes.step(found, np.arange(1, len(found) + 1) / len(found), where="post", color="#0072B2")
        axes.set_ylim(0, 1)
        return _svg(figure)


def training_loss(points: Sequence[Sequence[float]]) -> str | None:
    """Loss of a distillation over its steps, on a logarithmic scale."""
    if len(points) < 2:
        return None
    with plt.rc_context(_STYLE):
        figure, axes = _axes("training step", "loss")
        axes.plot([x for x, _ in points], [y for _, y in points], color="#0072B2", lw=1)
        axes.set_yscale("log")
        return _svg(figure)


def stage_losses(curves: Mapping[str, Sequence[Sequence[float]]]) -> str | None:
    """Losses of a training's stages over its steps, each stage in a colour of its own."""
    if sum(map(len, curves.values())) < 2:
        return None
    with plt.rc_context(_STYLE):
        figure, axes = _axes("training step", "loss of the stage")
        for (name, points), colour in zip(curves.items(), ROLE_COLOURS.values(), strict=False):
            axes.plot([x for x, _ in points], [y for _, y in points], color=colour, lw=1.2, label=name)
        axes.set_yscale("log")
        axes.legend()
        return _svg(figure)


def block_scores(scores: Mapping[str, float | None], removed: Sequence[str]) -> str | None:
    """Importance of every unit of blocks in forward order; removed ones in another colour."""
    values = [0.0 if value is None else value for value in scores.values()]
    if not values:
        return None
    with plt.rc_context(_STYLE):
        figure, axes = _axes("blocks, in forward order", "importance")
        gone = [any(block in name.split("+") for block in removed) for name in scores]
        axes.bar(range(len(values)), values, color=["#D55E00" if out else "#0072B2" for out in gone])
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        return _svg(figure)


def picture(image: Tensor, low: float, high: float, size: int = 96) -> str:
    """An image (channels, height, width), [low, high] shown as black to white; of latents the first channels."""
    from PIL import Image

    data = ((image[:3] if image.shape[0] >= 3 else image[:1]) - low) / max(high - low, 1e-12)
    pixels = (data.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return _png(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), size)


def _png(shown: Any, size: int) -> str:
    """A PIL image, enlarged by a whole factor to about `size` pixels."""
    from PIL import Image

    scale = max(1, size // max(shown.size))
    shown = shown.resize((shown.width * scale, shown.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG", optimize=True)
    return _uri(buffer.getvalue(), "png")


def frechet_over_n(points: Sequence[Mapping[str, Any]]) -> str | None:
    """FD against 1/N of both models with the fitted lines down to 1/N = 0."""
    if len(points) < 4:
        return None
    with plt.rc_context(_STYLE):
        figure, axes = _axes("1 / number of images", "Fréchet distance to reference")
        for model, colour, mark in (("original", "#0072B2", "o"), ("compressed", "#D55E00", "s")):
            mine = [p for p in points if p["model"] == model]
            inverse, values = [1 / p["n"] for p in mine], [p["fd"] for p in mine]
            slope, intercept = np.polyfit(inverse, values, 1)
            ends = np.array([0.0, max(inverse)])
            axes.plot(ends, intercept + slope * ends, "-", color=colour, lw=1)
            axes.plot(inverse, values, mark, color=colour, ms=5, label=f"{model}, limit {intercept:.1f}")
        axes.set_xlim(left=0)
        axes.legend()
        return _svg(figure)


def class_change(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Change of accuracy by class in percentage points; sorted where there are many classes."""
    if not rows:
        return None
    change = [100 * (c["compressed"] - c["original"]) for c in rows]
    labels = [str(c["label"]) for c in rows]
    few = len(rows) <= 20
    if not few:
        change.sort()
    with plt.rc_context(_STYLE):
        figure, axes = _axes("class" if few else "classes, worst first", "change, percentage points")
        axes.bar(range(len(change)), change, width=0.7 if few else 1.0, color="#0072B2")
        axes.axhline(0, color=INK, lw=0.8)
        if not any(change):
            axes.set_ylim(-1, 1)
        if few:
            axes.set_xticks(range(len(labels)), labels)
        return _svg(figure)


def pareto(points: Sequence[Mapping[str, Any]], x_label: str, y_label: str) -> str:
    """Runs as points (`x`, `y`, `low`, `high`, `name`, `best`) with intervals; the front is drawn as a line."""
    with plt.rc_context(_STYLE):
        figure, axes = _axes(x_label, y_label)
        front = sorted((p for p in points if p["best"]), key=lambda p: p["x"])
        if len(front) > 1:
            axes.plot([p["x"] for p in front], [p["y"] for p in front], "-", color="#0072B2", lw=1, alpha=0.5)
        for p in points:
            colour = "#0072B2" if p["best"] else INK
            if p["low"] is not None and p["high"] is not None:
                axes.plot([p["x"]] * 2, [p["low"], p["high"]], "-", color=colour, lw=1.5)
            axes.plot(p["x"], p["y"], "o", color=colour, ms=6)
            axes.annotate(p["name"], (p["x"], p["y"]), xytext=(6, 5), textcoords="offset points", fontsize=9)
        axes.margins(x=0.18, y=0.15)
        return _svg(figure)


def heat_map(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], x: str, label: str) -> str:
    """A table as colours; rows may be of different lengths, "" leaves a row without a name."""
    width = max(map(len, values))
    table = np.full((len(values), width), np.nan)
    for place, row in enumerate(values):
        table[place, : len(row)] = row
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.4, min(24.0, max(1.6, 0.8 + 0.16 * len(values)))))
        drawn = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest")
        named = [place for place, name in enumerate(rows) if name]
        axes.set_yticks(named, [rows[place] for place in named], fontsize=7)
        shown = range(0, width, max(1, width // 12))
        axes.set_xticks(list(shown), [columns[place] for place in shown], fontsize=8)
        axes.set_xlabel(x)
        figure.colorbar(drawn, ax=axes, label=label)
        return _svg(figure)


def tokens(experts: Tensor, size: int = 96) -> str:
    """The expert (rows, columns) of every token as colours, the same for the same number everywhere; -1 is black."""
    from PIL import Image

    colours = (np.asarray(plt.get_cmap("tab20")(np.arange(20) % 20))[:, :3] * 255).round().astype(np.uint8)
    shown = np.where(experts.numpy()[..., None] < 0, np.uint8(0), colours[experts.numpy() % 20])
    return _png(Image.fromarray(shown), size)

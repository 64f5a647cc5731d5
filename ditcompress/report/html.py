"""The report: one HTML file without scripts or outside requests, rendered from the JSON of a result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint.writer import save_atomic
from ..errors import DitcompressError
from . import plots

FIGURES: Sequence[tuple[str, str, Callable[[Mapping[str, Any]], str | None]]] = (
    (
        "SQNR of the denoiser over timesteps",
        "How far the compressed prediction is from the original's on the same inputs; higher is better. "
        "The band covers 5 to 95 % of inputs.",
        lambda r: plots.sqnr_over_time(r["timesteps"]),
    ),
    (
        "Output SQNR of each linear",
        "Errors of earlier layers included; diagnostic, nothing is gated on it.",
        lambda r: plots.layer_sqnr(r["layers"]),
    ),
    (
        "Paired PSNR over all pairs",
        "The curve of a better model lies further right.",
        lambda r: plots.psnr_distribution(r["pairs"].get("psnr", [])),
    ),
    (
        "Stored bits of each linear",
        "Scales, zeros and low-rank factors included.",
        lambda r: plots.layer_bits(r["layers"]),
    ),
)

Images = Mapping[str, Sequence[tuple[int, Tensor, Tensor]]]


def write_report(folder: Path, result: Mapping[str, Any], images: Images) -> None:
    """report.json, report.html and the shown images into `folder`."""
    (folder / "report.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    table = {
        f"{kind}/{place:03d}/{index}": torch.stack([a, b])
        for kind, rows in images.items()
        for place, (index, a, b) in enumerate(rows)
    }
    if table:
        save_atomic(folder / "images.safetensors", table)
    (folder / "report.html").write_text(render(result, images), encoding="utf-8")


def read_report(folder: Path) -> tuple[dict[str, Any], Images]:
    """What `write_report` stored; E301 where there is no report."""
    try:
        result = json.loads((folder / "report.json").read_text())
    except (OSError, ValueError):
        raise DitcompressError(
            "E301", folder / "report.json", "is no report", "run `ditcompress evaluate ... --out DIR`"
        ) from None
    images: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    if (folder / "images.safetensors").is_file():
        for name, pair in sorted(load_file(folder / "images.safetensors").items()):
            kind, _, index = name.split("/")
            images.setdefault(kind, []).append((int(index), pair[0], pair[1]))
    return result, images


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _triples(images: Images, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Image sections: random pairs, then the worst, each as original, compressed and amplified difference."""
    psnr = result["pairs"].get("psnr", [])
    labels = result["pairs"].get("labels")
    everything = [tensor for rows in images.values() for _, a, b in rows for tensor in (a, b)]
    if not everything:
        return []
    originals = [a for rows in images.values() for _, a, _ in rows]
    pixels = originals[0].shape[0] in (1, 3)
    low, high = (
        (-1.0, 1.0) if pixels else (min(float(t.min()) for t in originals), max(float(t.max()) for t in originals))
    )
    most = max(float((b - a).abs().max()) for rows in images.values() for _, a, b in rows)
    gain = max(1, round((high - low) / 2 / max(most, 1e-6)))
    names = {"random": "Random pairs (seeded)", "worst": "The worst pairs"}
    return [
        {
            "title": names.get(kind, kind),
            "gain": gain,
            "rows": [
                {
                    "index": index,
                    "label": None if labels is None else labels[index],
                    "psnr": psnr[index] if index < len(psnr) else None,
                    "original": plots.picture(a, low, high),
                    "compressed": plots.picture(b, low, high),
                    "difference": plots.picture((b - a) * gain, -(high - low) / 2, (high - low) / 2),
                }
                for index, a, b in rows
            ],
        }
        for kind, rows in images.items()
    ]


def render(result: Mapping[str, Any], images: Images) -> str:
    """The whole page. Every text is escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, size=size)
    template = environment.from_string(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    figures = [(title, text, draw(result)) for title, text, draw in FIGURES]
    return template.render(
        r=result,
        figures=[f for f in figures if f[2]],
        colours=plots.ROLE_COLOURS,
        sections=_triples(images, result),
        provenance=json.dumps(result["provenance"], indent=2),
    )

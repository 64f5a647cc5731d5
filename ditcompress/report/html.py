"""The report: one HTML file without scripts or outside requests, rendered from the JSON of a result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint.writer import save_atomic
from ..console import amount, number, seconds, size
from ..errors import DitcompressError
from ..result import SCHEMA_VERSION
from . import figures, plots
from .card import evaluated_card

Images = Mapping[str, Sequence[tuple[int, Tensor, Tensor]]]
SCHEMA = Path(__file__).parent / "schema.json"


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
    (folder / "README.md").write_text(evaluated_card(result), encoding="utf-8")


def read_report(folder: Path) -> tuple[dict[str, Any], Images]:
    """What `write_report` stored; E301 where there is no report."""
    try:
        result = json.loads((folder / "report.json").read_text())
    except (OSError, ValueError):
        raise DitcompressError(
            "E301", folder / "report.json", "is no report", "run `ditcompress evaluate ... --out DIR`"
        ) from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA_VERSION:
        raise DitcompressError(
            "E323", folder / "report.json", f"is no report of schema {SCHEMA_VERSION}", "run evaluate again"
        )
    missing = sorted(set(json.loads(SCHEMA.read_text())["required"]) - set(result))
    if missing:
        what = f"has no {', '.join(missing)}"
        raise DitcompressError("E323", folder / "report.json", what, "run evaluate again")
    return result, _read_images(folder / "images.safetensors")


def _read_images(file: Path) -> Images:
    """E323 for a file that `write_report` did not write."""
    images: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    try:
        for name, pair in sorted(load_file(file).items()) if file.is_file() else ():
            kind, _, index = name.split("/")
            images.setdefault(kind, []).append((int(index), pair[0], pair[1]))
    except (SafetensorError, ValueError, IndexError, OSError) as error:
        raise DitcompressError("E323", file, f"is damaged ({type(error).__name__})", "run evaluate again") from None
    return images


def _triples(images: Images, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Image sections: random pairs, then the worst, each as original, compressed and amplified difference."""
    psnr = result["pairs"].get("psnr", [])
    labels = result["pairs"].get("labels")
    images = {kind: [(i, a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)) for i, a, b in images[kind]] for kind in images}
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


def environment() -> jinja2.Environment:
    """Templates of this folder, everything escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(number=number, size=size, seconds=seconds, amount=amount)
    return made


def render(result: Mapping[str, Any], images: Images) -> str:
    """The whole page. Every text is escaped."""
    return (
        environment()
        .get_template("template.html")
        .render(
            r=result,
            tiers=_tiers(result["measurements"]),
            figures=figures.drawn(result),
            colours={role: plots.ROLE_COLOURS[role] for role in _roles(result["layers"])},
            sections=_triples(images, result),
            provenance=json.dumps(result["provenance"], indent=2),
        )
    )


TIERS = {
    "T2": "the denoiser on the same inputs",
    "T3": "same-noise pairs of images",
    "T4": "distribution of the images",
    "T5": "external metrics",
}


def _tiers(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """(tier, its title, its rows) in order; rows of a tier keep theirs."""
    return [(t, text, mine) for t, text in TIERS.items() if (mine := [m for m in rows if m["tier"] == t])]


def _roles(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Roles that occur, in the order of the palette."""
    found = {x["role"] for x in layers}
    return [role for role in plots.ROLE_COLOURS if role in found]

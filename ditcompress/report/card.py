"""Model cards: the README.md of an output folder, with the metadata block that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..console import amount, number, printable_cell, size

# what the card's table shows of a report
ROWS = ("sqnr_weighted", "psnr", "ssim", "fd_original", "fd_reference", "recall", "coverage", "class_accuracy")


def _render(template: str, **values: Any) -> str:
    """Markdown is no HTML: nothing is escaped by the engine, every outside text passes `text` or `yaml`."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters.update(number=number, size=size, amount=amount, text=printable_cell, yaml=json.dumps)
    return made.get_template(template).render(**values)


def quantized_card(
    name: str,
    original: str,
    class_name: str,
    recipe: Mapping[str, Any],
    records: Sequence[Any],
    original_bytes: int,
    stored_bytes: int,
    pipeline: bool,
) -> str:
    """Of a compressed checkpoint: what was done to which roles, how small it is, how it is loaded."""
    roles: dict[str, list[float]] = {}
    for record in records:
        entry = roles.setdefault(record.role, [0, 0.0, 0])
        weights = record.shape[0] * record.shape[1]
        entry[0] += weights
        entry[1] += weights * record.bits
        entry[2] += 1
    table: list[dict[str, Any]] = [
        {"role": role, "linears": int(n), "weights": int(w), "bits": b / w} for role, (w, b, n) in roles.items()
    ]
    weights = sum(row["weights"] for row in table)
    bits = sum(row["weights"] * row["bits"] for row in table) / weights if weights else None
    return _render(
        "card.md", name=name, original=original, class_name=class_name, recipe=recipe, table=table, bits=bits,
        original_bytes=original_bytes, stored_bytes=stored_bytes, pipeline=pipeline,
    )  # fmt: skip


def pruned_card(
    original: str, class_name: str, facts: Mapping[str, Any], original_bytes: int, stored_bytes: int, pipeline: bool
) -> str:
    """Of a checkpoint with fewer blocks; `facts` are those of its prune.json."""
    return _render(
        "pruned.md", original=original, class_name=class_name, facts=facts, original_bytes=original_bytes,
        stored_bytes=stored_bytes, pipeline=pipeline,
    )  # fmt: skip


def evaluated_card(result: Mapping[str, Any]) -> str:
    """Of an evaluation: the verdict and the main figures with intervals, as a model index."""
    rows = [m for m in result["measurements"] if m["name"] in ROWS or m["gate"]]
    return _render("evaluation.md", r=result, rows=rows)


def distilled_card(name: str, class_name: str, facts: Mapping[str, Any], pipeline: bool) -> str:
    """Of a trained student: who taught it, how, and its error before and after."""
    return _render("distilled.md", name=name, class_name=class_name, pipeline=pipeline, **{
        key: facts[key] for key in ("teacher", "student", "options", "before", "after")
    })  # fmt: skip

"""GenEval's image folder (djghosh13/geneval, README): 00000/metadata.jsonl and 00000/samples/0000.png for each prompt.

metadata.jsonl is the prompt's line of GenEval's evaluation_metadata.jsonl, whose tag, include and exclude the evaluator
reads: give those lines as `details`. With prompts alone the folder is complete but for them, and the facts say so. The
grid, optional there, is not written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DitcompressError
from ..pixels import Images
from .base import ROUNDING, Details, even, group_prompts, json_line, pictures, save_png

LABEL = "GenEval: object-focused text-to-image alignment"


def write(
    folder: Path,
    images: Images,
    prompts: Sequence[str] | None,
    labels: Sequence[int] | None,
    per_prompt: int,
    *,
    seed: int | None = None,
    details: Details | None = None,
) -> dict[str, Any]:
    groups = group_prompts(prompts, len(images), per_prompt, "geneval")
    each = even(groups, "geneval")
    lines = [
        _metadata(text, details, source, prompts or ())
        for text, source in zip(groups.texts, groups.sources, strict=True)
    ]
    for number, line in enumerate(lines):
        (folder / f"{number:05d}" / "samples").mkdir(parents=True)
        (folder / f"{number:05d}" / "metadata.jsonl").write_text(json_line(line), encoding="utf-8")
    count = 0
    for picture, group, place in zip(pictures(images), groups.group, groups.place, strict=True):
        save_png(folder / f"{group:05d}" / "samples" / f"{place:04d}.png", picture)
        count += 1
    bare = sum("tag" not in line for line in lines)
    facts = {"prompts": len(lines), "images": count, "per_prompt": each, "rounding": ROUNDING,
             "run": "python evaluation/evaluate_images.py <folder> --model-path <detector folder>"}  # fmt: skip
    if bare:
        facts["incomplete"] = f"{bare} prompts have no tag and include: put GenEval's own lines into metadata.jsonl"
    return facts


def _metadata(text: str, details: Details | None, source: int, prompts: Sequence[str]) -> Mapping[str, Any]:
    """The prompt's own line of the benchmark, or the prompt alone."""
    if details is None:
        return {"prompt": text}
    if len(details) != len(prompts) or details[source].get("prompt") != text:
        what = "the metadata lines are not those of the prompts"
        raise DitcompressError("E203", "layout geneval", what, "give one line a prompt, in the order of the prompts")
    return details[source]

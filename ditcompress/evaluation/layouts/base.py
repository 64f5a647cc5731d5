"""Contract of the sample layouts: folders that other projects' evaluators read.

A layout module exports

    LABEL  whose evaluator reads it
    write(folder, images, prompts, labels, per_prompt, *, seed=None, details=None) -> facts

and writes into `folder`, which exists and is empty; whole output or nothing is the caller's business. Images come in
chunks and are written as they come. `prompts` has one text for each image, or one for every `per_prompt` images that
follow each other; `labels` one class for each image; `details` one mapping for each of the `prompts`: the whole line
of a benchmark's own prompt file. The facts are plain JSON values.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import DitcompressError
from ..pixels import Images, batches, to_bytes

BATCH = 16
ROUNDING = "clamped to [-1, 1], (x + 1) * 127.5 rounded to nearest"

Details = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts in order, and for each image the number of its prompt and its place among that prompt's."""

    texts: tuple[str, ...]
    sources: tuple[int, ...]  # the place of each distinct prompt among the given ones
    group: tuple[int, ...]
    place: tuple[int, ...]


def group_prompts(prompts: Sequence[str] | None, n: int, per_prompt: int, layout: str) -> Prompts:
    """Which image belongs to which prompt; E203 where there are none or the numbers do not fit."""
    if prompts is None or not prompts:
        raise DitcompressError("E203", f"layout {layout}", "needs prompts, the model has none", "choose layout images")
    if len(prompts) == n:
        sources = list(dict.fromkeys(prompts))
        number = {text: i for i, text in enumerate(sources)}
        group = [number[text] for text in prompts]
        places = tuple(prompts.index(text) for text in sources)
        texts = tuple(sources)
    elif len(prompts) * per_prompt == n:
        group, places, texts = [i // per_prompt for i in range(n)], tuple(range(len(prompts))), tuple(prompts)
    else:
        what = f"{len(prompts)} prompts with {per_prompt} images each for {n} images"
        raise DitcompressError("E203", f"layout {layout}", what, "give one prompt an image, or matching numbers")
    seen = [0] * len(texts)
    place = []
    for g in group:
        place.append(seen[g])
        seen[g] += 1
    return Prompts(texts, places, tuple(group), tuple(place))


def even(groups: Prompts, layout: str) -> int:
    """The number of images of every prompt; E203 where prompts have different numbers, which would weigh them."""
    counts = Counter(groups.group)
    if len(set(counts.values())) != 1:
        what = f"prompts have from {min(counts.values())} to {max(counts.values())} images"
        raise DitcompressError("E203", f"layout {layout}", what, "make the same number of images for every prompt")
    return counts[0]


def check_labels(labels: Sequence[int] | None, n: int, layout: str) -> list[int] | None:
    """Labels as integers, one for each image; E203 otherwise."""
    if labels is None:
        return None
    found = [int(label) for label in labels]
    if len(found) != n:
        raise DitcompressError("E203", f"layout {layout}", f"{len(found)} labels for {n} images", "give one an image")
    return found


def pictures(images: Images) -> Iterator[np.ndarray]:
    """uint8 (height, width, 3) of every image, in order."""
    for batch in batches(images, BATCH):
        yield from to_bytes(batch).permute(0, 2, 3, 1).contiguous().numpy()


def save_png(path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(path, format="PNG")


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON with a newline; texts stay readable, line separators cannot break the line."""
    text = json.dumps(dict(value), ensure_ascii=False)
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085") + "\n"

"""Plain numbered PNGs and manifest.jsonl, one line an image: file, index, seed, and label or prompt where there is one.

Numbers have as many digits as the last one needs, six at least, so that names sort in order: what clean-fid,
torch-fidelity, dgm-eval and every other tool that takes a folder of images reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..pixels import Images
from .base import ROUNDING, Details, check_labels, group_prompts, json_line, pictures, save_png

LABEL = "plain PNG folder with a manifest"
MANIFEST = "manifest.jsonl"


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
    n = len(images)
    found = check_labels(labels, n, "images")
    groups = group_prompts(prompts, n, per_prompt, "images") if prompts else None
    digits = max(6, len(str(n - 1)))
    (folder / "images").mkdir()
    count = 0
    with open(folder / MANIFEST, "w", encoding="utf-8") as manifest:
        for index, picture in enumerate(pictures(images)):
            name = f"images/{index:0{digits}d}.png"
            save_png(folder / name, picture)
            line: dict[str, Any] = {"file": name, "index": index, "seed": seed}
            if found is not None:
                line["label"] = found[index]
            if groups is not None:
                line["prompt"] = groups.texts[groups.group[index]]
            manifest.write(json_line(line))
            count += 1
    return {"images": count, "manifest": MANIFEST, "rounding": ROUNDING}

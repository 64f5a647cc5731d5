"""VBench's video folder (Vchitect/VBench, prompts/README.md): "<prompt>-<index>.mp4", index from 0, five a prompt.

VBench scores motion, so it needs videos: chunks of (n, frames, channels, height, width). Images are refused. Frames are
written with imageio and its ffmpeg.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import DitcompressError, printable
from ..pixels import Images, rgb, to_bytes
from .base import ROUNDING, Details, even, group_prompts

LABEL = "VBench: video quality in 16 dimensions"
FOLDER = "videos"
FRAMES_PER_SECOND = 8  # as its prompts/README.md writes them
LONGEST = 255  # bytes of a file name


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
    videos = _videos(images)
    first = next(videos, None)
    if first is None or first.ndim != 4:
        raise DitcompressError("E203", "layout vbench", "needs videos, these are images", "choose geneval or images")
    frames_each = len(first)
    groups = group_prompts(prompts, len(images), per_prompt, "vbench")
    each = even(groups, "vbench")
    names = [_name(groups.texts[g], place) for g, place in zip(groups.group, groups.place, strict=True)]
    if len(set(names)) != len(names):
        raise DitcompressError("E203", "layout vbench", "two videos would have one name", "give each prompt once")
    writer = _imageio()
    (folder / FOLDER).mkdir()  # apart: VBench takes the ending of all videos from any file it meets first
    for name, video in zip(names, _videos(images), strict=True):
        frames = to_bytes(rgb(video)).permute(0, 2, 3, 1).contiguous().numpy()
        # Any size of frame: macro_block_size 1 keeps ffmpeg from rescaling to a multiple of 16.
        writer.mimwrite(folder / FOLDER / name, list(frames), fps=FRAMES_PER_SECOND, macro_block_size=1)
    return {"videos": len(names), "prompts": len(groups.texts), "per_prompt": each, "frames": frames_each,
            "frames_per_second": FRAMES_PER_SECOND, "rounding": ROUNDING}  # fmt: skip


def _videos(images: Images) -> Iterator[Tensor]:
    """Each video (frames, channels, height, width); an image comes out with three dimensions."""
    for chunk in images.chunks():
        yield from chunk


def _name(prompt: str, index: int) -> str:
    """VBench finds a video by its prompt, so a prompt that is no file name cannot be changed into one."""
    name = f"{prompt}-{index}.mp4"
    if "/" in prompt or printable(prompt, 1000) != prompt or len(name.encode()) > LONGEST:
        raise DitcompressError("E203", f"prompt {printable(prompt, 60)!r}", "is no file name", "leave this prompt out")
    return name


def _imageio() -> Any:
    try:
        importlib.import_module("imageio_ffmpeg")
        return importlib.import_module("imageio")
    except Exception as error:
        what = f"imageio cannot be imported ({type(error).__name__})"
        raise DitcompressError("E204", "layout vbench", what, "pip install 'imageio[ffmpeg]'") from None

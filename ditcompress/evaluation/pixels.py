"""Image sets that are read in chunks, so that memory does not grow with their number, and their conversion to bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ..errors import DitcompressError


class Images(Protocol):
    """A set of images in a fixed order; every call of `chunks` starts at the first image again."""

    def __len__(self) -> int: ...

    def chunks(self) -> Iterator[Tensor]:
        """float32 (n, channels, height, width) in [-1, 1], any n from 1."""
        ...


def batches(images: Images, size: int) -> Iterator[Tensor]:
    """RGB float32 (size, 3, height, width) on the CPU, the last batch smaller, however the chunks are cut.

    Raises E205 for anything but grey or RGB images, E701 for values that are not finite, and E323 where the set ends
    before its length.
    """
    waiting: list[Tensor] = []
    held = seen = 0
    for chunk in images.chunks():
        seen += len(chunk)
        for part in rgb(chunk).split(size):
            waiting.append(part)
            held += len(part)
            if held >= size:
                joined = torch.cat(waiting)
                yield joined[:size]
                waiting, held = [joined[size:]], held - size
    if seen != len(images):
        raise DitcompressError("E323", "images", f"{seen} of {len(images)} could be read", "make the samples again")
    if held:
        yield torch.cat(waiting)


def rgb(chunk: Tensor) -> Tensor:
    """(n, 1 or 3, height, width) to finite float32 (n, 3, height, width); grey is repeated. E205, E701 otherwise."""
    if chunk.ndim != 4 or chunk.shape[1] not in (1, 3):
        found = f"have shape {tuple(chunk.shape[1:])}, not 1 or 3 channels of pixels"
        raise DitcompressError("E205", "images", found, "decode latents into pixels first")
    chunk = chunk.detach().to("cpu", torch.float32)
    if not torch.isfinite(chunk).all():
        raise DitcompressError("E701", "images", "have values that are not finite", "look at the integrity checks")
    return chunk.expand(-1, 3, -1, -1)


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] to uint8 [0, 255] of the same shape, clamped and rounded to nearest (as diffusers saves images)."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """RGB (n, 3, height, width) in [-1, 1] to 8-bit pictures."""
    return [Image.fromarray(image.numpy()) for image in to_bytes(images).permute(0, 2, 3, 1).contiguous()]

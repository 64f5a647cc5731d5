"""Images on disk, a chunk at a time: what an evaluation holds in memory does not grow with their number.

A set of images is a folder of safetensors chunks of a fixed size. A chunk appears whole or not at all, so half-done
sets continue where they stopped; a chunk holds the same images whatever the batch size was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True)
class ImageSet:
    """Float32 images (count, channels, height, width) of one model, by index, stored in `folder` as `name`-*."""

    folder: Path
    name: str
    count: int

    def path(self, start: int) -> Path:
        return self.folder / f"{self.name}-{start:08d}.safetensors"

    @property
    def starts(self) -> range:
        return range(0, self.count, CHUNK)

    def indices(self, start: int) -> list[int]:
        return list(range(start, min(start + CHUNK, self.count)))

    def __len__(self) -> int:
        return self.count

    def chunks(self) -> Iterator[Tensor]:
        """Chunks of up to CHUNK images in order."""
        for start in self.starts:
            yield load_file(self.path(start))["images"][: self.count - start]

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Single images (channels, height, width)."""
        found = []
        for index in indices:
            start = index // CHUNK * CHUNK
            with safe_open(self.path(start), "pt") as file:
                found.append(file.get_slice("images")[index - start])
        return found

    def missing(self) -> list[int]:
        """Starts of the chunks that are not there yet."""
        return [start for start in self.starts if stored_count(self.path(start)) < len(self.indices(start))]

    def fill(self, make: Callable[[list[int]], Tensor], advance: Callable[[int], None]) -> ImageSet:
        """Make the chunks that are not there yet; `make` gives the images of some indices."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = set(self.missing())
        for start in self.starts:
            wanted = self.indices(start)
            if start in missing:
                path = self.path(start)
                save_file({"images": make(wanted).float().contiguous()}, f"{path}.part")
                os.replace(f"{path}.part", path)
            advance(len(wanted))
        return self


def stored_count(path: Path) -> int:
    """Images in a finished chunk; 0 where there is none or it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return int(file.get_slice("images").get_shape()[0])
    except Exception:
        return 0


@dataclass(frozen=True)
class InMemory:
    """A few images as an image set, for Python users and tests."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def chunks(self) -> Iterator[Tensor]:
        yield from torch.split(self.images, CHUNK)

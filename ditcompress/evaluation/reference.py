"""Reference images: an image folder, an `.npz` (arr_0 or images, arr_1 or labels) or safetensors (images, labels).

Bytes 0..255 become [-1, 1]; floating images must already lie there. Images are read a chunk at a time and never
resized: resizing changes a Fréchet distance more than most compressions do.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import DitcompressError
from .images import CHUNK

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_PIXELS = 2**26
MOST_CLASSES = 2**17


class Rows(Protocol):
    """Raw images by position; uint8 or float, channels first."""

    @property
    def count(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class Reference:
    """Real images of `shape` (channels, height, width) with labels (count,) where the source has any."""

    path: Path
    rows: Rows
    shape: tuple[int, int, int]
    labels: Tensor | None = None
    classes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return self.rows.count

    def chunks(self) -> Iterator[Tensor]:
        """Float32 chunks in [-1, 1], in order; E333 for images that cannot be read."""
        for start in range(0, len(self), CHUNK):
            yield scaled(self.rows.read(start, min(start + CHUNK, len(self))), self.path)


def bad(path: Path | str, what: str, remedy: str = "give an image folder, an .npz or a .safetensors") -> Any:
    return DitcompressError("E333", path, what, remedy)


def scaled(images: Tensor, path: Path) -> Tensor:
    """[-1, 1] float32 from uint8 or from floats that lie there."""
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    images = images.float()
    if not bool(torch.isfinite(images).all()) or float(images.abs().max()) > 1.001:
        raise bad(path, "floating images are not within [-1, 1]", "scale them, or store them as uint8")
    return images


def open_reference(path: Path, expected: Sequence[int] | None = None) -> Reference:
    """The images at `path`; E333 unless they are readable and of the `expected` (channels, height, width)."""
    if path.is_dir():
        found = _folder(path)
    elif path.suffix == ".npz":
        found = _npz(path)
    elif path.suffix == ".safetensors":
        found = _safetensors(path)
    else:
        raise bad(path, "is no reference" if path.exists() else "does not exist")
    if not len(found):
        raise bad(path, "holds no images")
    if found.labels is not None:
        found = replace(found, labels=_checked_labels(path, found.labels, len(found)))
    if expected is not None and tuple(found.shape) != tuple(expected):
        sizes = ["x".join(map(str, s)) for s in (found.shape, expected)]
        raise bad(path, f"images are {sizes[0]}, the model makes {sizes[1]}", "prepare the reference at that size")
    return found


def _checked_labels(path: Path, labels: Tensor, count: int) -> Tensor | None:
    """The labels; None where all are of one class: a classifier of it would always be right and see nothing."""
    if len(labels) != count:
        raise bad(path, f"{len(labels)} labels for {count} images", "store one label an image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MOST_CLASSES:
        raise bad(path, f"has labels from {low} to {high}", f"store labels from 0 to {MOST_CLASSES - 1} at most")
    return None if low == high else labels


def _checked_shape(path: Path, shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or shape[0] not in (1, 3) or not 0 < shape[1] * shape[2] <= MOST_PIXELS:
        raise bad(path, f"holds no images (shape {tuple(shape)})", "store grey or RGB images")
    return int(shape[0]), int(shape[1]), int(shape[2])


# --- safetensors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SafetensorsRows:
    path: Path
    count: int

    def read(self, start: int, stop: int) -> Tensor:
        with safe_open(self.path, "pt") as file:
            return file.get_slice("images")[start:stop]


def _safetensors(path: Path) -> Reference:
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if "images" not in names:
                raise bad(path, "has no tensor `images`", "name it images, (n, channels, height, width)")
            shape = file.get_slice("images").get_shape()
            labels = file.get_tensor("labels").flatten().long() if "labels" in names else None
    except DitcompressError:
        raise
    except Exception as error:
        raise bad(path, f"cannot be read ({type(error).__name__})") from None
    size = _checked_shape(path, shape[1:])
    return Reference(path, _SafetensorsRows(path, int(shape[0])), size, labels)


# --- npz, as ADM's evaluator writes it: images last-channel uint8 -----------------------------------------------------


@dataclass(frozen=True)
class _NpzRows:
    """Rows of one array inside the archive, streamed: the archive is never held in memory."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    count: int

    def read(self, start: int, stop: int) -> Tensor:
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                _npy_header(file)
                file.seek(file.tell() + start * size)
                data = file.read((stop - start) * size)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise bad(self.path, f"cannot be read at image {start} ({type(error).__name__})", "copy it again") from None
        if len(data) != (stop - start) * size:
            raise bad(self.path, f"ends before image {stop}", "copy it again")
        array = np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])
        array = array[..., None] if array.ndim == 3 else array
        return torch.from_numpy(array.copy()).permute(0, 3, 1, 2)


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _npz(path: Path) -> Reference:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            member = next(n for n in ("arr_0.npy", "images.npy") if n in names)
            with archive.open(member) as file:
                shape, fortran, dtype = _npy_header(file)
        label_name = next((n for n in ("arr_1.npy", "labels.npy") if n in names), None)
        labels = None
        if label_name:
            with np.load(path, allow_pickle=False) as table:
                labels = torch.from_numpy(np.asarray(table[label_name[:-4]]).astype(np.int64)).flatten()
    except StopIteration:
        raise bad(path, "has no array arr_0 or images", "store images as arr_0, uint8 (n, height, width, 3)") from None
    except Exception as error:
        raise bad(path, f"cannot be read ({type(error).__name__})") from None
    if fortran or dtype.kind not in "uf" or (dtype.kind == "u" and dtype != np.uint8):
        raise bad(path, f"images are {dtype}{' in Fortran order' if fortran else ''}", "store uint8 images")
    last = shape[1:] if len(shape) == 4 else (*shape[1:], 1)
    size = _checked_shape(path, (last[-1], *last[:-1]) if len(last) == 3 else last)
    return Reference(path, _NpzRows(path, member, tuple(shape), dtype, int(shape[0])), size, labels)


# --- image folders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FolderRows:
    files: tuple[Path, ...]
    shape: tuple[int, int, int]
    count: int

    def read(self, start: int, stop: int) -> Tensor:
        return torch.stack([self._one(path) for path in self.files[start:stop]])

    def _one(self, path: Path) -> Tensor:
        image = read_image(path, self.shape[0])
        if tuple(image.shape) != self.shape:
            sizes = ["x".join(map(str, s[1:])) for s in (image.shape, self.shape)]
            raise bad(path, f"is {sizes[0]}, the others are {sizes[1]}", "give images of one size")
        return image


def read_image(path: Path, channels: int) -> Tensor:
    """One image file as uint8 (channels, height, width); E333 for a file that is no whole image."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            array = np.asarray(opened.convert("L" if channels == 1 else "RGB"))
    except Exception as error:
        raise bad(path, f"is no readable image ({type(error).__name__})", "copy it again or remove it") from None
    return torch.from_numpy(array.copy()).reshape(array.shape[0], array.shape[1], channels).permute(2, 0, 1)


def _folder(path: Path) -> Reference:
    """Images directly inside, or one folder a class: classes in the order of their names or numbers."""
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise bad(path, "holds no images", f"put {', '.join(SUFFIXES)} files into it")
    from PIL import Image

    try:
        with Image.open(files[0]) as first:
            channels = 1 if first.mode in ("1", "L", "I;16", "I") else 3
            shape = (channels, first.height, first.width)
    except Exception as error:
        raise bad(files[0], f"is no readable image ({type(error).__name__})", "copy it again or remove it") from None
    names = sorted({p.relative_to(path).parts[0] for p in files if len(p.relative_to(path).parts) > 1})
    labels = None
    if names and all(len(p.relative_to(path).parts) > 1 for p in files):
        names = sorted(names, key=int) if all(n.isdecimal() for n in names) else names
        labels = torch.tensor([names.index(p.relative_to(path).parts[0]) for p in files])
    rows = _FolderRows(tuple(files), _checked_shape(path, shape), len(files))
    return Reference(path, rows, rows.shape, labels, tuple(names))

"""The sample batch that guided-diffusion's evaluations/evaluator.py reads: an .npz with one array of all images.

`arr_0` is uint8 (n, height, width, 3) RGB; `arr_1` holds the labels of class-conditional samples, as its own sampling
script writes them. The array is streamed into the archive, uncompressed, so the evaluator can stream it out again, and
neither end holds all images.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ...errors import DitcompressError
from ..pixels import Images
from .base import ROUNDING, Details, check_labels, pictures

LABEL = "guided-diffusion (ADM) evaluator: FID, sFID, IS, precision and recall"
NAME = "samples.npz"


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
    found = check_labels(labels, n, "adm")
    stream = pictures(images)
    first = next(stream, None)
    if first is None:
        raise DitcompressError("E203", "layout adm", "there are no images", "make samples first")
    # Entries carry no date of today, so the same samples give the same bytes.
    with zipfile.ZipFile(folder / NAME, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
            _header(entry, (n, *first.shape), first.dtype)
            for picture in itertools.chain([first], stream):
                if picture.shape != first.shape:
                    what = f"have sizes {first.shape[:2]} and {picture.shape[:2]}"
                    raise DitcompressError("E205", "images", what, "one batch holds one size")
                entry.write(picture.tobytes())
        if found is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as entry:
                np.lib.format.write_array(cast(Any, entry), np.array(found, np.int64), allow_pickle=False)
    return {"files": 1, "images": n, "shape": [n, *first.shape], "labels": found is not None, "rounding": ROUNDING,
            "run": f"python evaluator.py <reference>.npz {NAME}"}  # fmt: skip


def _header(entry: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Version 1.0, C order: what the evaluator streams; any other version it reads whole."""
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(cast(Any, entry), fields)

"""What the extractors from local weight folders share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import DitcompressError
from ..local_weights import MODEL_FILES, Pinned, Unavailable, first_line
from ..local_weights import pinned as pinned_weights
from . import Extractor, Request, failed


def pinned(request: Request, name: str) -> Pinned:
    """The weights `name`, or the one of --extractor KIND:NAME, below --weights-dir; E337 where they are not pinned."""
    return pinned_weights(request, request.argument or name)


def opened(label: str, request: Request, make: Callable[[], tuple[Any, Pinned]]) -> Extractor:
    """The extractor of `make`, which gives features (images -> (n, d)) and their weights. E337 with one line where the
    weights are missing, not pinned or do not load, or the images are neither grey nor RGB."""
    if request.shape[0] not in (1, 3):
        raise failed(f"--extractor {label}", f"the model makes {request.shape}, not grey or RGB images", "use another")
    try:
        features, weights = make()
    except Unavailable as error:
        raise failed(f"--extractor {label}", str(error), "see docs/weights.md") from None
    except DitcompressError:
        raise
    except Exception as error:
        raise failed(f"--extractor {label}", first_line(error), "see docs/weights.md") from None
    return Extractor(label, _digest(weights.path), features)


def _digest(path: Path) -> str:
    """sha256 over the names and bytes of the weights; their files were checked against SHA256SUMS just before."""
    files = sorted(f for f in path.iterdir() if f.suffix in MODEL_FILES) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()

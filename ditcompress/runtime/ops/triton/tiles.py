"""Which tile a product runs with: a table where shapes were measured, else a model of waves over the multiprocessors.

The model: a tile's time is its area over the share of peak that such tiles reach, and a multiprocessor takes its part
of the tiles, rounded up. The shares are guesses from what others measured on H100 (large tiles with 8 warps near peak,
small ones limited by loads); `benchmarks/kernel_times.py --tune` prints measured lines for `MEASURED`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a tile, warps and pipeline stages; `programs` fit a multiprocessor of Hopper
    (registers and shared memory, `benchmarks/kernels_compile.py`)."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int
    share: float  # of peak, once every multiprocessor is busy
    tma: bool = False  # operands by the bulk copy engine of Hopper: not measured yet, `--tune` tries both


TILES = (
    Tile(128, 256, 128, 8, 4, 1, 1.0),
    Tile(128, 128, 128, 4, 3, 2, 0.92),
    Tile(64, 128, 128, 4, 4, 2, 0.80),
    Tile(64, 64, 128, 4, 4, 3, 0.62),
    Tile(32, 64, 256, 4, 3, 4, 0.40),
    Tile(16, 64, 256, 4, 4, 3, 0.25),
)
SMALL = Tile(16, 32, 64, 4, 2, 4, 0.1)  # for the interpreter

# {(bucket of M, N, K): Tile}; empty until it is measured
MEASURED: dict[tuple[int, int, int], Tile] = {}


def bucket(rows: int) -> int:
    """Row counts that share a tile: the next power of two, at least 16."""
    return max(16, 1 << max(rows - 1, 0).bit_length())


def waves(tile: Tile, rows: tuple[int, ...], columns: int, processors: int) -> float:
    """Relative time of a launch with these tiles."""
    tiles = sum(math.ceil(count / tile.m) for count in rows) * math.ceil(columns / tile.n)
    return math.ceil(tiles / processors) * tile.m * tile.n / tile.share


def choose(rows: tuple[int, ...], columns: int, depth: int, processors: int) -> Tile:
    """The tile for products of `rows` each by (columns, depth), launched together."""
    found = MEASURED.get((bucket(sum(rows)), columns, depth))
    return found or min(TILES, key=lambda tile: waves(tile, rows, columns, processors))

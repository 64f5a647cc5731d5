"""Training states from cached latents: a folder of safetensors shards, noised by the scheduler.

Every shard holds `latents` (n, *latent_shape), scaled as the sampler has them, and the model's condition tensors
(n, ...) named as the forward arguments; `null.NAME` (1 or n, ...) stands for a dropped condition where the family has
none of its own (text embeddings of the empty prompt). Shards are read row by row, in the order of their names.

Timesteps are uniform over those of training: the table of alpha-bar, or for flows the shifted table of sigmas, which is
how the sampler will meet them. State and noise depend only on the seed and the position in the run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..calibration.conditions import NULL, Conditions, check_conditions
from ..calibration.trajectory import generator
from ..errors import DitcompressError
from .data import EVERY, Batch, dropped_out
from .noising import Noising

CHECKED = 64  # rows of every shard whose values are checked before training


class Latents:
    """States of a folder of shards; each pass over the samples has an order of its own."""

    def __init__(
        self, folder: Path, adapter: ModuleType, config: Mapping[str, Any], scheduler: Any, *, seed: int = 0,
        null: float = 0.15, parts: int = 1, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.folder, self.adapter, self.config = folder, adapter, config
        self.seed, self.null, self.parts, self.device = seed, null, parts, device
        self.noising = Noising(scheduler, adapter, config)
        if not folder.is_dir():
            raise DitcompressError(
                "E301", folder, "there is no such folder", "give trajectories, or a folder of latents"
            )
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise DitcompressError("E338", folder, "holds no .safetensors file", "see `ditcompress distill --help`")
        self.shards = [_opened(file) for file in files]
        self.names = self._names(files[0], self.shards[0])
        self.ends = list(accumulate(self._checked(file, shard) for file, shard in zip(files, self.shards, strict=True)))
        self.order: tuple[int, list[int]] = (-1, [])

    @property
    def count(self) -> int:
        return self.ends[-1]

    def _names(self, file: Path, shard: Any) -> list[str]:
        names = set(shard.keys())
        if "latents" not in names:
            raise DitcompressError("E338", file, "holds no tensor named latents", "name the latents so")
        return sorted(names - {"latents"})

    def _checked(self, file: Path, shard: Any) -> int:
        """The samples of one shard, whose shapes, names and first values fit the model; E338 or E330 otherwise."""
        if sorted(set(shard.keys()) - {"latents"}) != self.names:
            raise DitcompressError(
                "E338", file, "holds other tensors than the first shard", "give every shard the same"
            )
        shape = tuple(shard.get_slice("latents").get_shape())
        wanted = tuple(self.adapter.latent_shape(self.config))
        if shape[1:] != wanted or not shape[0]:
            what = f"latents of shape {shape}, the model draws (n, {', '.join(map(str, wanted))})"
            raise DitcompressError("E338", file, what, "encode the images for this model")
        for name in self.names:
            rows = (shard.get_slice(name).get_shape() or [0])[0]
            if rows != shape[0] and not (name.startswith(NULL) and rows == 1):
                raise DitcompressError(
                    "E338", f"{file}: {name}", f"{rows} samples for {shape[0]} latents", "give each one"
                )
        first = [self._row(shard, i) for i in range(min(CHECKED, shape[0]))]
        if not all(bool(row["latents"].isfinite().all()) for row in first):
            raise DitcompressError("E338", file, "latents with NaN or infinity", "encode the images again")
        cond = {name: torch.stack([row[name] for row in first]) for name in self.names}
        null = {name.removeprefix(NULL): t for name, t in cond.items() if name.startswith(NULL)}
        cond = {name: t for name, t in cond.items() if not name.startswith(NULL)}
        check_conditions(file, Conditions(cond, null or None, ""), self.adapter, self.config)
        return int(shape[0])

    def _row(self, shard: Any, row: int) -> dict[str, Tensor]:
        found = {}
        for name in ("latents", *self.names):
            part = shard.get_slice(name)
            at = row if part.get_shape()[0] > 1 else 0
            found[name] = part[at : at + 1][0]
        return found

    def _sample(self, position: int) -> dict[str, Tensor]:
        """The sample at a position of the run: whole shuffled passes, one after another."""
        number, place = divmod(position, self.count)
        if self.order[0] != number:
            draw = generator(self.seed, number, 4_000_000)
            self.order = (number, torch.randperm(self.count, generator=draw).tolist())
        index = self.order[1][place]
        shard = bisect_right(self.ends, index)
        return self._row(self.shards[shard], index - (self.ends[shard - 1] if shard else 0))

    def _finite(self, latents: Tensor) -> Tensor:
        """The latents of one sample; E338 for NaN, which a training would otherwise blame on its learning rate."""
        if not bool(latents.isfinite().all()):
            raise DitcompressError("E338", self.folder, "latents with NaN or infinity", "encode the images again")
        return latents

    def batch(self, step: int, size: int, part: int = 0, rows: slice = EVERY) -> Batch:
        """The states of one training step."""
        latents, targets, times, dropped = [], [], [], []
        cond: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for number in range(size)[rows]:
            position = (step * self.parts + part) * size + number
            found = self._sample(position)
            draw = generator(self.seed, position, 5_000_000)
            index = int(torch.randint(len(self.noising.timesteps), (1,), generator=draw))
            dropped.append(bool(torch.rand(1, generator=draw) < self.null))
            clean = self._finite(found["latents"].float())
            noised, target = self.noising(clean, torch.randn(clean.shape, generator=draw), index)
            latents.append(noised)
            targets.append(target)
            times.append(self.noising.timesteps[index])
            for name in self.names:
                cond[name].append(found[name])
        stacked = {name: torch.stack(tensors) for name, tensors in cond.items()}
        given = {name: tensor for name, tensor in stacked.items() if not name.startswith(NULL)}
        null: Mapping[str, Tensor] | None = {n.removeprefix(NULL): t for n, t in stacked.items() if n.startswith(NULL)}
        null = null or (self.adapter.null_conditions(self.config, given) if self.null else None)
        given = dropped_out(given, null, torch.tensor(dropped))
        device = self.device
        return Batch(torch.stack(latents).to(device), torch.stack(times), given, torch.stack(targets).to(device))


def _opened(file: Path) -> Any:
    """A shard whose rows are read when they are wanted."""
    try:
        return safe_open(file, framework="pt")
    except Exception as error:
        what = f"cannot be read ({type(error).__name__})"
        raise DitcompressError("E338", file, what, "give whole safetensors files") from None

"""What a depth-pruning method is: one file that says how much each removable unit of blocks matters.

A method module exports `Params`, `NEEDS` (some of "probes": it runs the model; "training": it learns; "journal": it
measures long enough to go on from where it was killed) and

    scores(context, params) -> Scores            importance of each unit, higher = keep
    select(context, params, scores) -> units     optional: which units go, where it is more than the lowest scores
    width(context, units) -> ratio               optional: the share of heads and neurons that goes as well, and then
    damage(context, params, units, tensors) -> float   `Context.damage` of both together
    rewrite(context, params, units) -> tensors   optional: new values of tensors in blocks that stay, by the names that
                                                 they have in the whole model, shapes as they were
    share(context, params, units) -> modules     optional: for modules of blocks that stay, by path, the module of
                                                 another one that takes their place

Terms: a unit is one block, or several that can only go together (models/_depth.py). Its `cost` is what its removal
saves: parameters, floating-point operations or seconds. `context.target` is the cost that has to go.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..calibration.sensitivity import frozen
from ..console import Reporter, Silent
from ..distill.data import Trajectories
from ..errors import DitcompressError
from ..formats.base import StrictParams
from ..lockstep import together
from ..models import Depth
from ..models._table import block_of
from ..models.base import Layout
from ..offload import device_of, rewritten
from ..registry import Registry, nearest
from ..structure import without_blocks

registry = Registry("ditcompress.pruning", "pruning method", ("Params", "NEEDS", "scores"))

__all__ = ["Context", "Probe", "ProbeParams", "Scores", "StrictParams", "lowest_first", "method", "registry"]


class ProbeParams(StrictParams):
    """Where a method looks at the model: `timesteps` of `steps` sampler steps (0: all) of `samples` trajectories, run
    `batch` at a time; `guidance` None is the family's own. A few trajectories at every step rank blocks better than
    many at a few steps: on the embedded model only the former finds the best set."""

    samples: int = Field(8, ge=1, le=100_000)
    steps: int = Field(25, ge=1, le=1000)
    timesteps: int = Field(0, ge=0, le=1000)
    batch: int = Field(16, ge=1)
    guidance: float | None = Field(None, ge=0)


@dataclass(frozen=True)
class Probe:
    """One batch at one step of the model's own trajectories, both guidance branches: `latents` (n, ...), `timestep`
    (n,), `cond` by argument; `weight` is the squared influence of its prediction on the next latent, and that of the
    skipped steps nearest to it."""

    step: int
    latents: Tensor
    timestep: Tensor
    cond: Mapping[str, Tensor]
    weight: float

    def rows(self, chosen: slice) -> Probe:
        """The probe of some of its images."""
        cond = {name: tensor[chosen] for name, tensor in self.cond.items()}
        return Probe(self.step, self.latents[chosen], self.timestep[chosen], cond, self.weight)


@dataclass(frozen=True)
class Scores:
    """Importance by unit, higher = keep. `by_timestep`: one value for each of `timesteps`; `keep`: units that the
    method never gives up; `notes`: what else it found, as JSON values for prune.json; `tensors`: what it made of blocks
    by the way, as `rewrite` gives them, taken where the block stays."""

    values: Mapping[str, float]
    by_timestep: Mapping[str, Sequence[float]] = field(default_factory=dict)
    timesteps: Sequence[float] = ()
    keep: frozenset[str] = frozenset()
    notes: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Context:
    """Everything a method may look at. The model is never changed for good.

    For methods that learn: `data(images=, refresh=, sample_steps=, salt=)` gives training states along the model's own
    trajectories (it runs `model` whenever it renews them), `journal` is where the trainer keeps its states, and
    `remembered` its measurements."""

    model: nn.Module
    adapter: ModuleType
    layout: Layout
    depth: Depth
    costs: Mapping[str, float]
    target: float
    probes: Sequence[Probe] = ()
    seed: int = 0
    reporter: Reporter = field(default_factory=Silent)
    data: Callable[..., Trajectories] | None = None
    journal: Path | None = None
    abreast: int = 1
    _outputs: list[Tensor] = field(default_factory=list)
    _trials: dict[str, Any] | None = field(default=None, init=False)

    @property
    def names(self) -> list[str]:
        """Every unit, in forward order."""
        return [unit.name for unit in self.depth.units]

    def blocks(self, unit: str) -> tuple[str, ...]:
        return self.depth.of([unit])

    def predict(self, probe: Probe) -> Tensor:
        """The model's prediction for a probe, float32 (n, ...); differentiable where gradients are enabled."""
        device = device_of(self.model)
        return self.adapter.predict(self.model, probe.latents.to(device), probe.timestep.to(device), probe.cond).float()

    def project(self, probe: Probe, generator: torch.Generator) -> Tensor:
        """Sum over images of <v, y / |y|> for random directions v and the prediction y, with gradients of everything
        but the parameters (and the norm)."""
        latents = probe.latents.detach().requires_grad_(True)
        with self.still(), torch.enable_grad():
            flat = self.predict(Probe(probe.step, latents, probe.timestep, probe.cond, probe.weight)).flatten(1)
            direction = torch.randn(flat.shape, generator=generator).to(flat.device)
            return (direction * flat / flat.detach().norm(dim=1, keepdim=True)).sum()

    def references(self) -> list[Tensor]:
        """The whole model's prediction for every probe, on the CPU; computed once."""
        if not self._outputs:
            with torch.no_grad():
                self._outputs = list(self.predictions())
        return self._outputs

    def predictions(self) -> Iterator[Tensor]:
        """The prediction for every probe, on the CPU; `abreast` at a time go through an offloaded model together."""
        for start in range(0, len(self.probes), self.abreast):
            some = self.probes[start : start + self.abreast]
            yield from together(self.model, [lambda probe=probe: self.predict(probe).cpu() for probe in some])  # type: ignore[misc]

    def errors(self, units: Collection[str]) -> tuple[list[float], list[float]]:
        """Squared error and squared norm of the prediction without `units`, one of each for every probe."""
        noise, signal = [], []
        references = self.references()
        with torch.no_grad(), without_blocks(self.model, self.depth, self.depth.of(units)):
            for found, reference in zip(self.predictions(), references, strict=True):
                change = found.double() - reference.double()
                noise.append(float(change.square().sum()))
                signal.append(float(reference.double().square().sum()))
        if not all(map(math.isfinite, noise)):
            raise DitcompressError(
                "E701", next(iter(units), "model"), "its output is not finite", "use --dtype float32, or `inspect` it"
            )
        return noise, signal

    def rewritten(self, tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """The model with other values of some of its tensors inside."""
        return rewritten(self.model, tensors)

    def damage(self, units: Collection[str], tensors: Mapping[str, Tensor] | None = None) -> float:
        """Share of the prediction's energy that is wrong without `units` (and with `tensors` rewritten), weighted as
        the sampler uses the steps."""
        self.references()
        with self.rewritten(tensors or {}):
            noise, signal = self.errors(units)
        weights = [probe.weight for probe in self.probes]
        if not any(weights):
            weights = [1.0] * len(weights)
        total = sum(w * s for w, s in zip(weights, signal, strict=True))
        return sum(w * n for w, n in zip(weights, noise, strict=True)) / max(total, 1e-300)

    def remembered(self, kind: str, units: Sequence[str], measure: Callable[[], Any]) -> Any:
        """`measure()`, a JSON value that depends on nothing but the run's settings, `kind` and `units`; or what it was
        before the run was interrupted."""
        file = None if self.journal is None else self.journal / "trials.jsonl"
        if self._trials is None:
            self._trials = {} if file is None else _measured(file)
        key = json.dumps([kind, *units])
        if key not in self._trials:
            self._trials[key] = measure()
            if file is not None:
                with open(file, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps([key, self._trials[key]]) + "\n")
        return self._trials[key]

    def times(self) -> list[float]:
        """The probed timesteps in sampling order."""
        return [float(t) for t in dict.fromkeys(float(probe.timestep[0]) for probe in self.probes)]

    def average(self, table: Mapping[str, Sequence[float]]) -> Scores:
        """Scores from one value of each block for every probe: averaged over the probes of a timestep, then over
        timesteps; a unit of several blocks gets their sum."""
        times = self.times()
        places = [times.index(float(probe.timestep[0])) for probe in self.probes]
        curves = {}
        for name in self.names:
            rows: list[list[float]] = [[] for _ in times]
            for place, *values in zip(places, *(table[block] for block in self.blocks(name)), strict=True):
                rows[place].append(sum(values))
            curves[name] = [sum(row) / len(row) for row in rows]
        return Scores({n: sum(c) / max(len(c), 1) for n, c in curves.items()}, curves, times)

    def still(self) -> Any:
        """Parameters take no gradient inside."""
        return frozen(self.model)

    def removable(self, removed: Collection[str], keep: Collection[str] = ()) -> Iterator[str]:
        """Units that may go next: not kept, not gone, and not the last of a list."""
        gone = self.depth.of(removed)
        left = {o: n - sum(b.rpartition(".")[0] == o for b in gone) for o, n in self.depth.lists.items()}
        for name in self.names:
            owners = [block.rpartition(".")[0] for block in self.blocks(name)]
            empties = any(left[owner] <= owners.count(owner) for owner in owners)
            if name not in removed and name not in keep and not empties:
                yield name

    def saved(self, units: Collection[str]) -> float:
        return sum(self.costs[name] for name in units)

    def enough(self, units: Collection[str]) -> bool:
        """Whether the saved cost is as near to the target as whole units allow."""
        return self.saved(units) >= self.target - min(self.costs.values(), default=0.0) / 2 * (1 + 1e-9)

    def fitting(self, removed: Collection[str], keep: Collection[str] = ()) -> list[str]:
        """Units that may go next without overshooting the target by more than half of their cost; none once enough is
        saved."""
        if self.enough(removed):
            return []
        most = self.target * (1 + 1e-9)
        return [n for n in self.removable(removed, keep) if self.saved(removed) + self.costs[n] / 2 <= most]


def _measured(file: Path) -> dict[str, Any]:
    """The measurements of an interrupted run; a line that was being written when it was killed is cut off."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return dict(json.loads(line) for line in whole.splitlines())


def lowest_first(context: Context, scores: Scores) -> list[str]:
    """Units in the order of their score until enough is saved; one that would overshoot by more than half of its cost
    is passed over. Ties go in forward order."""
    removed: list[str] = []
    while allowed := context.fitting(removed, scores.keep):
        removed.append(min(allowed, key=lambda name: scores.values[name]))
    return removed


def staying(context: Context, scores: Scores, removed: Collection[str]) -> dict[str, Tensor]:
    """The tensors of `scores` in blocks that are not removed."""
    gone = context.depth.of(removed)
    return {name: tensor for name, tensor in scores.tensors.items() if not block_of(name, gone)}


def method(
    name: str, settings: Mapping[str, Any], known: Registry = registry, option: str = "--set"
) -> tuple[ModuleType, Any]:
    """A method's module and its validated parameters; E201 for an unknown method, E203 for an unknown parameter."""
    from pydantic import ValidationError

    module = known.get(name.replace("-", "_"))
    try:
        return module, module.Params(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        unknown = first["type"] == "extra_forbidden"
        keys = list(module.Params.model_fields) or ["none"]
        remedy = nearest(key, keys) if unknown else f"see `ditcompress explain {module.__name__.rpartition('.')[2]}`"
        what = f"is no parameter of {name}" if unknown else first["msg"]
        raise DitcompressError("E203", f"{option} {key}", what, remedy) from None

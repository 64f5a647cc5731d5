"""The block loop: applies a plan to a checkpoint one block at a time, so memory is bounded by the largest block.

For each block: smoothing vectors are chosen from the weights and statistics, their inverses are folded into the
producers, then every planned weight is encoded. Where a step can encode weights of equal shape together, small blocks
that follow one another are taken together too, as many as `WINDOW` bytes hold. Finished blocks can be kept in a journal
folder, so that an interrupted run goes on where it stopped and gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .console import Reporter, Silent
from .errors import DitcompressError
from .hadamard import pack_signs, rotate, signs
from .journal import LayerRecord, Unit, is_stored, load_unit, save_unit
from .measures import sqnr_db
from .models.base import Axis, Layout, Site
from .plan import LayerDecision, Plan
from .structure import fold_producers, readers

WINDOW = 64_000_000  # bytes of tensors as stored: blocks that are taken together; a larger one is taken alone
BATCH = 32_000_000  # bytes of weights and Hessians in float64 that are encoded together; a larger weight is alone


class Source(Protocol):
    """A checkpoint: tensor names and one tensor at a time."""

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def read(self, name: str) -> Tensor: ...


class Sink(Protocol):
    """Takes the output tensors one by one."""

    def add(self, name: str, tensor: Tensor) -> None: ...


class Steps(Protocol):
    """What the engine needs of `quantization/`, handed in because the engine stands below it."""

    def prepare(
        self, decisions: Sequence[LayerDecision], weights: Sequence[Tensor], statistics: Any
    ) -> Tensor | None: ...

    def static(
        self, decision: LayerDecision, weight: Tensor, statistics: Any, smooth: Tensor | None, sign: Tensor | None
    ) -> tuple[Tensor, Tensor | None]: ...

    def alike(self, decision: LayerDecision, shape: tuple[int, int]) -> Hashable | None:
        """What weights have in common that may be encoded together; None for one that is encoded alone."""
        ...

    def encode_many(self, linears: Sequence[Linear]) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Linear:
    """One linear as it is handed to `Steps`: its float32 weight (out, in), before the smoothing of its input (`smooth`,
    (in,)) and the signs of its Hadamard transform (`sign`, (in,))."""

    decision: LayerDecision
    weight: Tensor
    statistics: Any
    smooth: Tensor | None
    seed: int
    sign: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """The records in forward order, and each site's scheme as it goes into config.json."""

    records: tuple[LayerRecord, ...]
    schemes: Mapping[str, Mapping[str, Any]]


def run(
    source: Source,
    layout: Layout,
    plan: Plan,
    statistics: Mapping[str, Any],
    steps: Steps,
    sink: Sink,
    *,
    seed: int = 0,
    journal: Path | None = None,
    reporter: Reporter | None = None,
) -> Outcome:
    """Write every tensor of the compressed model to `sink`, blocks in forward order, the rest sorted by name.

    `statistics` maps an input key to its statistics and may be empty for weights-only recipes.
    """
    reporter = reporter or Silent()
    worker = _Worker(source, layout, plan.by_site(), statistics, steps, seed)
    units = [*layout.blocks, ""]
    records: list[LayerRecord] = []
    schemes: dict[str, Mapping[str, Any]] = {}
    with reporter.task("quantize", len(units)) as advance:
        for unit, stored in _stored_units(worker, units, journal):
            tensors, unit_records, unit_schemes = stored
            for name in sorted(tensors):
                sink.add(name, tensors[name])
            if unit == "":
                _copy_rest(source, layout, worker.written, sink)
            records += unit_records
            schemes |= unit_schemes
            advance(1)
    order = {site.name: index for index, site in enumerate(layout.sites)}
    return Outcome(tuple(sorted(records, key=lambda r: order[r.site])), schemes)


def _stored_units(worker: _Worker, units: Sequence[str], journal: Path | None) -> Iterator[tuple[str, Unit]]:
    """All units after compression, in order. Those that are taken together are all done again unless the journal has
    them all: sums of another batch might be rounded differently."""
    numbers = {unit: number for number, unit in enumerate(units)}
    for window in worker.windows(units):
        if journal is not None and all(is_stored(journal, numbers[unit]) for unit in window):
            yield from ((unit, load_unit(journal, numbers[unit])) for unit in window)
            continue
        made = worker.window(window)
        for unit, stored in zip(window, made, strict=True):
            if journal is not None:
                save_unit(journal, numbers[unit], stored)
        yield from zip(window, made, strict=True)


def _names(source: Source, layout: Layout, unit: str) -> list[str]:
    """Tensors of one block, or ("") those of no block."""
    if unit:
        return [name for name in source.tensors if name.startswith(unit + ".")]
    prefixes = tuple(block + "." for block in layout.blocks)
    return [name for name in source.tensors if not name.startswith(prefixes)]


def _copy_rest(source: Source, layout: Layout, written: set[str], sink: Sink) -> None:
    """Tensors outside the blocks that no decision touched, streamed one by one."""
    for name in sorted(_names(source, layout, "")):
        if name not in written:
            sink.add(name, source.read(name))


@dataclass
class _Open:
    """A block at work: its tensors so far, and the smoothing vector and "fold" or "online" of smoothed sites."""

    sites: list[Site]
    tensors: dict[str, Tensor]
    smooth: Mapping[str, tuple[Tensor, str]]
    records: list[LayerRecord] = field(default_factory=list)
    schemes: dict[str, dict[str, Any]] = field(default_factory=dict)


def _shape(site: Site) -> tuple[int, int]:
    return site.out_features, site.in_features


def most_together(site: Site) -> int:
    """How many linears of this site's shape are encoded together at most."""
    return max(1, BATCH // (8 * site.in_features * (site.in_features + site.out_features)))


@dataclass
class _Worker:
    source: Source
    layout: Layout
    decisions: Mapping[str, LayerDecision]
    statistics: Mapping[str, Any]
    steps: Steps
    seed: int

    def __post_init__(self) -> None:
        # tensors outside the blocks that `unit("")` replaces; known without running it, so a resumed run agrees
        self.written = {
            f"{site.name}.weight" for site in self.layout.sites if site.name in self.decisions and not site.block
        }

    def windows(self, units: Sequence[str]) -> list[list[str]]:
        """The units in runs that are taken together."""
        found: list[list[str]] = []
        room = 0
        for unit in units:
            sites = self._sites(unit) if unit else []
            together = any(self.steps.alike(self.decisions[site.name], _shape(site)) is not None for site in sites)
            size = self._bytes(unit) if together else WINDOW
            if size > room:
                found.append([])
                room = WINDOW
            found[-1].append(unit)
            room -= size
        return found

    def _sites(self, unit: str) -> list[Site]:
        return [site for site in self.layout.sites if site.block == unit and site.name in self.decisions]

    def _bytes(self, unit: str) -> int:
        found = [self.source.tensors[name] for name in _names(self.source, self.layout, unit)]
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in found)

    def window(self, units: Sequence[str]) -> list[Unit]:
        """All tensors of some blocks after compression."""
        opened = [self._open(unit) for unit in units]
        for batch in self._batches([(block, site) for block in opened for site in block.sites]):
            linears = [self._linear(block, site) for block, site in batch]
            encoded = self.steps.encode_many(linears)
            for (block, site), linear, found in zip(batch, linears, encoded, strict=True):
                self._keep(block, site, linear, found)
        return [(block.tensors, block.records, block.schemes) for block in opened]

    def _batches(self, waiting: Sequence[tuple[_Open, Site]]) -> list[list[tuple[_Open, Site]]]:
        """Linears that are encoded together: alike, of equal shape and within `BATCH` bytes."""
        groups: dict[Hashable, list[list[tuple[_Open, Site]]]] = {}
        for number, (block, site) in enumerate(waiting):
            key = self.steps.alike(self.decisions[site.name], _shape(site))
            batches = groups.setdefault(number if key is None else (key, _shape(site)), [[]])
            if len(batches[-1]) == most_together(site):
                batches.append([])
            batches[-1].append((block, site))
        return [batch for batches in groups.values() for batch in batches]

    def _open(self, unit: str) -> _Open:
        """A block with its smoothing folded."""
        sites = self._sites(unit)
        if unit:
            tensors = {name: self.source.read(name) for name in _names(self.source, self.layout, unit)}
        else:
            tensors = {f"{site.name}.weight": self.source.read(f"{site.name}.weight") for site in sites}
        smooth, folded = self._smooth(sites, tensors)
        return _Open(sites, self._fold(tensors, folded, unit), smooth)

    def _linear(self, block: _Open, site: Site) -> Linear:
        weight = block.tensors.pop(f"{site.name}.weight").float()
        smooth, statistics = block.smooth.get(site.name, (None, ""))[0], self.statistics.get(site.input_key)
        return Linear(self.decisions[site.name], weight, statistics, smooth, self._seed(site.name), self._sign(site))

    def _keep(self, block: _Open, site: Site, linear: Linear, encoded: Any) -> None:
        """Take the stored form of a linear, and note what was done."""
        decision, weight, s, sign = linear.decision, linear.weight, linear.smooth, linear.sign
        how = block.smooth.get(site.name, (None, "none"))[1]
        extra = self._static(decision, weight, site, s) | ({} if sign is None else {"rotate_sign": pack_signs(sign)})
        if decision.output_norm and "output_gain" not in encoded.extra:
            raise DitcompressError("E202", site.name, "output_norm needs a step that is trained", "use terdit")
        stored = stored_tensors(site.name, encoded, s if how == "online" else None, extra)
        _check(stored)
        reference = weight if s is None else weight * s
        reference = reference if sign is None else rotate(reference, sign, decision.rotate)
        block.records.append(record(site, decision, stored, how, sqnr_db(reference, encoded.dequantize())))
        block.schemes[site.name] = scheme_of(decision, how)
        block.tensors |= stored

    def _seed(self, name: str) -> int:
        return _seed_of(self.seed, name)

    def _sign(self, site: Site) -> Tensor | None:
        return sign_of(self.decisions[site.name], site, self.seed)

    def _smooth(
        self, sites: Sequence[Site], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[Tensor, str]], list[tuple[Axis, Tensor]]]:
        """Smoothing vector and "fold" or "online" for each smoothed site, and the folds to make."""
        groups: dict[str, list[Site]] = {}
        for site in sites:
            if self.decisions[site.name].smooth != "none":
                groups.setdefault(site.input_key, []).append(site)
        chosen: dict[str, tuple[Tensor, str]] = {}
        folds = []
        for key, members in groups.items():
            decisions = [self.decisions[site.name] for site in members]
            weights = [tensors[f"{site.name}.weight"].float() for site in members]
            s = self.steps.prepare(decisions, weights, self.statistics.get(key))
            if s is None:
                continue
            axis = self._foldable(members)
            if axis is not None:
                folds.append((axis, s))
            for site in members:
                chosen[site.name] = (s.float(), "online" if axis is None else "fold")
        return chosen, folds

    def _foldable(self, members: Sequence[Site]) -> Axis | None:
        """The axis that absorbs the smoothing of `members`, or None: then every member divides its input itself.

        A fold is exact only when every reader of the axis is smoothed by the same vector, reads nothing else, and
        the producer belongs to the same block (a producer outside it would tie blocks together).
        """
        if any(self.decisions[site.name].smooth != "fold" or len(site.reads) != 1 for site in members):
            return None
        axis = self.layout.axes.get(members[0].reads[0])
        if axis is None or not axis.fold:
            return None
        same = {site.name for site in readers(self.layout, axis.name)} == {site.name for site in members}
        inside = all(fold.tensor.startswith(members[0].block + ".") for fold in axis.fold)
        return axis if same and inside and members[0].block else None

    def _fold(self, tensors: dict[str, Tensor], folds: Sequence[tuple[Axis, Tensor]], unit: str) -> dict[str, Tensor]:
        """Producers absorb the smoothing. Their arithmetic is float64; what stays a plain tensor is stored as float32
        when it is a bias (few bytes) and in its own dtype when it is a matrix."""
        touched = {fold.tensor for axis, _ in folds for fold in axis.fold}
        original = {name: tensors[name].dtype for name in touched}
        wide = {name: (t.double() if name in touched else t) for name, t in tensors.items()}
        for axis, s in folds:
            wide = fold_producers(wide, axis, s)
        for name in touched:
            site = name.removesuffix(".weight")
            narrow = name.endswith(".weight") and site not in self.decisions
            wide[name] = wide[name].to(original[name] if narrow else torch.float32)
        return wide

    def _static(self, decision: LayerDecision, weight: Tensor, site: Site, s: Tensor | None) -> dict[str, Tensor]:
        """Scale (and zero) of a statically quantized input."""
        if decision.activation.mode != "static":
            return {}
        scale, zero = self.steps.static(decision, weight, self.statistics.get(site.input_key), s, self._sign(site))
        return {"input_scale": scale} if zero is None else {"input_scale": scale, "input_zero": zero}


def stored_tensors(site: str, encoded: Any, smooth: Tensor | None, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is stored in place of one weight, under its full names."""
    local = {**encoded.packed.tensors, **encoded.extra}
    if encoded.low_rank is not None:
        local |= {"low_rank_up": encoded.low_rank[0], "low_rank_down": encoded.low_rank[1]}
    if smooth is not None:
        local["smooth"] = smooth.float().clone()  # one vector serves several linears, and files share no memory
    local |= extra
    return {f"{site}.{suffix}": tensor.contiguous() for suffix, tensor in local.items()}


def _check(stored: Mapping[str, Tensor]) -> None:
    """No scale, factor or smoothing vector may be infinite or NaN."""
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise DitcompressError("E701", name, "is not finite after quantization", "smooth less, or keep this layer")


def scheme_of(decision: LayerDecision, smooth: str) -> dict[str, Any]:
    """The JSON form of a decision as config.json holds it."""
    return {
        "weight": {"format": decision.weight.format, "params": dict(decision.weight.params)},
        "activation": asdict(decision.activation),
        "smooth": smooth,
        "rank": decision.rank,
        "rotate": decision.rotate,
        "low_rank_input": decision.low_rank_input,
        "output_norm": decision.output_norm,
    }


def record(site: Site, decision: LayerDecision, stored: Mapping[str, Tensor], smooth: str, sqnr: float) -> LayerRecord:
    """What was done to one linear, its bits counted from `stored`."""
    size = sum(t.numel() * t.element_size() for t in stored.values())
    count = site.in_features * site.out_features
    return LayerRecord(
        site=site.name,
        role=site.role,
        block=site.block,
        shape=(site.out_features, site.in_features),
        format=decision.weight.format + str(decision.weight.params.get("bits", "")),
        bits=8 * size / count,
        stored_bytes=size,
        smooth=smooth,
        rank=decision.rank,
        weight_sqnr_db=sqnr if abs(sqnr) < float("inf") else None,
        reason=decision.reason,
    )


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def sign_of(decision: LayerDecision, site: Site, seed: int) -> Tensor | None:
    """The signs of a linear's input transform, (in,): shared by all that read the same input. None without one."""
    return signs(site.in_features, _seed_of(seed, f"rotate {site.input_key}")) if decision.rotate else None


def quantization_config(recipe_name: str, outcome: Outcome) -> dict[str, Any]:
    """What config.json gets: equal schemes are written once and named by number."""
    numbers: dict[str, str] = {}
    schemes: dict[str, Any] = {}
    layers: dict[str, str] = {}
    for record in outcome.records:
        scheme = outcome.schemes[record.site]
        key = json.dumps(scheme, sort_keys=True)
        if key not in numbers:
            numbers[key] = str(len(numbers))
            schemes[numbers[key]] = scheme
        layers[record.site] = numbers[key]
    return {"quant_method": "ditcompress", "version": 1, "recipe": recipe_name, "schemes": schemes, "layers": layers}

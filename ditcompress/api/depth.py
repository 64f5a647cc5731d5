"""prune: a checkpoint with fewer blocks that stock diffusers loads as it is; sensitivity: how much blocks matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.collect import CalibrationSettings
from ..calibration.schedulers import load_scheduler
from ..calibration.trajectory import Sampling
from ..checkpoint.reader import Checkpoint, check_finite
from ..checkpoint.source import ModuleSource
from ..checkpoint.writer import kept_work, output_folder, remove_work, work_folder
from ..console import Reporter, Silent
from ..distill.data import Trajectories
from ..errors import DitcompressError
from ..loading import open_model
from ..measures import ratio_db
from ..models import Depth, adapter_for, depth_of, renamed, renumbered, shortened
from ..offload import check_offload, load_to_run
from ..pruning import (
    MEASURES,
    Choice,
    Context,
    Probe,
    ProbeParams,
    Scores,
    check_target,
    choose,
    method,
    operations,
    parameters,
    record_probes,
    registry,
    seconds,
    unit_costs,
)  # fmt: skip
from ..pruning import width as widths
from ..ranks import alone
from ..sharing import stored_once
from ..structure import remove_blocks, without_blocks
from . import _memory
from ._options import method_settings
from ._pruned import cut_tensors, write_pruned
from .calibration import conditions_for, given_files, pick_device, pick_dtype
from .width import METHOD, Cut, Width, check_ratio, cut_of, narrowed_model, sharing_config, tied_model, with_ratio

SENSITIVITY_STEPS = ("timesteps=10",)  # columns that a terminal has room for


@dataclass(frozen=True)
class PruneResult:
    """What `prune` made: `path` (None for a model in memory or a dry run), `model` (for a model in memory), the choice,
    and the facts that prune.json holds."""

    path: Path | None
    model: nn.Module | None
    choice: Choice
    facts: dict[str, Any]


def prune(
    model_or_path: nn.Module | str | Path,
    ratio: float | None = None,
    out: str | Path | None = None,
    *,
    by: str = "params",
    method: str | None = None,
    width_ratio: float | None = None,
    width_units: str = "both",
    width_method: str = METHOD,
    width_overrides: Sequence[str] = (),
    overrides: Sequence[str] = (),
    conditions: str | Path | None = None,
    scheduler: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    offload: str = "none",
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    max_shard_bytes: int = 5 * 2**30,
    reporter: Reporter | None = None,
) -> PruneResult:
    """Remove `ratio` of all blocks' parameters (or operations, or seconds): whole blocks, by `method`.

    `prune-best`, the default, takes part of it from the width; others remove the number of blocks that is nearest to
    the ratio, so a small one may remove none. `width_ratio` also removes that share of the feed-forward neurons and
    attention heads (`width_units`: both, neurons or heads) of the blocks that are left, by `width_method`; what no
    plain config.json can say then needs `import ditcompress` to load. A path gives the folder `out`, a model in memory
    a new model. A killed run of a method that learns goes on when called again, unless `restart`. `offload` "cpu" or
    "disk": blocks are in memory only while they run. Raises E201 and E203 for bad options, E205 for what cannot go.
    """
    if isinstance(model_or_path, str | Path):
        alone("prune")
    reporter = reporter or Silent()
    method = method or ("prune-best" if width_ratio is None and offload == "none" else "oracle-greedy")
    job = _Job(ratio, by, method, tuple(overrides), conditions, scheduler, seed, reporter, offload)
    width = Width.of(ratio, width_ratio, width_units, width_method, method_settings(width_overrides, "--width-set"))
    if offload != "none" and not width.streams:
        what = f"{width.name} learns or makes new layers in memory"
        raise DitcompressError("E203", f"--offload {offload}", what, "use obs-diff, magnitude, taylor, udfc or random")
    if isinstance(model_or_path, nn.Module):
        return _prune_module(model_or_path, job, width)
    path = Path(model_or_path)
    opened, meta = open_model(path, allow_compressed=False)
    if opened.quantization is not None:
        raise DitcompressError("E322", path, "is narrower or shared already", "give the original checkpoint")
    layout = adapter_for(opened.config).layout(meta)
    width.check(layout)
    if ratio is not None and ("training" not in job.module.NEEDS or getattr(job.params, "updates", 1) == 0):
        _memory.tell(reporter, lambda: _memory.of_pruning(
            opened, meta, layout, job.module, job.params, pick_dtype(dtype), offload))  # fmt: skip
    if dry_run:
        checkpoint, context, choice = job.run(path, device, dtype)
        cut, _ = _cut(checkpoint, job, context, choice, width)
        return PruneResult(None, None, choice, _joined(job.facts(context, choice), cut.facts, choice))
    target = Path(out) if out else path.with_name(f"{path.name.removesuffix('.safetensors')}-pruned")
    with output_folder(
        target, overwrite=overwrite, inputs=[path], planned_bytes=opened.total_bytes,
        manifest={"prune": {**job.settings(), **width.settings()}, "seed": seed,
                  "input": {"fingerprint": opened.fingerprint}},
    ) as partial:  # fmt: skip
        if job.resumes or width.learns:
            marks = {**job.marks(opened), "dtype": dtype, "device": str(pick_device(device))}
            job.journal = work_folder(target, {**marks, **width.settings()}, restart)
        with kept_work(job.journal):
            checkpoint, context, choice = job.run(path, device, dtype)
            plan = _cut(checkpoint, job, context, choice, width)
        facts = _write(checkpoint, partial, plan, job.facts(context, choice), choice, max_shard_bytes)
        checkpoint.verify_unchanged()
    remove_work(job.journal)
    return PruneResult(target, None, choice, facts)


def _prune_module(model: nn.Module, job: _Job, width: Width) -> PruneResult:
    """A pruned copy of a model in memory; the original is not changed."""
    source = ModuleSource(model)
    if source.config.get("quantization_config") is not None:  # it names blocks and widths that would no longer be
        what = "is quantized, narrower or shared already"
        raise DitcompressError("E322", type(model).__name__, what, "give the original model")
    width.check(adapter_for(source.config).layout(model))
    context, choice = job.choice(model, source)
    with context.rewritten(choice.tensors):
        pruned = remove_blocks(model, context.depth, choice.blocks).eval()
    shared = _shared(context.depth, choice, width)
    width = with_ratio(width, choice.width_ratio)
    facts = narrowed_model(pruned, width, lambda: job.width_context(pruned, ModuleSource(pruned), width))
    facts = _joined(job.facts(context, choice), facts, choice)
    if shared:
        tied_model(pruned, shared)
        facts |= {"stock": False}
    return PruneResult(None, pruned, choice, facts)


def sensitivity(
    path: str | Path, *, method: str = "shortgpt", overrides: Sequence[str] = (), seed: int = 0, device: str = "auto",
    dtype: str = "float32", offload: str = "none", reporter: Reporter | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Importance of every unit of blocks by a pruning method, over timesteps where the method sees them."""
    method = getattr(registry.get(method.replace("-", "_")), "SENSITIVITY", method)
    steps = SENSITIVITY_STEPS if "probes" in registry.get(method.replace("-", "_")).NEEDS else ()
    job = _Job(0.5, "params", method, (*steps, *overrides), None, None, seed, reporter or Silent(), offload)
    model, checkpoint = job.load(path, device, dtype)
    context, _ = job.context(model, checkpoint, check=False)
    found = job.module.scores(context, job.params)
    return {
        "method": method,
        "timesteps": list(found.timesteps),
        "blocks": [
            {"block": n, "score": found.values[n], "by_timestep": list(found.by_timestep.get(n, ()))}
            for n in context.names
        ],
        "fixed": dict(context.depth.fixed),
    }


class _Job:
    """The options of one run, checked before any model is read."""

    def __init__(
        self, ratio: float | None, by: str, name: str, overrides: tuple[str, ...], conditions: str | Path | None,
        scheduler: str | Path | None, seed: int, reporter: Reporter, offload: str = "none",
    ) -> None:  # fmt: skip
        check_ratio("--ratio", ratio)
        if by not in MEASURES:
            raise DitcompressError("E203", f"--by {by}", "is not known", f"use {', '.join(MEASURES)}")
        self.module, self.params = method(name, method_settings(overrides))
        check_offload(offload)
        if offload != "none" and "training" in self.module.NEEDS:
            what = f"{name} trains, which needs every weight in memory"
            raise DitcompressError("E203", f"--offload {offload}", what, "choose a method without training, or none")
        if offload != "none" and by == "latency":
            what = "--by latency would time the reading of weights"
            raise DitcompressError("E203", f"--offload {offload}", what, "use --by flops")
        self.offload = offload
        self.ratio, self.by, self.name = ratio, by, name.replace("_", "-")
        self.conditions, self.scheduler, self.seed, self.reporter = conditions, scheduler, seed, reporter
        self.journal: Path | None = None

    @property
    def resumes(self) -> bool:
        """Whether a killed run has something to go on from."""
        return self.ratio is not None and bool({"training", "journal"} & {*self.module.NEEDS})

    def marks(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What an interrupted run must have in common with this one."""
        return {**self.settings(), "seed": self.seed, "fingerprint": checkpoint.fingerprint,
                "torch": torch.__version__,
                **given_files(self.conditions, self.scheduler, checkpoint)}  # fmt: skip

    def settings(self) -> dict[str, Any]:
        return {"method": self.name, "ratio": self.ratio, "by": self.by, "params": self.params.model_dump()}

    def load(self, path: str | Path, device: str, dtype: str) -> tuple[nn.Module, Checkpoint]:
        return load_to_run(path, dtype=pick_dtype(dtype), device=pick_device(device), offload=self.offload)

    def run(self, path: Path, device: str, dtype: str) -> tuple[Checkpoint, Context, Choice]:
        model, checkpoint = self.load(path, device, dtype)
        check_finite(checkpoint, self.reporter)
        return checkpoint, *self.choice(model, checkpoint)

    def choice(self, model: nn.Module, source: Any) -> tuple[Context, Choice]:
        """What goes, and what that was decided on; nothing without a ratio."""
        if self.ratio is None:
            adapter = adapter_for(source.config)
            layout = adapter.layout(model)
            depth = Depth((), {}, {}, depth_of(source.config, layout).lists)
            return Context(model, adapter, layout, depth, {}, 0.0), Choice((), (), Scores({}), 0.0, None)
        context, total = self.context(model, source)
        return context, choose(context, self.module, self.params, total)

    def context(self, model: nn.Module, source: Any, check: bool = True) -> tuple[Context, float]:
        """What the method looks at, and the cost of all blocks. Nothing is run where neither method nor measure asks
        for it."""
        adapter = adapter_for(source.config)
        layout = adapter.layout(model)
        depth = depth_of(source.config, layout)
        context = Context(model, adapter, layout, depth, {}, 0.0, (), self.seed, self.reporter)
        by_block = parameters(model, layout)
        context.costs = unit_costs(depth, by_block)
        ratio = self.ratio or 0.0
        context.target = ratio * sum(by_block.values())
        if check and self.by == "params":  # refused before anything is run
            check_target(context, ratio, sum(by_block.values()))
        if "probes" in self.module.NEEDS or self.by != "params":
            context.probes = self._probes(model, source, adapter, self.params)
            if self.offload != "none":
                rows, dtype = len(context.probes[0].latents), next(model.parameters()).dtype
                context.abreast = _memory.abreast_probes(source.config, layout, rows, dtype)
        if "training" in self.module.NEEDS:
            context.data = self._states(model, source, adapter)
        context.journal = self.journal if self.resumes else None
        if self.by != "params":
            measure = operations if self.by == "flops" else seconds
            by_block = measure(model, layout.blocks, lambda: context.predict(context.probes[0]))
            context.costs = unit_costs(depth, by_block)
            context.target = ratio * sum(by_block.values())
            check_target(context, ratio, sum(by_block.values()))
        return context, sum(by_block.values())

    def width_context(self, model: nn.Module, source: Any, width: Width) -> widths.Context:
        """What a width method looks at in a model that has lost its blocks; nothing is run unless it asks for it."""
        adapter, config = adapter_for(source.config), source.config
        layout = adapter.layout(model)
        depth = Depth((), {}, {}, depth_of(config, layout).lists)
        context = widths.Context(model, adapter, layout, depth, {}, 0.0, (), self.seed, self.reporter,
                                 ratio=width.ratio or 0.0, config=config)  # fmt: skip
        if "probes" in width.module.NEEDS:
            context.probes = self._probes(model, source, adapter, width.params)
        if "sampler" in width.module.NEEDS:
            context.scheduler = self._sampler(source, adapter)
            context.guidance = float(adapter.default_guidance(config))
            context.conditions = lambda count: conditions_for(
                source, adapter, CalibrationSettings(samples=count, seed=self.seed), self.conditions, self.reporter
            )
        if self.journal is not None and width.learns:
            context.journal = self.journal / "width"
            context.journal.mkdir(exist_ok=True)
        return context

    def _sampler(self, source: Any, adapter: Any) -> Any:
        folder = Path(self.scheduler) if self.scheduler else source.scheduler_folder
        return load_scheduler(source.config, folder, adapter, self.reporter)

    def _states(self, model: nn.Module, source: Any, adapter: Any) -> Callable[..., Trajectories]:
        """Training states for methods that learn; `salt` tells several sets of one method apart."""
        scheduler, guidance = self._sampler(source, adapter), float(adapter.default_guidance(source.config))

        def states(*, images: int = 128, refresh: int = 500, sample_steps: int = 25, null: float = 0.15,
                   salt: int = 0) -> Trajectories:  # fmt: skip
            wanted = CalibrationSettings(samples=images, seed=self.seed)
            given = conditions_for(source, adapter, wanted, self.conditions, self.reporter)
            sampling = Sampling(sample_steps, guidance, self.seed + 7919 + salt, batch=min(images, 32))
            return Trajectories(model, adapter, source.config, scheduler, given, sampling, images=images,
                                refresh=refresh, null=null, reporter=self.reporter)  # fmt: skip

        return states

    def _probes(self, model: nn.Module, source: Any, adapter: Any, params: Any) -> list[Probe]:
        params = params if isinstance(params, ProbeParams) else ProbeParams(samples=4)
        scheduler = self._sampler(source, adapter)
        wanted = CalibrationSettings(samples=params.samples, seed=self.seed)
        given = conditions_for(source, adapter, wanted, self.conditions, self.reporter)
        return record_probes(model, adapter, source.config, scheduler, given, params, self.seed, self.reporter)

    def facts(self, context: Context, choice: Choice) -> dict[str, Any]:
        """What prune.json says: which blocks went, and each unit's score."""
        scores, damage = choice.scores, choice.damage
        new = renumbered(context.depth, choice.blocks)
        return {
            **self.settings(),
            "seed": self.seed,
            "removed": list(choice.blocks),
            "order": list(choice.units),
            "kept": [{"block": block, "was": old} for old, block in new.items()],
            "saved": choice.saved,
            "output_sqnr_db": None if damage is None or damage == 0 else ratio_db(damage),
            "scores": {name: _finite(scores.values[name]) for name in context.names},
            "timesteps": list(scores.timesteps),
            "by_timestep": {name: [_finite(v) for v in row] for name, row in scores.by_timestep.items()},
            "fixed": dict(context.depth.fixed),
            "notes": dict(scores.notes),
            "changed": sorted({renamed(name, new) for name in choice.tensors}),
            "shared": {renamed(copy, new): renamed(owner, new) for copy, owner in choice.shared.items()},
        }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cut(
    checkpoint: Checkpoint, job: _Job, context: Context, choice: Choice, width: Width
) -> tuple[Cut, dict[str, str]]:
    """What becomes of the tensors that stay, and their old name by the new one. Width is decided on the model without
    the blocks that go."""
    depth, width = context.depth, with_ratio(width, choice.width_ratio)
    config, new = shortened(checkpoint.config, depth, choice.blocks), renumbered(depth, choice.blocks)
    left = stored_once(list(checkpoint.tensors), (*choice.blocks, *choice.shared))
    names = {renamed(name, new): name for name in left}
    shared = _shared(depth, choice, width)
    source = replace(checkpoint, config=config)
    with context.rewritten(choice.tensors), without_blocks(context.model, depth, choice.blocks) as model:
        cut = cut_of(config, width, lambda: job.width_context(model, source, width))
    if shared:
        cut = replace(cut, config=sharing_config(cut.config, shared), facts={**cut.facts, "stock": False})
    return cut, names


def _joined(facts: dict[str, Any], width: dict[str, Any], choice: Choice) -> dict[str, Any]:
    """Facts of depth and width. The SQNR of both together is known where the method chose both."""
    known = {"output_sqnr_db": facts["output_sqnr_db"]} if choice.width_ratio else {}
    return facts | width | known


def _shared(depth: Depth, choice: Choice, width: Width) -> dict[str, str]:
    """Which modules of the new model are others of it, by their new paths; E203 beside a width ratio: the units that
    stay differ between blocks."""
    if choice.shared and width.ratio is not None:
        raise DitcompressError("E203", "--width-ratio", "does not go with shared weights", "leave out one of the two")
    new = renumbered(depth, choice.blocks)
    return {renamed(copy, new): renamed(owner, new) for copy, owner in choice.shared.items()}


def _write(
    checkpoint: Checkpoint, partial: Path, cut_names: tuple[Cut, dict[str, str]], facts: dict[str, Any],
    choice: Choice, max_shard_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    """Tensors one by one under their new names, the shorter config.json, prune.json. Returns all facts."""
    cut, names = cut_names
    facts = _joined(facts, cut.facts, choice)
    tensors = cut_tensors(checkpoint, cut, names, choice.tensors)
    write_pruned(checkpoint, partial, cut.config, tensors, facts, max_shard_bytes)
    return facts

"""How much memory a command will take, told before it runs, and what cannot go together with `--offload`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calibration.collect import CalibrationSettings
from ..calibration.footprint import Hook, branches_of, collect_bytes, follow, pass_bytes, side_by_side, statistics_bytes
from ..calibration.walking import Abreast
from ..checkpoint.reader import Checkpoint
from ..console import Reporter, Silent, size
from ..engine import WINDOW, most_together
from ..errors import DitcompressError
from ..loading import stored_dtypes
from ..models import adapter_for
from ..models._table import block_of
from ..models.base import Layout, Site
from ..offload import check_offload
from ..plan import Plan
from ..pruning import ProbeParams
from ..quantization import RecipeSteps, measures, needs
from ..quantization._trained import optional, trained_step
from ..recipe import Calibration, Recipe
from ..runtime.blocks import routes_blocks
from ._options import pick_dtype, settings_of

# glibc keeps freed pieces between those in use, which offloading forbids: shares measured on DiTs of 70 to 90 M
# parameters, of what comes and goes and of what stays among it.
HOLES, AMONG = 1.75, 1.2
MOST_PROBES = 16  # that go through an offloaded model together
PROGRAM = 30_000_000  # what the program loads and keeps at its first real run


@dataclass(frozen=True)
class Memory:
    """Predicted bytes at the peak, beside those of the program itself: weights, statistics, and what passes (or the
    encoding of one block) need in between."""

    weights: int
    statistics: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.statistics + self.work

    def line(self) -> str:
        parts = f"weights {size(self.weights)}, statistics {size(self.statistics)}, work {size(self.work)}"
        return f"predicted peak memory beside the program's own: {size(self.total)} ({parts})"


def weight_bytes(
    checkpoint: Checkpoint, meta: nn.Module, layout: Layout, dtype: torch.dtype, offload: str, held: bool = False
) -> int:
    """Peak bytes of the weights of a model that is loaded as `dtype` and run; `held`: an offloaded block stays as a
    whole while several passes run it."""
    packed, resident, inside, largest = stored_dtypes(meta), 0, 0, 0
    blocks: dict[str, int] = {}
    for name, entry in checkpoint.tensors.items():
        stored, count = entry.stop - entry.start, entry.stop - entry.start
        if name not in packed and entry.dtype.is_floating_point:
            count = stored // entry.dtype.itemsize * dtype.itemsize
        largest = max(largest, count + (stored if count != stored else 0))
        block = block_of(name, layout.blocks)
        blocks[block] = blocks.get(block, 0) + count
        if offload == "none" or not block:
            resident += count
        elif offload == "cpu":
            inside += stored
    converted = checkpoint.total_bytes if checkpoint.memory is not None else 0
    blocks.pop("", None)
    whole = max(blocks.values(), default=0) if held else 0
    return resident + inside + converted + (largest + whole if offload != "none" else 0)


def tell(reporter: Reporter, predict: Callable[[], Memory]) -> None:
    """Note the prediction where somebody reads it."""
    if not isinstance(reporter, Silent):
        found = attempt(predict)
        reporter.note("the peak memory of this model cannot be predicted" if found is None else found.line())


def attempt(predict: Callable[[], Memory]) -> Memory | None:
    """The prediction; None for a model whose forward looks at values, which cannot be followed without data."""
    try:
        return predict()
    except (RuntimeError, NotImplementedError):
        return None


def _memory(weights: int, statistics: int, work: int, offload: str) -> Memory:
    """With what the allocator and the program take on top."""
    holes, among = (1.0, 1.0) if offload != "none" else (HOLES, AMONG)
    return Memory(weights, int(among * statistics), int(holes * work) + PROGRAM)


def of_calibration(
    checkpoint: Checkpoint, meta: nn.Module, layout: Layout, settings: CalibrationSettings, dtype: torch.dtype,
    offload: str,
) -> Memory:  # fmt: skip
    """Of gathering statistics on the CPU."""
    adapter = adapter_for(checkpoint.config)
    cut = offload != "none" and not routes_blocks(meta)
    passes, abreast = collect_bytes(checkpoint.config, adapter, layout, settings, dtype, offloaded=cut)
    held = cut and (abreast.batches > 1 or settings.weighting == "fisher")
    weights = weight_bytes(checkpoint, meta, layout, dtype, offload, held)
    return _memory(weights, statistics_bytes(layout, settings), passes, offload)


def abreast(
    checkpoint: Checkpoint, model: nn.Module, layout: Layout, settings: CalibrationSettings, dtype: torch.dtype
) -> Abreast:
    """How many passes of an offloaded model go together; one, where they cannot be followed without data."""
    if routes_blocks(model):
        return Abreast()
    adapter = adapter_for(checkpoint.config)
    with contextlib.suppress(RuntimeError, NotImplementedError):
        return collect_bytes(checkpoint.config, adapter, layout, settings, dtype, offloaded=True)[1]
    return Abreast()


def abreast_probes(config: Mapping[str, Any], layout: Layout, rows: int, dtype: torch.dtype) -> int:
    """How many probes of so many rows go through an offloaded model together; one, where they cannot be followed
    without data."""
    adapter = adapter_for(config)
    with contextlib.suppress(RuntimeError, NotImplementedError):
        return side_by_side(follow(config, adapter, rows, dtype, blocks=layout.blocks).between, MOST_PROBES)
    return 1


def of_pruning(
    checkpoint: Checkpoint, meta: nn.Module, layout: Layout, module: Any, params: Any, dtype: torch.dtype, offload: str
) -> Memory:
    """Of choosing blocks by a method that does not train, on the CPU."""
    weights = weight_bytes(checkpoint, meta, layout, dtype, offload)
    if "probes" not in module.NEEDS:  # reads matrices at most, in float64 three times
        return _memory(weights, 0, 24 * max(site.in_features * site.out_features for site in layout.sites), offload)
    assert isinstance(params, ProbeParams)
    config, adapter = checkpoint.config, adapter_for(checkpoint.config)
    branches = branches_of(config, adapter, params.guidance)
    rows = branches * min(params.batch, params.samples)
    found = follow(config, adapter, rows, dtype, hooks=dict.fromkeys(layout.blocks, _compared), blocks=layout.blocks)
    together = side_by_side(found.between, MOST_PROBES) if offload != "none" else 1
    work = found.peak + (together - 1) * found.between
    weights = weight_bytes(checkpoint, meta, layout, dtype, offload, held=together > 1)
    chunk = getattr(params, "chunk", None)  # of a backward pass
    if chunk is not None:
        kept: list[Any] = []
        work = max(work, pass_bytes(config, adapter, min(rows, chunk), dtype, backward=True,
                                    hooks=dict.fromkeys(layout.blocks, _keeping(kept))))  # fmt: skip
    cond = adapter.random_conditions(config, 1, torch.Generator().manual_seed(0))
    one = 4 * 2 * torch.Size(adapter.latent_shape(config)).numel() + sum(t.nbytes for t in cond.values())
    states = branches * params.samples * (params.timesteps or params.steps) * one
    return _memory(weights, states, work, offload)


def _compared(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The criteria's arithmetic on each stream."""
    for stream in output if isinstance(output, (tuple, list)) else (output,):
        (stream.detach().float() - stream.detach().float()).double().square()


def _keeping(kept: list[Any]) -> Hook:
    """A criterion that keeps the change of each stream until its gradient arrives."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for stream in output if isinstance(output, (tuple, list)) else (output,):
            kept.append(stream.detach().float().clone())

    return hook


def of_encoding(checkpoint: Checkpoint, layout: Layout, plan: Plan, statistics: int) -> Memory:
    """Of rounding block by block: the largest block as stored, or what is taken together of smaller ones; eight
    float32 copies of the largest weights that are encoded together, or with statistics a dozen, and solves in float64
    on their Gram matrices."""
    blocks: dict[str, int] = {}
    for name, entry in checkpoint.tensors.items():
        block = block_of(name, layout.blocks)
        if block:
            blocks[block] = blocks.get(block, 0) + entry.stop - entry.start
    decided, steps = plan.by_site(), RecipeSteps()
    together: dict[Any, list[Site]] = {}
    for site in layout.sites:
        if site.name in decided:
            key = steps.alike(decided[site.name], (site.out_features, site.in_features))
            together.setdefault(site.name if key is None else key, []).append(site)
    work, taken = 0, max(blocks.values(), default=0)
    for sites in together.values():
        wide, high = sites[0].in_features, sites[0].out_features
        each = 48 * wide * high + 24 * wide**2 if statistics else 32 * wide * high
        work = max(work, min(len(sites), most_together(sites[0])) * each)
        taken = max(taken, min(WINDOW, sum(blocks.values()))) if len(sites) > 1 else taken
    held = checkpoint.total_bytes if checkpoint.memory is not None else 0
    return _memory(held, statistics, taken + work, "none")


def of_quantizing(
    checkpoint: Checkpoint, meta: nn.Module, layout: Layout, plan: Plan, recipe: Recipe, statistics: Any, dtype: str,
    offload: str,
) -> Callable[[], Memory]:  # fmt: skip
    """Of `quantize` when it is called: the larger of calibrating (where nothing is given) and encoding; for steps that
    are trained three models in float32, as `learns` asks for."""

    def predict() -> Memory:
        settings = settings_of(recipe.calibration or Calibration(), 0)
        needed = bool(needs(plan))
        found = [of_encoding(checkpoint, layout, plan, statistics_bytes(layout, settings) if needed else 0)]
        if needed and statistics is None:
            found.append(of_calibration(checkpoint, meta, layout, settings, pick_dtype(dtype), offload))
        if recipe.training is not None and any(trained_step(decision) for decision in plan.layers):
            found.append(Memory(12 * sum(p.numel() for p in meta.parameters()), found[0].statistics, found[0].work))
        return max(found, key=lambda memory: memory.total)

    return predict


def check_quantization(
    recipe: Recipe, plan: Plan, targets: tuple[Any, ...], offload: str, reporter: Reporter
) -> Recipe:
    """The recipe without what an offloaded run leaves out (training that is optional); E203 where something else than
    the calibration would run the whole model."""
    check_offload(offload)
    if offload == "none":
        return recipe
    reasons = {
        "a step of the recipe is chosen by running changed models": measures(plan),
        "the result of a target is measured beside the whole original": any(value is not None for value in targets),
        "scheduler_search runs both whole models": recipe.scheduler_search is not None,
        "steps of the recipe are trained": recipe.training is not None and not all(map(optional, plan.layers)),
    }
    for what, found in reasons.items():
        if found:
            raise DitcompressError("E203", f"--offload {offload}", what, "use another recipe, or --offload none")
    learned = recipe.training is not None and any(trained_step(decision) for decision in plan.layers)
    if not learned:
        return recipe
    reporter.note("not trained: an offloaded model has no weights that stay in memory")
    return recipe.model_copy(update={"training": None})

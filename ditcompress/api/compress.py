"""What the command line and Python users call: each function glues the layers below together, in order.

Paths are diffusers model folders, pipeline folders, single safetensors files or original DiT .pt files.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import engine
from ..calibrate.collect import CalibrationSettings, collect
from ..calibrate.conditions import Conditions, get_conditions
from ..calibrate.schedulers import load_scheduler
from ..calibrate.statistics import Statistics
from ..calibrate.store import fingerprint, load_statistics, save_statistics
from ..checkpoint.reader import Checkpoint, check_finite
from ..checkpoint.source import ModuleSource
from ..checkpoint.writer import ShardWriter, copy_pipeline, output_folder, remove_work, work_folder
from ..console import Reporter, Silent
from ..errors import DitcompressError
from ..loading import DitcompressConfig, DitcompressQuantizer, apply_schemes, load_model, open_model, register
from ..models import adapter_for
from ..models.base import Layout
from ..plan import Plan
from ..quantize import RecipeSteps, check_plan, choose, needs
from ..recipe import Calibration, Recipe, canonical, data_folder, load_recipe, make_plan


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` made: `path` (None for a model in memory or a dry run), `model` (for a model in memory),
    the plan, and one record a layer. `original_bytes` and `bytes` count stored tensors."""

    path: Path | None
    model: nn.Module | None
    plan: Plan
    records: tuple[engine.LayerRecord, ...] = ()
    original_bytes: int = 0
    bytes: int = 0

    @property
    def bits(self) -> float:
        """Stored bits per quantized weight, scales and low-rank factors included."""
        weights = sum(r.shape[0] * r.shape[1] for r in self.records)
        return 8 * sum(r.stored_bytes for r in self.records) / weights if weights else 0.0


def pick_device(device: str) -> torch.device:
    """ "auto" is the first accelerator, else the CPU; E604 for a device this machine has not."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError):
        raise DitcompressError("E604", f"--device {device}", "is not available here", "use cpu or auto") from None


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating dtype by its name; E203 for another."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = dtype if isinstance(dtype, torch.dtype) else named.get(dtype)
    if found is None:
        raise DitcompressError("E203", f"--dtype {dtype}", "is not known", "use float32, bfloat16 or float16")
    return found


# --- calibrate -----------------------------------------------------------------------------------------------------


def settings_of(calibration: Calibration, seed: int, grams: bool = True, batch: int = 16) -> CalibrationSettings:
    """The collector's settings for a recipe's `calibration` section."""
    return CalibrationSettings(**calibration.model_dump(), seed=seed, batch=batch, grams=grams)


def calibrate(
    path: str | Path,
    out: str | Path | None = None,
    *,
    recipe: str | Recipe = "w4a8",
    overrides: Sequence[str] = (),
    conditions: str | Path | None = None,
    scheduler: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Statistics:
    """Run `path` along its own sampling trajectories and store what quantization needs in the folder `out`.

    `recipe` says how much is gathered. Raises E205 where the model cannot be driven, E331 for bad statistics.
    """
    reporter = reporter or Silent()
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    with _target(out, overwrite, [Path(path)]) as folder:
        checkpoint, _ = open_model(path, allow_compressed=False)
        settings = settings_of(chosen.calibration or Calibration(), seed)
        statistics = _calibrate(checkpoint, settings, conditions, scheduler, device, dtype, reporter, work_for=out)
        if folder is not None:
            save_statistics(folder, statistics)
    return statistics


def _target(out: str | Path | None, overwrite: bool, inputs: list[Path]) -> Any:
    """`output_folder` for a path; nothing for None."""
    from contextlib import nullcontext

    return nullcontext(None) if out is None else output_folder(Path(out), overwrite=overwrite, inputs=inputs)


def _calibrate(
    checkpoint: Checkpoint,
    settings: CalibrationSettings,
    conditions: str | Path | None,
    scheduler: str | Path | None,
    device: str,
    dtype: str,
    reporter: Reporter,
    work_for: str | Path | None,
) -> Statistics:
    """Fresh statistics of a checkpoint, going on from an interrupted run where there is one."""
    adapter = adapter_for(checkpoint.config)
    model, _ = load_model(checkpoint.path, dtype=pick_dtype(dtype), device=pick_device(device))
    sampler = load_scheduler(
        checkpoint.config, Path(scheduler) if scheduler else checkpoint.scheduler_folder, adapter, reporter
    )
    given = _conditions(checkpoint, adapter, settings, conditions, reporter)
    marks = fingerprint(checkpoint.fingerprint, sampler, given, settings)
    journal = None
    if work_for is not None:
        journal = work_folder(Path(work_for).with_name(Path(work_for).name + ".calibration"), marks)
    layout = adapter.layout(model)
    statistics = collect(
        model, adapter, checkpoint.config, layout, sampler, given, settings, journal=journal, reporter=reporter
    )
    statistics.meta.update(marks)
    if journal is not None:
        remove_work(journal)
    return statistics


def _conditions(
    checkpoint: Any, adapter: Any, settings: CalibrationSettings, file: str | Path | None, reporter: Reporter
) -> Conditions:
    lines = (data_folder("calib_data") / "prompts.txt").read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line and not line.startswith("#")]
    return get_conditions(
        checkpoint,
        adapter,
        settings.samples,
        settings.seed,
        file=Path(file) if file else None,
        prompts=prompts,
        reporter=reporter,
    )


def cache_folder() -> Path:
    """Where statistics are kept between runs; a temporary folder where the home folder cannot be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    folder = base / "ditcompress" / "statistics"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"ditcompress-{os.getuid()}" / "statistics"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _cached_statistics(
    checkpoint: Checkpoint,
    settings: CalibrationSettings,
    conditions: str | Path | None,
    scheduler: str | Path | None,
    device: str,
    dtype: str,
    reporter: Reporter,
) -> Statistics:
    """Statistics from the cache when this checkpoint was calibrated in this way before, else fresh ones."""
    asked = {
        "model": checkpoint.fingerprint,
        "settings": asdict(settings),
        "conditions": _digest(conditions),
        "scheduler": _digest(Path(scheduler) / "scheduler_config.json" if scheduler else None),
        "dtype": dtype,
    }
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / key
    if folder.is_dir():
        reporter.note(f"statistics of an earlier run are used ({folder})")
        return load_statistics(folder)
    statistics = _calibrate(checkpoint, settings, conditions, scheduler, device, dtype, reporter, work_for=folder)
    with output_folder(folder, overwrite=True) as partial:
        save_statistics(partial, statistics)
    return statistics


def _digest(path: str | Path | None) -> str:
    if path is None or not Path(path).is_file():
        return str(path or "")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# --- quantize ------------------------------------------------------------------------------------------------------


def quantize(
    model_or_path: nn.Module | str | Path,
    recipe: str | Path | Recipe = "w4a8",
    out: str | Path | None = None,
    *,
    statistics: str | Path | Statistics | None = None,
    overrides: Sequence[str] = (),
    conditions: str | Path | None = None,
    scheduler: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    max_shard_bytes: int = 5 * 2**30,
    reporter: Reporter | None = None,
) -> QuantizeResult:
    """Compress a checkpoint by a recipe into the folder `out`, or a diffusers model in memory into a new model.

    Statistics are taken from `statistics` (a folder or an object), else from the cache, else gathered; a recipe
    that needs none gathers none. A pipeline folder gives a pipeline folder.
    """
    reporter = reporter or Silent()
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    if isinstance(model_or_path, nn.Module):
        return _quantize_module(model_or_path, chosen, statistics, seed, reporter)
    path = Path(model_or_path)
    checkpoint, meta = open_model(path, allow_compressed=False)
    layout = adapter_for(checkpoint.config).layout(meta)
    plan = checked_plan(chosen, layout)
    if dry_run:
        return QuantizeResult(None, None, plan, original_bytes=checkpoint.total_bytes)
    target = Path(out) if out else path.with_name(f"{path.name.removesuffix('.safetensors')}-{chosen.name}")
    inputs = [path]
    with output_folder(
        target, overwrite=overwrite, inputs=inputs, planned_bytes=checkpoint.total_bytes // 2,
        manifest={"recipe": chosen.to_json(), "seed": seed, "input": {"fingerprint": checkpoint.fingerprint}},
    ) as partial:  # fmt: skip
        check_finite(checkpoint, reporter)
        found = _statistics_for(
            plan, chosen, statistics, checkpoint, conditions, scheduler, seed, device, dtype, reporter
        )
        plan = choose(plan, layout, checkpoint.read, found.inputs if found else {})
        marks = {"model": checkpoint.fingerprint, "recipe": canonical(chosen), "seed": seed, "torch": torch.__version__,
                 "statistics": "" if found is None else found.digest}  # fmt: skip
        journal = work_folder(target, marks, restart=restart)
        component = checkpoint.component if checkpoint.pipeline else ""
        folder = partial / component
        folder.mkdir(exist_ok=True)
        writer = ShardWriter(folder, max_shard_bytes=max_shard_bytes)
        outcome = engine.run(
            checkpoint, layout, plan, found.inputs if found else {}, RecipeSteps(), writer,
            seed=seed, journal=journal, reporter=reporter,
        )  # fmt: skip
        files = writer.finish()
        checkpoint.verify_unchanged()
        _write_config(folder, checkpoint.config, engine.quantization_config(chosen.name, outcome))
        (folder / "recipe.json").write_text(json.dumps(chosen.to_json(), indent=2) + "\n")
        if checkpoint.pipeline:
            copy_pipeline(checkpoint.pipeline, partial, component)
        elif checkpoint.scheduler_folder:
            _copy_scheduler(checkpoint.scheduler_folder, partial)
        size = sum(f.stat().st_size for f in files)
    remove_work(journal)
    return QuantizeResult(target, None, plan, outcome.records, checkpoint.total_bytes, size)


def checked_plan(recipe: Recipe, layout: Layout) -> Plan:
    """The recipe's plan for this model; E202 when nothing matches or a step or format is unknown."""
    plan = make_plan(recipe, layout)
    check_plan(plan)
    if not plan.layers:
        raise DitcompressError("E202", f"recipe {recipe.name}", "no rule matches a linear of this model", "see `inspect`")
    return plan


def _copy_scheduler(folder: Path, partial: Path) -> None:
    target = partial / "scheduler"
    target.mkdir(exist_ok=True)
    (target / "scheduler_config.json").write_bytes((folder / "scheduler_config.json").read_bytes())


def _write_config(folder: Path, config: dict[str, Any], quantization: dict[str, Any]) -> None:
    text = json.dumps({**config, "quantization_config": quantization}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")


def _statistics_for(
    plan: Plan,
    recipe: Recipe,
    given: str | Path | Statistics | None,
    checkpoint: Checkpoint,
    conditions: str | Path | None,
    scheduler: str | Path | None,
    seed: int,
    device: str,
    dtype: str,
    reporter: Reporter,
) -> Statistics | None:
    """What the plan needs: nothing, the given statistics (checked), or cached or fresh ones."""
    if isinstance(given, Statistics):
        return given
    if given is not None:
        found = load_statistics(Path(given))
        if found.meta.get("model") not in (None, checkpoint.fingerprint):
            raise DitcompressError("E331", given, "these statistics belong to another checkpoint", "calibrate this one")
        return found
    if not needs(plan):
        return None
    settings = settings_of(recipe.calibration or Calibration(), seed)
    return _cached_statistics(checkpoint, settings, conditions, scheduler, device, dtype, reporter)


def _quantize_module(
    model: nn.Module, recipe: Recipe, statistics: str | Path | Statistics | None, seed: int, reporter: Reporter
) -> QuantizeResult:
    """A compressed copy of a model in memory; the original is not changed."""
    register()
    source = ModuleSource(model)
    adapter = adapter_for(source.config)
    layout = adapter.layout(model)
    plan = checked_plan(recipe, layout)
    if isinstance(statistics, (str, Path)):
        statistics = load_statistics(Path(statistics))
    if statistics is None and needs(plan):
        settings = settings_of(recipe.calibration or Calibration(), seed)
        scheduler = load_scheduler(source.config, None, adapter, reporter)
        given = _conditions(source, adapter, settings, None, reporter)
        statistics = collect(model, adapter, source.config, layout, scheduler, given, settings, reporter=reporter)
    sink = _Memory()
    inputs = statistics.inputs if statistics is not None else {}
    plan = choose(plan, layout, source.read, inputs)
    outcome = engine.run(source, layout, plan, inputs, RecipeSteps(), sink, seed=seed, reporter=reporter)
    compressed = copy.deepcopy(model)
    fields = engine.quantization_config(recipe.name, outcome)
    config = DitcompressConfig(**{key: value for key, value in fields.items() if key != "quant_method"})
    apply_schemes(compressed, config.layer_schemes())
    compressed.load_state_dict(sink.tensors, strict=True, assign=True)
    compressed.requires_grad_(False)
    compressed.hf_quantizer = DitcompressQuantizer(config, pre_quantized=True)
    compressed.register_to_config(quantization_config=config)
    size = sum(t.numel() * t.element_size() for t in sink.tensors.values())
    before = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return QuantizeResult(None, compressed.eval(), plan, outcome.records, before, size)


class _Memory:
    """A sink that keeps the tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor




# --- facts for the command line --------------------------------------------------------------------------------------


def quantize_facts(result: QuantizeResult) -> dict[str, Any]:
    """A result as JSON values."""
    return {
        "path": str(result.path),
        "bits_per_quantized_weight": result.bits,
        "original_bytes": result.original_bytes,
        "bytes": result.bytes,
        "layers": [asdict(record) for record in result.records],
    }


def calibration_plan(path: str | Path, recipe: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `calibrate` would do, from the headers alone."""
    chosen = load_recipe(recipe, overrides)
    checkpoint, meta = open_model(path, allow_compressed=False)
    layout = adapter_for(checkpoint.config).layout(meta)
    plan = checked_plan(chosen, layout)
    inputs = {site.input_key: site.in_features for site in layout.sites}
    return {
        **(chosen.calibration or Calibration()).model_dump(),
        "needs": ", ".join(sorted(needs(plan))) or "nothing",
        "inputs": len(inputs),
        "gram_bytes": sum(4 * k * k for k in inputs.values()),
    }


def check_recipe(recipe: Recipe) -> None:
    """Validate every step and format of a recipe without a model."""
    from ..plan import ActivationSpec, LayerDecision

    layers = []
    for number, rule in enumerate(recipe.rules):
        if rule.weight is not None and not rule.keep:
            layers.append(
                LayerDecision(
                    "", "", rule.weight.spec(), ActivationSpec(), rule.steps, rule.smooth, rule.rank, f"rule {number + 1}"
                )
            )
    check_plan(Plan(tuple(layers)))

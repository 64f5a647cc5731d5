"""moe: a dense checkpoint into one whose feed-forwards are experts, optionally distilled from the dense model."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..calibration.schedulers import load_scheduler
from ..calibration.trajectory import Sampling
from ..checkpoint.reader import Checkpoint, check_finite
from ..checkpoint.source import ModuleSource
from ..checkpoint.writer import ShardWriter, copy_rest, kept_work, output_folder, remove_work, work_folder
from ..console import Reporter, Silent
from ..errors import DitcompressError
from ..evaluation.vae import decode, load_vae
from ..experts import left_dense, router_dtypes
from ..loading import DitcompressConfig, as_loaded, open_model, register
from ..mixture import (
    Numbers,
    check_stages,
    followed,
    linear_operations,
    method_of,
    params_of,
    registry,
    stages_of,
)
from ..models import adapter_for
from ..models.base import Layout
from ..ranks import alone
from ..report.experts import Coloured, page
from ._conversion import Job, converted, entry_of, measured_facts, plan_of
from ._experts import Plan, card, settings_from
from ._images import listing
from ._training import Driven, driven, guidance_of
from .calibration import conditions_for, given_files, pick_device, pick_dtype, settings_of
from .distill import check_data

REPORT, PAGE = "moe.json", "moe.html"


def moe(
    path: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    experts: int | None = None,
    active: int | None = None,
    shared: int | None = None,
    blocks_active: float | None = None,
    method: str = "moe-best",
    distill_steps: int = 0,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    conditions: str | Path | None = None,
    scheduler: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write `path` to the folder `out` with every feed-forward cut into `experts` equal parts (8): `shared` of them (1)
    always on, the others routed, `active` of which (2) run for a token. Other methods route heads or blocks and have
    numbers of their own (docs/moe.md). Returns what moe.json holds.

    `blocks_active`: the share of the blocks that run, each sample choosing its own. `method` splits and routes without
    training; `distill_steps` then trains routers and experts against the dense model, on states of its own or on `data`
    (images or cached latents, whose diffusion loss is added). E203 for numbers that do not fit, E205 for a model
    without the parts that the method routes.

    A diffusers model in memory gives a converted copy of it as "model" beside the facts, and no files.
    """
    if isinstance(path, str | Path):
        alone("moe")
    reporter = reporter or Silent()
    checkpoint, meta = _opened(path)
    if distill_steps < 0:
        raise DitcompressError("E203", f"--distill-steps {distill_steps}", "is negative", "give 0 for none")
    if data is not None and not distill_steps:
        raise DitcompressError("E203", "--data", "without --distill-steps nothing is trained", "give both")
    chosen, settings = method_of(method), settings_from(overrides, distill_steps)
    params = params_of(chosen, settings.method)
    layout = adapter_for(checkpoint.config).layout(meta)
    numbers = _numbers(chosen, experts=experts, shared=shared, active=active)
    share = blocks_active if blocks_active is not None else getattr(chosen, "BLOCKS_ACTIVE", None)
    plan = plan_of(meta, layout, chosen, params, settings, numbers, share, {})
    left = left_dense(meta, layout) if plan.specs else []
    if left:
        reporter.note(f"{len(left)} linears into feed-forwards that are no module of their own stay dense")
    pick_device(device), pick_dtype(dtype)
    if data is not None:
        check_data(checkpoint, str(data), scheduler)
    if dry_run:
        return {"method": method, **_foreseen(layout, plan), "left_dense": left, "written": False}
    where = None if isinstance(path, nn.Module) else Path(path)
    target = Path(out) if out else where and where.with_name(f"{where.name.removesuffix('.safetensors')}-moe")
    job = Job(where, target, chosen, params, settings, numbers, share, plan, distill_steps,
               Path(data) if data else None, conditions, scheduler, seed, device, dtype, restart, reporter)  # fmt: skip
    if distill_steps:
        stages_of(job.stages, distill_steps)
        check_stages(job.stages, {path: (spec.shared, spec.active) for path, spec in plan.specs.items()})
    if isinstance(checkpoint, ModuleSource):
        return _in_memory(path, job, layout, left)
    return _write(job, checkpoint, layout, left, overwrite)


def _opened(path: str | Path | nn.Module) -> tuple[Checkpoint | ModuleSource, nn.Module]:
    """What holds the weights, and a model to read the layout from. E322 for one that is not dense any more."""
    checkpoint: Checkpoint | ModuleSource
    if isinstance(path, nn.Module):
        checkpoint, model = ModuleSource(path), path
    else:
        checkpoint, model = open_model(Path(path), allow_compressed=False)
    if checkpoint.config.get("quantization_config") is not None:
        raise DitcompressError("E322", checkpoint.class_name, "is converted or quantized", "give the dense original")
    return checkpoint, model


def _numbers(method: ModuleType, **given: int | None) -> Numbers:
    """The method's own numbers with those that were given."""
    own: Numbers = getattr(method, "NUMBERS", Numbers())
    return dataclasses.replace(own, **{name: value for name, value in given.items() if value is not None})


def _foreseen(layout: Layout, plan: Plan) -> dict[str, Any]:
    """What can be told before anything runs."""
    flops = dict(zip(("dense", "active"), linear_operations(layout, plan.specs, plan.routed), strict=True))
    return {
        "active_neurons": plan.active_neurons(), "block_linear_flops_per_token": flops, "layers": plan.to_json(),
    }  # fmt: skip


def _in_memory(model: Any, job: Job, layout: Layout, left: list[str]) -> dict[str, Any]:
    """The facts and, as "model", a converted copy in the dtype of the original, which is not changed."""
    register()
    source = ModuleSource(model)
    adapter, calibration = adapter_for(source.config), job.settings.calibration
    dense = copy.deepcopy(model).float().eval().requires_grad_(False)
    sampler = load_scheduler(source.config, Path(job.scheduler) if job.scheduler else None, adapter, job.reporter)
    given = conditions_for(source, adapter, settings_of(calibration, job.seed), job.conditions, job.reporter)
    by = Driven(dense, adapter, source.config, sampler, given, guidance_of(calibration, adapter, source.config))
    sparse, plan, _, losses = converted(job, source, layout, by, None)
    facts = measured_facts(job, layout, by, sparse, plan, losses, left)
    sparse = sparse.to(model.dtype).eval().requires_grad_(False)
    as_loaded(sparse, DitcompressConfig(**entry_of(job, plan)))
    return {**facts, "model": sparse}


def _write(job: Job, checkpoint: Checkpoint, layout: Layout, left: list[str], overwrite: bool) -> dict[str, Any]:
    assert job.path is not None and job.out is not None
    marks = {"model": checkpoint.fingerprint, "method": job.name, "params": job.params.model_dump(mode="json"),
             "settings": job.settings.model_dump(mode="json"), "seed": job.seed, "torch": torch.__version__,
             "distill": job.distill, "layers": job.plan.to_json(),
             "data": None if job.data is None else listing(job.data), "dtype": job.dtype,
             "device": str(pick_device(job.device)),
             **given_files(job.conditions, job.scheduler, checkpoint)}  # fmt: skip
    manifest = {"moe": {k: marks[k] for k in ("method", "params", "distill")}, "seed": job.seed,
                "input": {"fingerprint": checkpoint.fingerprint}}  # fmt: skip
    with output_folder(
        job.out, overwrite=overwrite, inputs=[job.path], planned_bytes=checkpoint.total_bytes, manifest=manifest
    ) as partial:
        check_finite(checkpoint, job.reporter)
        journal = work_folder(job.out, marks, restart=job.restart) if job.distill else None
        with kept_work(journal):
            by = driven(
                checkpoint, job.settings.calibration, job.conditions, job.scheduler, job.seed, job.device, job.reporter
            )
            sparse, plan, trained, losses = converted(job, checkpoint, layout, by, journal)
        facts = measured_facts(job, layout, by, sparse, plan, losses, left)
        _write_folder(job, checkpoint, sparse, plan, trained, facts, partial)
        (partial / PAGE).write_text(page(facts, _coloured(job, checkpoint, by, sparse)), encoding="utf-8")
        checkpoint.verify_unchanged()
    remove_work(journal)
    return {"out": str(job.out), **facts}


def _coloured(job: Job, checkpoint: Checkpoint, by: Driven, sparse: nn.Module) -> Coloured | None:
    """A few samples with the experts of their tokens, decoded where the checkpoint has a VAE."""
    if not job.settings.images:
        return None
    sampling = Sampling(job.settings.training.sample_steps, by.guidance, job.seed)
    found = followed(sparse, by.adapter, by.config, by.scheduler, by.conditions, sampling, job.settings.images)
    if found is None:
        return None
    vae = load_vae(checkpoint, str(pick_device(job.device)))
    images = found.images if vae is None else decode(vae, found.images)
    if images.shape[1] in (1, 3):
        return Coloured(images, -1.0, 1.0, found.choices)
    return Coloured(images, float(images.min()), float(images.max()), found.choices)


def _write_folder(
    job: Job, checkpoint: Checkpoint, sparse: nn.Module, plan: Plan, trained: set[str], facts: dict[str, Any],
    partial: Path,
) -> None:  # fmt: skip
    """Weights in the dtypes of the original (routers in float32), config.json, moe.json, scheduler and card."""
    folder = partial / (checkpoint.component if checkpoint.pipeline else "")
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder)
    state = sparse.state_dict()
    dense = {path: _dtype_inside(checkpoint, path) for path in (*plan.specs, *plan.routed)}
    routers = router_dtypes(sparse)
    for name in sorted(state):
        inside = next((path for path in dense if name.startswith(f"{path}.") and name not in checkpoint.tensors), None)
        if inside is None and name not in trained:
            writer.add(name, checkpoint.read(name))
            continue
        dtype = checkpoint.tensors[name].dtype if inside is None else dense[inside]
        if name in routers or (inside in plan.specs and state[name].dim() == 1):  # sums of offsets, and few bytes
            dtype = torch.float32
        writer.add(name, state[name].detach().to("cpu", dtype).contiguous())
    facts["bytes"] = sum(file.stat().st_size for file in writer.finish())
    facts["original_bytes"] = checkpoint.total_bytes
    text = json.dumps({**checkpoint.config, "quantization_config": entry_of(job, plan)}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")
    (partial / REPORT).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
    copy_rest(checkpoint, partial)
    (partial / "README.md").write_text(
        card(job.path.name if job.path else "", checkpoint.class_name, facts), encoding="utf-8"
    )


def _dtype_inside(checkpoint: Checkpoint, path: str) -> torch.dtype:
    """The dtype of the dense feed-forward's largest tensor."""
    found = [entry for name, entry in checkpoint.tensors.items() if name.startswith(f"{path}.")]
    return max(found, key=lambda entry: entry.stop - entry.start).dtype


def moe_methods() -> list[str]:
    """Names of the methods."""
    return [name.replace("_", "-") for name in registry.names()]

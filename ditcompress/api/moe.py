"""moe: a dense checkpoint into one whose feed-forwards are experts, optionally distilled from the dense model."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.trajectory import Sampling
from ..checkpoint.reader import Checkpoint, check_finite
from ..checkpoint.writer import ShardWriter, copy_pipeline, output_folder, remove_work, work_folder
from ..console import Reporter, Silent
from ..distill.data import Data, Trajectories
from ..distill.latents import Latents
from ..distill.trainer import train
from ..errors import DitcompressError
from ..evaluation.vae import decode, load_vae
from ..experts import ExpertLayer, convertible, left_dense, router_dtypes
from ..loading import open_model
from ..mixture import (
    Experts,
    Numbers,
    Weights,
    begin_blocks,
    block_groups,
    convert,
    followed,
    head_importance,
    linear_operations,
    measured,
    method_of,
    neuron_importance,
    params_of,
    registry,
    seed_of,
    specs_for,
)
from ..models import adapter_for
from ..models.base import Layout
from ..report.experts import Coloured, page
from ..routed import apply_routed, routable_attentions
from ..runtime.blocks import BlockRouter
from ..runtime.moe import Routed
from ..structure import writers
from ._experts import ExpertSettings, Plan, card, facts_of, settings_from
from ._images import encoded, is_images, listing
from ._training import Driven, driven
from .calibration import cached_statistics, pick_device, pick_dtype, settings_of
from .compress import copy_scheduler

REPORT, PAGE = "moe.json", "moe.html"
CALIBRATION_BATCH = 8  # images at a time: more forward passes, so more of the reservoir's tokens differ
PROBE_SIZE, IMPORTANCE_SIZE = 32, 8  # states of a batch


@dataclass(frozen=True)
class _Job:
    path: Path
    out: Path
    method: ModuleType
    params: Any
    settings: ExpertSettings
    numbers: Numbers
    blocks_active: float | None
    plan: Plan
    distill: int
    data: Path | None
    conditions: str | Path | None
    scheduler: str | Path | None
    seed: int
    device: str
    dtype: str
    restart: bool
    reporter: Reporter

    @property
    def name(self) -> str:
        return self.method.__name__.rpartition(".")[2].replace("_", "-")


def moe(
    path: str | Path,
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
    """
    reporter = reporter or Silent()
    checkpoint, meta = open_model(Path(path), allow_compressed=False)
    if checkpoint.quantization is not None:
        raise DitcompressError("E322", path, "has expert layers already", "give the dense original")
    if distill_steps < 0:
        raise DitcompressError("E203", f"--distill-steps {distill_steps}", "is negative", "give 0 for none")
    chosen, settings = method_of(method), settings_from(overrides, distill_steps)
    params = params_of(chosen, settings.method)
    layout = adapter_for(checkpoint.config).layout(meta)
    own: Numbers = getattr(chosen, "NUMBERS", Numbers())
    given = {"experts": experts, "shared": shared, "active": active}
    numbers = dataclasses.replace(own, **{name: value for name, value in given.items() if value is not None})
    share = blocks_active if blocks_active is not None else getattr(chosen, "BLOCKS_ACTIVE", None)
    plan = _plan(meta, layout, chosen, params, settings, numbers, share, {})
    left = left_dense(meta, layout) if plan.specs else []
    if left:
        reporter.note(f"{len(left)} linears into feed-forwards that are no module of their own stay dense")
    files = Path(data) if data else None
    if files is not None and not distill_steps:
        raise DitcompressError("E203", "--data", "without --distill-steps nothing is trained", "give both")
    pick_device(device), pick_dtype(dtype)
    if dry_run:
        flops = dict(zip(("dense", "active"), linear_operations(layout, plan.specs, plan.routed), strict=True))
        return {"method": method, "active_neurons": plan.active_neurons(), "block_linear_flops_per_token": flops,
                "layers": plan.to_json(), "left_dense": left, "written": False}  # fmt: skip
    target = Path(out) if out else Path(path).with_name(f"{Path(path).name.removesuffix('.safetensors')}-moe")
    job = _Job(Path(path), target, chosen, params, settings, numbers, share, plan, distill_steps, files,
               conditions, scheduler, seed, device, dtype, restart, reporter)  # fmt: skip
    return _write(job, checkpoint, layout, left, overwrite)


def _plan(
    model: nn.Module, layout: Layout, method: ModuleType, params: Any, settings: ExpertSettings, numbers: Numbers,
    blocks_active: float | None, importance: Mapping[str, Tensor],
) -> Plan:  # fmt: skip
    """What the method makes of a model; without `importance` heads are taken in their order."""
    specs: dict[str, ExpertLayer] = {}
    if hasattr(method, "split"):
        offset, copies = (bool(getattr(params, name, False)) for name in ("offsets", "copies"))
        gate = settings.gate or getattr(method, "gate", lambda _: "one")(params)
        three = (numbers.experts or 0, numbers.shared or 0, numbers.active or 0)
        specs = specs_for(model, layout, *three, gate, offset, copies, getattr(params, "choice", "token"))
    routed = method.routed(model, layout, numbers, params, importance) if hasattr(method, "routed") else {}
    if blocks_active is not None:
        groups = block_groups(model, layout, blocks_active, settings.group, settings.alpha)
        if set(groups) & set(routed):
            what = "this method surrounds every block"
            raise DitcompressError("E203", f"--blocks-active {blocks_active:g}", what, "leave it out")
        routed = {**routed, **groups}
    return Plan(specs, routed)


def _write(job: _Job, checkpoint: Checkpoint, layout: Layout, left: list[str], overwrite: bool) -> dict[str, Any]:
    marks = {"model": checkpoint.fingerprint, "method": job.name, "params": job.params.model_dump(mode="json"),
             "settings": job.settings.model_dump(mode="json"), "seed": job.seed, "torch": torch.__version__,
             "distill": job.distill, "layers": job.plan.to_json(),
             "data": None if job.data is None else listing(job.data)}  # fmt: skip
    manifest = {"moe": {k: marks[k] for k in ("method", "params", "distill")}, "seed": job.seed,
                "input": {"fingerprint": checkpoint.fingerprint}}  # fmt: skip
    with output_folder(
        job.out, overwrite=overwrite, inputs=[job.path], planned_bytes=checkpoint.total_bytes, manifest=manifest
    ) as partial:
        check_finite(checkpoint, job.reporter)
        journal = work_folder(job.out, marks, restart=job.restart) if job.distill else None
        by = driven(
            checkpoint, job.settings.calibration, job.conditions, job.scheduler, job.seed, job.device, job.reporter
        )
        sparse, plan, trained, losses = _converted(job, checkpoint, layout, by, journal)
        probe = _states(job, by, 104_729, images=32)
        batches = [probe.batch(n, PROBE_SIZE) for n in range(job.settings.probe)]
        sqnr, use, routing = measured(by.model, sparse, by.adapter, batches)
        facts = {**facts_of(by.model, sparse, layout, plan, job.name, sqnr, use, routing, left), "seed": job.seed,
                 "states": len(batches) * PROBE_SIZE, "conditions": by.conditions.source}  # fmt: skip
        if losses:
            tail = losses[-20:]
            facts["distilled"] = {"steps": len(losses), "first": losses[0], "last": sum(tail) / len(tail)}
        _write_folder(job, checkpoint, sparse, plan, trained, facts, partial)
        (partial / PAGE).write_text(page(facts, _coloured(job, checkpoint, by, sparse)), encoding="utf-8")
        checkpoint.verify_unchanged()
    remove_work(journal)
    return {"out": str(job.out), **facts}


def _states(job: _Job, by: Driven, offset: int, images: int) -> Trajectories:
    """States of the dense model's trajectories under noise of their own."""
    wanted = job.settings.training
    sampling = Sampling(wanted.sample_steps, by.guidance, job.seed + offset, batch=16)
    return Trajectories(
        by.model, by.adapter, by.config, by.scheduler, by.conditions, sampling, images=images, refresh=wanted.refresh,
        null=wanted.null,
    )  # fmt: skip


def _coloured(job: _Job, checkpoint: Checkpoint, by: Driven, sparse: nn.Module) -> Coloured | None:
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


def _converted(
    job: _Job, checkpoint: Checkpoint, layout: Layout, by: Driven, journal: Path | None
) -> tuple[nn.Module, Plan, set[str], tuple[float, ...]]:
    """The model with its routed parts, these, the names of its trained tensors, and the losses of the training."""
    axes, needs = convertible(by.model, layout), job.method.NEEDS
    tokens: dict[str, Tensor] = {}
    if "tokens" in needs:
        settings = settings_of(job.settings.calibration, job.seed, grams=False, batch=CALIBRATION_BATCH)
        found = cached_statistics(
            checkpoint, settings, job.conditions, job.scheduler, job.device, job.dtype, job.reporter, job.restart
        ).inputs  # fmt: skip
        keys = {path: writers(layout, axis)[0].input_key for path, axis in axes.items()}
        tokens = {path: found[key].reservoir for path, key in keys.items()}
        if not all(len(rows) for rows in tokens.values()):
            raise DitcompressError("E331", "calibration", "kept no tokens", "raise calibration.reservoir")
    importance: dict[str, Tensor] = {}
    for need, score, wanted in (
        ("importance", neuron_importance, axes),
        ("heads", head_importance, routable_attentions(by.model, layout) if "heads" in needs else {}),
    ):
        if need in needs:
            states = _states(job, by, 15_485_863, images=32)
            batches = job.settings.scoring
            importance |= score(
                by.model, layout, wanted, states, batches=batches, size=IMPORTANCE_SIZE, seed=job.seed
            )  # fmt: skip
    plan = _plan(by.model, layout, job.method, job.params, job.settings, job.numbers, job.blocks_active, importance)
    parts = convert(
        by.model, layout, plan.specs, job.method, job.params, tokens, importance, seed=job.seed, reporter=job.reporter
    )
    sparse = copy.deepcopy(by.model)
    _begun(job, apply_routed(sparse, plan.routed))
    for path, part in parts.items():
        sparse.set_submodule(path, part)
    trained, losses = _distilled(job, checkpoint, layout, by, sparse, plan, journal) if job.distill else (set(), ())
    return sparse, plan, trained, losses


@torch.no_grad()
def _begun(job: _Job, parts: Mapping[str, Routed]) -> None:
    """Start the routers of attentions and blocks."""
    for path, part in parts.items():
        generator = torch.Generator().manual_seed(seed_of(job.seed, path))
        if isinstance(part, BlockRouter):
            begin_blocks(part, generator)
        else:
            job.method.begin(part, job.params, generator)


def _distilled(
    job: _Job, checkpoint: Checkpoint, layout: Layout, by: Driven, sparse: nn.Module, plan: Plan, journal: Path | None
) -> tuple[set[str], tuple[float, ...]]:
    """Train the routed parts of `sparse` in place; the names of the trained tensors and the losses."""
    wanted = job.settings.training
    data: Data = _states(job, by, 7919, images=wanted.images)
    if job.data is not None:
        device = pick_device(job.device)
        folder = encoded(job.data, checkpoint, by.adapter, device, job.reporter) if is_images(job.data) else job.data
        data = Latents(folder, by.adapter, by.config, by.scheduler, seed=job.seed, null=wanted.null, device=device)
    over: Any = wanted.balance_over or getattr(job.method, "BALANCE_OVER", "mean")
    weights = Weights(
        wanted.output, wanted.features, wanted.balance, wanted.router_rate, wanted.shared, over, wanted.prior
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        task = Experts(by.model, sparse, layout, data, weights, wanted.batch, plan.routed)
        history = train(task, wanted, journal=journal, reporter=job.reporter)
    task.finish()
    return set(task.parameters()), history.losses


def _write_folder(
    job: _Job, checkpoint: Checkpoint, sparse: nn.Module, plan: Plan, trained: set[str], facts: dict[str, Any],
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
    entry = {"quant_method": "ditcompress", "version": 1, "recipe": f"moe {job.name}", "schemes": {}, "layers": {},
             "experts": {path: spec.to_json() for path, spec in plan.specs.items()},
             "routed": {path: part.model_dump(mode="json") for path, part in plan.routed.items()}}  # fmt: skip
    text = json.dumps({**checkpoint.config, "quantization_config": entry}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")
    (partial / REPORT).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
    if checkpoint.pipeline:
        copy_pipeline(checkpoint.pipeline, partial, checkpoint.component)
    elif checkpoint.scheduler_folder:
        copy_scheduler(checkpoint.scheduler_folder, partial)
    (partial / "README.md").write_text(card(job.path.name, checkpoint.class_name, facts), encoding="utf-8")


def _dtype_inside(checkpoint: Checkpoint, path: str) -> torch.dtype:
    """The dtype of the dense feed-forward's largest tensor."""
    found = [entry for name, entry in checkpoint.tensors.items() if name.startswith(f"{path}.")]
    return max(found, key=lambda entry: entry.stop - entry.start).dtype


def moe_methods() -> list[str]:
    """Names of the methods."""
    return [name.replace("_", "-") for name in registry.names()]

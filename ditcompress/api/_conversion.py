"""The conversion behind `moe`, whatever holds the model: what becomes routed, its start, its training, its measures."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.collect import collect
from ..calibration.trajectory import Sampling
from ..checkpoint.reader import Checkpoint
from ..checkpoint.source import ModuleSource
from ..console import Reporter
from ..distill.data import Data, Trajectories
from ..distill.latents import Latents
from ..distill.noising import Noising
from ..distill.trainer import train
from ..errors import DitcompressError
from ..experts import ExpertLayer, convertible
from ..mixture import (
    ONE,
    Experts,
    Numbers,
    Weighed,
    Weights,
    begin_blocks,
    block_groups,
    convert,
    head_importance,
    measured,
    neuron_importance,
    neurons_of,
    prepared,
    running,
    seed_of,
    specs_for,
    stages_of,
    weighed_tokens,
)
from ..models.base import Layout
from ..routed import apply_routed, routable_attentions
from ..runtime.blocks import BlockRouter
from ..runtime.moe import Routed, routed_parts
from ..structure import writers
from ._experts import ExpertSettings, ExpertTraining, Plan, facts_of, trained_facts
from ._images import encoded, is_images
from ._training import Driven
from .calibration import cached_statistics, pick_device, settings_of

Losses = Mapping[str, Sequence[float]]  # of every step, by the stage of the training
CALIBRATION_BATCH = 8  # images at a time: more forward passes, so more of the reservoir's tokens differ
PROBE_SIZE, IMPORTANCE_SIZE = 32, 8  # states of a batch
DRAWS = 4  # at most, of one trajectory for weighed tokens, while there are fewer than 128


@dataclass(frozen=True)
class Job:
    """What was asked for; `path` and `out` are None for a model in memory."""

    path: Path | None
    out: Path | None
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
    def stages(self) -> tuple[float, ...]:
        """Shares of the steps of the training's stages; none for one whose parts do not learn."""
        wanted = self.settings.training
        own: tuple[float, ...] = getattr(self.method, "STAGES", ONE)
        shares = own if wanted.stages is None else wanted.stages
        return shares if wanted.shared else (0.0, *shares[1:])

    @property
    def name(self) -> str:
        """Of the method."""
        return self.method.__name__.rpartition(".")[2].replace("_", "-")


def plan_of(
    model: nn.Module, layout: Layout, method: ModuleType, params: Any, settings: ExpertSettings, numbers: Numbers,
    blocks_active: float | None, importance: Mapping[str, Tensor],
) -> Plan:  # fmt: skip
    """What the method makes of a model; without `importance` heads are taken in their order."""
    specs: dict[str, ExpertLayer] = {}
    if hasattr(method, "layers"):
        specs = method.layers(neurons_of(model, layout), numbers, params)
    elif hasattr(method, "split"):
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


def states(job: Job, by: Driven, offset: int, images: int) -> Trajectories:
    """States of the dense model's trajectories under noise of their own."""
    wanted = job.settings.training
    sampling = Sampling(wanted.sample_steps, by.guidance, job.seed + offset, batch=16)
    return Trajectories(
        by.model, by.adapter, by.config, by.scheduler, by.conditions, sampling, images=images, refresh=wanted.refresh,
        null=wanted.null,
    )  # fmt: skip


def converted(
    job: Job, source: Checkpoint | ModuleSource, layout: Layout, by: Driven, journal: Path | None
) -> tuple[nn.Module, Plan, set[str], Losses]:
    """The model with its routed parts, these, the names of its trained tensors, and the losses of the training."""
    axes, needs = convertible(by.model, layout), job.method.NEEDS
    tokens: dict[str, Tensor] = {}
    if "tokens" in needs:
        settings = settings_of(job.settings.calibration, job.seed, grams=False, batch=CALIBRATION_BATCH)
        found = (
            collect(
                by.model, by.adapter, by.config, layout, by.scheduler, by.conditions, settings, reporter=job.reporter
            )
            if isinstance(source, ModuleSource)
            else cached_statistics(
                source, settings, job.conditions, job.scheduler, job.device, job.dtype, job.reporter, job.restart
            )
        ).inputs
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
            importance |= score(
                by.model, layout, wanted, states(job, by, 15_485_863, images=32), batches=job.settings.scoring,
                size=IMPORTANCE_SIZE, seed=job.seed,
            )  # fmt: skip
    plan = plan_of(by.model, layout, job.method, job.params, job.settings, job.numbers, job.blocks_active, importance)
    weighed = _weighed(job, layout, by, axes) if "weighed" in needs else {}
    ready: dict[str, Any] = {}
    if weighed:
        tokens = {path: found.tokens for path, found in weighed.items()}
        specs, ready = prepared(
            by.model, layout, plan.specs, job.method, job.params, weighed, seed=job.seed, reporter=job.reporter
        )
        plan = replace(plan, specs=specs)
    parts = convert(
        by.model, layout, plan.specs, job.method, job.params, tokens, importance, measured=ready, seed=job.seed,
        weights={path: found.weights for path, found in weighed.items()}, reporter=job.reporter,
    )  # fmt: skip
    sparse = copy.deepcopy(by.model)
    _begun(job, apply_routed(sparse, plan.routed))
    for path, part in parts.items():
        sparse.set_submodule(path, part)
    trained, losses = _distilled(job, source, layout, by, sparse, plan, journal) if job.distill else (set(), {})
    return sparse, plan, trained, losses


def _weighed(job: Job, layout: Layout, by: Driven, axes: Mapping[str, str]) -> dict[str, Weighed]:
    """Tokens of every feed-forward and what errors cost there."""
    remedy = "give --scheduler FOLDER with one that has them, or --method moe-best"
    influence = Noising(by.scheduler, by.adapter, by.config, remedy).clean_weights
    images = min(128, -(-job.params.states // DRAWS))
    return weighed_tokens(
        by.model, layout, axes, states(job, by, 32_452_843, images=images), influence,
        states=job.params.states, size=PROBE_SIZE, tokens=job.params.tokens, seed=job.seed,
    )  # fmt: skip


@torch.no_grad()
def _begun(job: Job, parts: Mapping[str, Routed]) -> None:
    """Start the routers of attentions and blocks."""
    for path, part in parts.items():
        generator = torch.Generator().manual_seed(seed_of(job.seed, path))
        if isinstance(part, BlockRouter):
            begin_blocks(part, generator)
        else:
            job.method.begin(part, job.params, generator)


def _distilled(
    job: Job,
    source: Checkpoint | ModuleSource,
    layout: Layout,
    by: Driven,
    sparse: nn.Module,
    plan: Plan,
    journal: Path | None,
) -> tuple[set[str], Losses]:
    """Train the routed parts of `sparse` in place, stage by stage, each with a state of its own in `journal`; the names
    of the trained tensors and the losses."""
    wanted = job.settings.training
    data: Data = states(job, by, 7919, images=wanted.images)
    if job.data is not None:
        device = pick_device(job.device)
        folder = job.data
        if is_images(folder):
            if isinstance(source, ModuleSource):
                raise DitcompressError("E205", folder, "images need the pipeline's VAE", "give cached latents")
            folder = encoded(folder, source, by.adapter, device, job.reporter)
        data = Latents(folder, by.adapter, by.config, by.scheduler, seed=job.seed, null=wanted.null, device=device)
    weights = weights_of(wanted, job.method)
    clean = None
    if wanted.clean:
        clean = Noising(by.scheduler, by.adapter, by.config, "leave out training.clean").clean_weights
    trained: set[str] = set()
    losses: dict[str, tuple[float, ...]] = {}
    for stage in stages_of(job.stages, wanted.steps):
        place = _place(journal, stage.name)
        with torch.random.fork_rng(devices=[]), running(routed_parts(sparse), stage.name):
            torch.manual_seed(job.seed)
            task = Experts(
                by.model, sparse, layout, data, weights, wanted.batch, plan.routed, stage.name, stage.start, clean
            )  # fmt: skip
            own = wanted.model_copy(update={"steps": stage.steps})
            losses[stage.name] = train(task, own, journal=place, reporter=job.reporter).losses
            task.finish()
        trained |= set(task.parameters())
    return trained, losses


def weights_of(wanted: ExpertTraining, method: ModuleType) -> Weights:
    """What the losses of a training weigh."""
    over: Any = wanted.balance_over or getattr(method, "BALANCE_OVER", "mean")
    return Weights(
        output=wanted.output, features=wanted.features, clean=wanted.clean, balance=wanted.balance,
        router_rate=wanted.router_rate, shared=wanted.shared, balance_over=over, prior=wanted.prior, task=wanted.task,
        everything=wanted.everything,
    )  # fmt: skip


def _place(journal: Path | None, stage: str) -> Path | None:
    """The folder of a stage's states; the last stage's is the journal itself."""
    if journal is None or stage == "all":
        return journal
    (journal / stage).mkdir(exist_ok=True)
    return journal / stage


def measured_facts(
    job: Job, layout: Layout, by: Driven, sparse: nn.Module, plan: Plan, losses: Losses, left: list[str]
) -> dict[str, Any]:
    """What moe.json holds, measured on states under noise of their own."""
    probe = states(job, by, 104_729, images=32)
    batches = [probe.batch(n, PROBE_SIZE) for n in range(job.settings.probe)]
    sqnr, use, routing = measured(by.model, sparse, by.adapter, batches)
    facts = {**facts_of(by.model, sparse, layout, plan, job.name, sqnr, use, routing, left), "seed": job.seed,
             "states": len(batches) * PROBE_SIZE, "conditions": by.conditions.source}  # fmt: skip
    if losses:
        facts["distilled"] = trained_facts(losses)
    return facts


def entry_of(job: Job, plan: Plan) -> dict[str, Any]:
    """The `quantization_config` of the result."""
    return {"quant_method": "ditcompress", "version": 1, "recipe": f"moe {job.name}", "schemes": {}, "layers": {},
            "experts": {path: spec.to_json() for path, spec in plan.specs.items()},
            "routed": {path: part.model_dump(mode="json") for path, part in plan.routed.items()}}  # fmt: skip

"""distill: train a smaller model to imitate the one it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import print_table, print_text
from . import common
from .common import Conditions, Debug, Device, DryRun, Json, Overwrite, Quiet, Restart, Scheduler, Seed

if TYPE_CHECKING:
    from ..api import DistillResult

Loss = Annotated[str, typer.Option(help="Weights: output, clean, task, features, normalised, masked, direction.")]
Data = Annotated[str, typer.Option(help="trajectories (no data needed), a folder of cached latents, or images.")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="Recompute blocks: less memory, more time.")]
Autocast = Annotated[str, typer.Option(help="float32, or bfloat16: teacher and autocast; weights stay float32.")]


def distill(
    teacher: Annotated[Path, typer.Argument(help="The model that is imitated: a model or pipeline folder.")],
    student: Annotated[Path, typer.Argument(help="A smaller model of its class, for example made by `prune`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the trained student.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Samples of a step and part, of all processes together.")] = 32,
    accumulate: Annotated[int, typer.Option(help="Parts of a step, one after another.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="AdamW's, at its highest.")] = 1e-4,
    schedule: Annotated[str, typer.Option(help="cosine or constant, after a warm-up.")] = "cosine",
    loss: Loss = "output=1",
    decay_features: Annotated[bool, typer.Option("--decay-features", help="Losses of blocks fall to 0.")] = False,
    data: Data = "trajectories",
    lora: Annotated[int, typer.Option(help="Rank of adapters that are merged at the end (0: train all weights).")] = 0,
    ema: Annotated[float, typer.Option(help="Decay of the moving average that is kept (0: none).")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="adamw, or adamw8bit of bitsandbytes.")] = "adamw",
    checkpointing: Checkpointing = False,
    images: Annotated[int, typer.Option(help="Trajectories in use at a time.")] = 128,
    sample_steps: Annotated[int, typer.Option(help="Sampling steps of a trajectory.")] = 25,
    refresh: Annotated[int, typer.Option(help="Training steps until new trajectories are made.")] = 500,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of trajectories (default: usual).")] = None,
    null: Annotated[float, typer.Option(help="Share of samples whose condition is dropped.")] = 0.15,
    save_every: Annotated[int, typer.Option(help="Steps between the states that a killed run goes on from.")] = 200,
    conditions: Conditions = None,
    scheduler: Scheduler = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Autocast = "float32",
    restart: Restart = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a smaller model to predict what its teacher predicts. The result loads as the student did.

    A killed run goes on when it is called again. Cached latents are .safetensors shards with `latents` (n, ...) and
    the model's forward arguments (n, ...). Several processes: `accelerate launch --no_python ditcompress distill ...`.
    """
    with common.command(as_json, debug):
        from .. import api

        result = api.distill(
            teacher, student, out, steps=steps, batch=batch, accumulate=accumulate, learning_rate=learning_rate,
            schedule=schedule, loss=loss, decay_features=decay_features, data=data, lora=lora, ema=ema,
            weight_decay=weight_decay, optimizer=optimizer, checkpointing=checkpointing, images=images,
            sample_steps=sample_steps, refresh=refresh, guidance=guidance, null=null, save_every=save_every,
            conditions=conditions, scheduler=scheduler, seed=seed, device=device, dtype=dtype, overwrite=overwrite,
            restart=restart, dry_run=dry_run, reporter=common.reporter(quiet, as_json),
        )  # fmt: skip
        facts: dict[str, Any] = {"path": None if result.path is None else str(result.path), **result.facts}
        common.emit(as_json, facts, lambda: _show(result))


def _show(result: DistillResult) -> None:
    facts = result.facts
    if result.path is None:
        print_table("would train", ["option", "value"], [*facts["options"].items()])
        print_table("blocks", ["student", "teacher"], facts["blocks"])
        return
    rows = [[name, f"{value:.4g}", f"{facts['after'][name]:.4g}"] for name, value in facts["before"].items()]
    print_table("relative losses on held-out states", ["loss", "before", "after"], rows)
    losses = result.history.losses
    last = sum(losses[-20:]) / len(losses[-20:])
    print_text(f"{len(losses)} steps, training loss {losses[0]:.4g} -> {last:.4g}; written to {result.path}")

"""q_sched: a compressed folder written again with searched scheduler coefficients."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..calibration.schedulers import load_scheduler
from ..calibration.trajectory import prepare
from ..checkpoint.manifest import NAME as MANIFEST
from ..checkpoint.manifest import read_manifest, verify_manifest
from ..checkpoint.writer import copy_result, output_folder
from ..console import Reporter, Silent
from ..errors import DitcompressError
from ..evaluation.q_sched import FALLBACK, METHODS, Found, Judge, Search, search_both, verdict
from ..evaluation.settings import EvaluateSettings
from ..evaluation.subject import Subject, open_subject
from ..ranks import alone
from ..recipe import Recipe
from ..registry import nearest
from ..runtime.coefficients import CLASSES, MODEL, SAMPLE, with_coefficients, without_coefficients
from .calibration import pick_device, pick_dtype, read_prompts

REPORT = "q_sched.json"
SEED_OFFSET = 500_009


def q_sched(
    original: str | Path,
    compressed: str | Path,
    out: str | Path,
    *,
    steps: int,
    method: str = "trajectory",
    images: int = 32,
    held_out: int = 128,
    guidance: float | None = None,
    low: float = 0.8,
    high: float = 1.2,
    compatibility: str = "",
    quality: str = "",
    prompts: str | Path | None = None,
    conditions: str | Path | None = None,
    seed: int = 0,
    batch: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write `compressed` to `out` with coefficients for `steps` sampling steps in its scheduler, and q_sched.json.

    Where the gain on held-out images cannot be told from 0 the scheduler stays plain, which is all ones. Returns what
    q_sched.json holds. E203 for options out of range, E332 for a scheduler that takes no coefficients.
    """
    alone("q-sched")
    search = Search(method, images, held_out, low, high, compatibility, quality)
    _check(search, steps)
    if not Path(compressed).is_dir():
        raise DitcompressError("E302", compressed, "is no folder", "give the folder that `quantize` wrote")
    settings = search_settings(search, steps, guidance, seed, batch, device, dtype)
    if dry_run:
        return {**asdict(search), "steps": steps, "out": str(out)}
    return _run(Path(original), Path(compressed), Path(out), settings, search, prompts, conditions, overwrite, reporter)


def search_settings(
    search: Search, steps: int, guidance: float | None, seed: int, batch: int, device: str, dtype: str
) -> EvaluateSettings:
    """Noise of its own: neither that of calibration nor that of `evaluate`."""
    count = search.images + search.held_out
    return EvaluateSettings(
        pairs=count, images=count, inputs=count, steps=steps, guidance=guidance, seed=SEED_OFFSET + seed, batch=batch,
        dtype=str(pick_dtype(dtype)).removeprefix("torch."), device=str(pick_device(device)),
    )  # fmt: skip


def _check(search: Search, steps: int) -> None:
    """E203 for values out of range."""
    if search.method not in METHODS:
        raise DitcompressError(
            "E203", f"--method {search.method}", "is not known", nearest(search.method, list(METHODS))
        )
    limits = {"--steps": (steps, 1, 1000), "--images": (search.images, 1, 100_000),
              "--held-out": (search.held_out, 2, 100_000), "--low": (search.low, 0.3, 1.0),
              "--high": (search.high, 1.0, 2.0)}  # fmt: skip
    for option, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise DitcompressError("E203", f"{option} {value}", "is out of range", f"give {least} to {most}")
    if search.low == search.high:
        raise DitcompressError("E203", "--low", "is the same as --high", "give a range around 1")


def _run(
    original: Path,
    compressed: Path,
    out: Path,
    settings: EvaluateSettings,
    search: Search,
    prompts: str | Path | None,
    conditions: str | Path | None,
    overwrite: bool,
    reporter: Reporter | None,
) -> dict[str, Any]:
    reporter = reporter or Silent()
    size = sum(file.stat().st_size for file in compressed.rglob("*") if file.is_file())
    marks: dict[str, Any] = {}
    with output_folder(
        out, overwrite=overwrite, inputs=[original, compressed], planned_bytes=size, manifest=marks
    ) as partial:
        if (compressed / MANIFEST).is_file():
            verify_manifest(compressed)
            marks.update({k: v for k, v in read_manifest(compressed).items() if k not in ("files", "tool", "version")})
        copy_result(compressed, partial)
        facts = tune(original, compressed, partial, settings, search, prompts, conditions, reporter)
        marks["q_sched"] = {key: facts[key] for key in ("method", "steps", "kept", MODEL, SAMPLE)}
    return {"out": str(out), **facts}


def tune(
    original: Path,
    compressed: Path,
    target: Path,
    settings: EvaluateSettings,
    search: Search,
    prompts: str | Path | None,
    conditions: str | Path | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Search, judge, and write the scheduler and q_sched.json into the folder `target`; what q_sched.json holds."""
    subject = open_subject(
        original, compressed, settings, conditions=Path(conditions) if conditions else None,
        prompts=read_prompts(prompts), reporter=reporter,
    )  # fmt: skip
    subject = replace(subject, scheduler=_scheduler(subject))
    judge = Judge(subject, search)
    found, control = search_both(judge, reporter)
    kept, reason = verdict(judge, found)
    reporter.note(reason)
    facts = _facts(subject, search, judge, found, control, kept, reason)
    tuned = with_coefficients(subject.scheduler, found.model, found.sample) if kept else subject.scheduler
    _write_scheduler(tuned, target / "scheduler")
    (target / REPORT).write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    subject.source.verify_unchanged()
    subject.result.verify_unchanged()
    return facts


def _scheduler(subject: Subject) -> Any:
    """The scheduler that ships with the compressed model, else the original's, without earlier coefficients."""
    folder = subject.result.scheduler_folder
    own = load_scheduler(subject.config, folder, subject.adapter, Silent()) if folder else subject.scheduler
    plain = without_coefficients(own)
    name = type(plain).__name__
    if name not in CLASSES:
        raise DitcompressError("E332", name, "takes no coefficients", f"use {CLASSES[0]} or {CLASSES[4]}")
    made = len(prepare(plain, subject.settings.steps, subject.adapter, subject.config).timesteps)
    if made != subject.settings.steps:
        what = f"the scheduler makes {made} of them"
        raise DitcompressError("E203", f"--steps {subject.settings.steps}", what, "choose another number")
    return plain


def _write_scheduler(scheduler: Any, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "scheduler_config.json").write_text(scheduler.to_json_string())


def _facts(
    subject: Subject, search: Search, judge: Judge, found: Found, control: Found, kept: bool, reason: str
) -> dict[str, Any]:
    """All of q_sched.json."""
    ones, steps = [1.0] * judge.steps, judge.steps
    sampler = prepare(subject.scheduler, steps, subject.adapter, subject.config)
    seen, count = search.images, search.images + search.held_out
    hashes = [subject.conditions.take([i]).digest for i in range(count)]
    return {
        "method": search.method,
        "scheduler": type(subject.scheduler).__name__,
        "steps": steps,
        "guidance": subject.guidance,
        "seed": subject.settings.seed,
        "timesteps": [float(time) for time in sampler.timesteps],
        "sigmas": _sigmas(sampler),
        "kept": kept,
        "reason": reason,
        MODEL: found.model if kept else ones,
        SAMPLE: found.sample if kept else ones,
        "score": "TC + 2 IQ (JAQ)" if judge.metrics else FALLBACK,
        "metrics": {"tc": search.compatibility, "iq": search.quality},
        "images_are": subject.images_kind or "the model's own",
        "compressed": asdict(found),
        "control": {"model_is": "the original in place of the compressed model", **asdict(control)},
        "conditions": subject.conditions.source,
        "condition_hashes": {"search": hashes[:seen], "held_out": hashes[seen:]},
        "shared_conditions": len({*hashes[:seen]} & {*hashes[seen:]}),  # noise is never shared
        "models": {"original": subject.source.fingerprint, "compressed": subject.result.fingerprint},
        "torch": torch.__version__,
    }


def _sigmas(sampler: Any) -> list[float]:
    """Noise levels of the steps: the scheduler's own, else sqrt((1 - abar) / abar) at its timesteps."""
    if getattr(sampler, "sigmas", None) is not None and len(sampler.sigmas) <= len(sampler.timesteps) + 1:
        return [float(value) for value in sampler.sigmas]
    kept = sampler.alphas_cumprod[sampler.timesteps.long().cpu()]
    return [float(value) for value in ((1 - kept) / kept).sqrt()]


def search_scheduler(
    path: Path, partial: Path, recipe: Recipe, conditions: str | Path | None, seed: int, device: str, dtype: str,
    reporter: Reporter,
) -> None:  # fmt: skip
    """What the recipe's `scheduler_search` asks for, on the model just written."""
    wanted = recipe.scheduler_search
    if wanted is not None:
        search = Search(wanted.method, wanted.images, wanted.held_out)
        settings = search_settings(search, wanted.steps, wanted.guidance, seed, 0, device, dtype)
        tune(path, partial, partial, settings, search, None, conditions, reporter)

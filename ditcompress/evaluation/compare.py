"""The comparison of two models: runs the tiers in order and puts their findings into one result."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..console import Reporter, Silent
from ..result import Result, Skipped
from . import accuracy, cost, denoiser, integrity, layers, paired
from .settings import EvaluateSettings
from .subject import Subject, open_subject
from .verdict import decide, margins_of


@dataclass(frozen=True)
class Evaluation:
    """The result, and the image pairs that the report shows: {"random": [(index, original, compressed)], ...}."""

    result: Result
    images: dict[str, list[tuple[int, Tensor, Tensor]]]


def evaluate(
    original: Path,
    compressed: Path,
    settings: EvaluateSettings | None = None,
    *,
    scheduler: Path | None = None,
    conditions: Path | None = None,
    prompts: list[str] | None = None,
    work: Path | None = None,
    command: str = "",
    reporter: Reporter | None = None,
) -> Evaluation:
    """Compare `compressed` with `original`. Raises E340 where they are not versions of one model, E203 for a profile or
    margin that is not known; a metric that cannot run is listed as skipped with its reason."""
    settings, reporter = settings or EvaluateSettings(), reporter or Silent()
    subject = open_subject(
        original, compressed, settings, scheduler=scheduler, conditions=conditions, prompts=prompts, reporter=reporter
    )
    profile = ("fidelity" if subject.pixels else "fidelity-latent") if settings.profile == "auto" else settings.profile
    margins = margins_of(profile, settings.margins)
    found_layers = layers.compare_layers(subject)
    probes = denoiser.probe(subject, reporter)
    pairs = paired.make_pairs(subject, work, reporter)
    values = paired.per_pair(pairs)
    rows = denoiser.measurements(probes, settings.seed)
    rows += paired.measurements(pairs, values, "" if subject.pixels else "latents, not images")
    skipped, extra = _class_rows(subject, pairs, rows)
    finite = bool(np.isfinite(pairs.compressed.numpy()).all()) and all(
        np.isfinite(p.noise).all() for p in probes.values()
    )
    found_checks = integrity.checks(subject, found_layers, finite)
    verdict, rows = decide(rows, margins, integrity.broken(found_checks))
    result = Result(
        verdict=verdict,
        profile=profile,
        measurements=rows,
        sizes=cost.sizes(subject, found_layers),
        integrity=integrity.to_json(found_checks),
        layers=[asdict(layer) for layer in found_layers],
        timesteps=denoiser.curve(probes),
        pairs={**paired.summary(values, subject.conditions), **extra},
        speed=cost.speed(subject),
        skipped=skipped,
        provenance=provenance(subject, command),
        remarks=remarks(subject),
    )
    return Evaluation(result, shown_images(pairs, values["psnr"], settings))


def _class_rows(subject: Subject, pairs: paired.Pairs, rows: list[Any]) -> tuple[list[Skipped], dict[str, Any]]:
    """Adds the accuracy rows to `rows`; what was skipped, and the per-class table."""
    skipped = [
        Skipped("distribution metrics (Fréchet distance, MMD, recall)", "not part of this release"),
        Skipped("external metrics (Inception FID, LPIPS, CLIPScore)", "not part of this release"),
    ]
    found = accuracy.find_classifier(subject)
    if found is None or subject.conditions.labels is None:
        skipped.insert(0, Skipped("class accuracy", "no classifier for this model: give --classifier module:function"))
        return skipped, {}
    classifier, name = found
    rows += accuracy.measurements(subject, pairs, classifier, name)
    return skipped, {"per_class": accuracy.per_class(subject, pairs, classifier)}


def shown_images(pairs: paired.Pairs, psnr: np.ndarray, settings: EvaluateSettings) -> dict[str, list[Any]]:
    """Seeded-random and worst pairs."""
    chosen = paired.chosen_images(pairs, psnr, settings.shown, settings.seed)
    return {
        kind: [(index, pairs.original[index], pairs.compressed[index]) for index in indices]
        for kind, indices in chosen.items()
    }


def remarks(subject: Subject) -> list[str]:
    """Sentences that must stand beside the numbers."""
    notes = [f"conditions: {subject.conditions.source}"]
    if not subject.pixels:
        notes.append("paired figures are of latents: no absolute PSNR is gated for latent models")
    return notes


def provenance(subject: Subject, command: str) -> dict[str, Any]:
    """Everything needed to repeat the run; no paths outside the two names given."""
    import diffusers

    settings = asdict(subject.settings)
    return {
        "command": command,
        "original": {"name": subject.source.path.name, "fingerprint": subject.source.fingerprint},
        "compressed": {"name": subject.result.path.name, "fingerprint": subject.result.fingerprint},
        "model_class": subject.source.class_name,
        "recipe": (subject.result.quantization or {}).get("recipe", ""),
        "scheduler": {"class": type(subject.scheduler).__name__, "config": scheduler_config(subject.scheduler)},
        "guidance": subject.guidance,
        "settings": {**settings, "margins": dict(subject.settings.margins)},
        "threads": torch.get_num_threads(),
        "versions": {
            "ditcompress": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "machine": platform.machine(),
    }


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """The scheduler's settings that are plain JSON values."""
    return {
        key: value
        for key, value in dict(scheduler.config).items()
        if not key.startswith("_") and isinstance(value, (str, int, float, bool, type(None)))
    }

"""The comparison of two models: runs the tiers in order and puts their findings into one result."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__, bnb
from ..console import Reporter, Silent
from ..ranks import ALONE, Ranks
from ..result import Measurement, Result
from . import cost, denoiser, integrity, latency, layers, paired
from .quality import Findings, Sources, find_tools, measure_quality
from .sampling import image_sets
from .settings import EvaluateSettings
from .subject import Subject, open_subject
from .verdict import decide, margins_of, missing_gates, moved


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
    sources: Sources | None = None,
    work: Path | None = None,
    command: str = "",
    reporter: Reporter | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation | None:
    """Compare `compressed` with `original`. Raises E340 where they are not versions of one model, E203 for a profile or
    margin that is not known; a metric that cannot run is listed as skipped with its reason.

    Images are kept in `work`, so that an interrupted run continues; without it they live in a temporary folder. Of
    several processes the first one has the result; the others help with what is sampled and give None.
    """
    settings, reporter = settings or EvaluateSettings(), reporter or Silent()
    with ranks.together():
        subject = open_subject(
            original, compressed, settings, scheduler=scheduler, conditions=conditions, prompts=prompts,
            reporter=reporter,
        )  # fmt: skip
    if not ranks.first:
        _help(subject, ranks)
        return None
    place: AbstractContextManager[Any] = tempfile.TemporaryDirectory() if work is None else nullcontext(work)
    with place as folder:
        return judge(subject, Path(folder), sources or Sources(), command=command, reporter=reporter, ranks=ranks)


def _help(subject: Subject, ranks: Ranks) -> None:
    """What `judge` shares, in its order."""
    ranks.agree(None)
    denoiser.probe(subject, Silent(), ranks)
    count = ranks.agree(0)
    image_sets(subject, Path(), count, subject.settings.fresh, Silent(), ranks)
    ranks.agree(None)
    ranks.leave()


def named_profile(settings: EvaluateSettings, pixels: bool) -> str:
    return settings.profile if settings.profile != "auto" else "fidelity" if pixels else "fidelity-latent"


def judge(
    subject: Subject, folder: Path, sources: Sources, *, command: str, reporter: Reporter, ranks: Ranks = ALONE
) -> Evaluation:
    """All tiers on two loaded models; images go to `folder`. Other processes `_help` to sample, then go."""
    settings = subject.settings
    profile = named_profile(settings, subject.pixels)
    margins = margins_of(profile, settings.margins)
    fresh = integrity.fresh_processes(subject) if settings.fresh_process else {}
    found_layers = layers.compare_layers(subject)
    ranks.agree(None)
    probes = denoiser.probe(subject, reporter, ranks)
    tools = find_tools(subject, sources, reporter)
    count = max(settings.pairs, settings.image_count if tools.extractor is not None else 0)
    ranks.agree(count)
    sets = image_sets(subject, folder, count, settings.fresh, reporter, ranks)
    ranks.agree(None)
    ranks.leave()
    peak = paired.data_range(sets["original"], subject.makes_images)
    pairs = paired.Pairs(sets["original"], sets["compressed"], peak, settings.pairs)
    values = paired.compare_pairs(pairs)
    rows = denoiser.measurements(probes, settings.seed) + paired.measurements(values, subject.images_kind)
    quality = measure_quality(subject, sets, tools, sources, reporter)
    rows += quality.rows
    finite = values.finite and all(np.isfinite(p.noise).all() for p in probes.values())
    checks = integrity.checks(subject, found_layers, finite, denoiser.off_by_one(probes), fresh)
    verdict, rows = decide(rows, margins, integrity.broken(checks))
    result = Result(
        verdict=verdict,
        profile=profile,
        measurements=rows,
        sizes=cost.sizes(subject, found_layers, fresh),
        integrity=integrity.to_json(checks),
        layers=[asdict(layer) for layer in found_layers],
        timesteps=denoiser.curve(probes),
        pairs={**paired.summary(values.values, subject.conditions), **quality.extra},
        speed=latency.speed(subject),
        skipped=quality.skipped,
        provenance=provenance(subject, command, quality),
        remarks=remarks(subject, rows, missing_gates(rows, margins)),
        history=history(subject.result.folder),
    )
    return Evaluation(result, paired.shown_images(subject, pairs, values.values["psnr"]))


def remarks(subject: Subject, rows: Sequence[Measurement], missing: Sequence[str]) -> list[str]:
    """Sentences that must stand beside the numbers."""
    notes = [f"conditions: {subject.conditions.source}"]
    if not subject.pixels:
        notes.append("no absolute PSNR is gated for latent models")
    if missing:
        notes.append(f"gated but not measured: {', '.join(missing)}")
    if bnb.used(subject.result.config):
        notes.append("bitsandbytes weights were decoded for this run: memory and times are not those of bitsandbytes")
    notes += filter(None, [moved(rows)])
    return notes


def history(folder: Path) -> dict[str, Any]:
    """What prune.json and distill.json say of the model, in short; whatever is no such file is left out."""
    found: dict[str, Any] = {}
    for stage, keys in _HISTORY.items():
        try:
            facts = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))
            found[stage] = {key: facts[key] for key in keys}
        except (OSError, ValueError, TypeError, KeyError):
            continue
    if "distill" in found:
        found["distill"]["losses"] = _thinned([float(x) for x in found["distill"]["losses"]])
    return found


_HISTORY = {
    "prune": ("method", "ratio", "by", "removed", "kept", "scores", "output_sqnr_db", "width"),
    "distill": ("losses", "before", "after", "options"),
}


def _thinned(losses: Sequence[float], most: int = 400) -> list[list[float]]:
    """At most `most` points (step, mean loss since the last point)."""
    each = max(1, -(-len(losses) // most))
    parts = [losses[start : start + each] for start in range(0, len(losses), each)]
    return [[min((i + 1) * each, len(losses)), sum(part) / len(part)] for i, part in enumerate(parts)]


def provenance(subject: Subject, command: str, quality: Findings) -> dict[str, Any]:
    """Everything needed to repeat the run; no paths outside the names given."""
    import diffusers

    return {
        "command": command,
        "original": {"name": subject.source.path.name, "fingerprint": subject.source.fingerprint},
        "compressed": {"name": subject.result.path.name, "fingerprint": subject.result.fingerprint},
        "model_class": subject.source.class_name,
        "recipe": bnb.recipe_name(subject.result.config),
        "scheduler": {"class": type(subject.scheduler).__name__, "config": scheduler_config(subject.scheduler)},
        "guidance": subject.guidance,
        "conditions": {"source": subject.conditions.source, "sha256": subject.conditions.digest},
        "batch": subject.sampling().batch,
        "settings": subject.settings.to_json(),
        **quality.provenance,
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

"""compare: several evaluations of one original in one table and one plot; sample: images of one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.writer import output_folder, remove_work, work_folder
from ..console import Reporter, Silent
from ..errors import DitcompressError
from ..evaluation import layouts
from ..evaluation.sampling import sample_set
from ..evaluation.settings import EvaluateSettings
from ..evaluation.subject import open_single
from ..ranks import alone
from .calibration import pick_device, pick_dtype, read_prompts


def compare(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    x: str = "size",
    y: str = "psnr",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Table and Pareto front of report folders; with `out` also compare.html and compare.json there.

    E342 where the runs differ in original, noise, sampler or number of images: such numbers cannot be compared.
    """
    if len(runs) < 2:
        raise DitcompressError("E203", "RUN", "one run cannot be compared", "give two or more report folders")
    folders = [Path(run) for run in runs]
    from ..report.html import read_report  # matplotlib: not for other commands
    from ..report.runs import Run, compare_facts, render_runs, run_names

    results = [read_report(folder)[0] for folder in folders]
    names = run_names(folders, results)
    facts = compare_facts([Run(n, r) for n, r in zip(names, results, strict=True)], x, y)
    if out is not None:
        with output_folder(Path(out), overwrite=overwrite, inputs=folders) as partial:
            (partial / "compare.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")
            (partial / "compare.html").write_text(render_runs(facts), encoding="utf-8")
    return facts


def sample(
    checkpoint: str | Path,
    out: str | Path,
    *,
    count: int = 64,
    layout: str = "images",
    per_prompt: int = 1,
    steps: int = 25,
    guidance: float | None = None,
    prompts: str | Path | None = None,
    conditions: str | Path | None = None,
    scheduler: str | Path | None = None,
    seed: int = 0,
    batch: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    restart: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Images of a checkpoint in the layout that an evaluator reads; the same seed gives the same noise to every model.

    An interrupted run keeps its finished images (`restart` forgets them). E205 for a model of latents without its VAE.
    """
    alone("sample")
    pick_dtype(dtype)
    settings = EvaluateSettings(
        steps=steps, guidance=guidance, seed=seed, batch=batch, dtype=dtype, device=str(pick_device(device))
    )
    writer, reporter = layouts.registry.get(layout), reporter or Silent()
    texts = read_prompts(prompts)
    with output_folder(Path(out), overwrite=overwrite, inputs=[Path(checkpoint)]) as partial:
        subject = open_single(
            Path(checkpoint), settings, count, scheduler=Path(scheduler) if scheduler else None,
            conditions=Path(conditions) if conditions else None,
            prompts=[p for p in texts for _ in range(per_prompt)], reporter=reporter,
        )  # fmt: skip
        if not subject.makes_images:
            raise DitcompressError(
                "E205", checkpoint, "makes latents and has no VAE", "give the pipeline folder with its vae/"
            )
        marks = {"model": subject.source.fingerprint, **settings.images_key(), "torch": torch.__version__,
                 "conditions": subject.conditions.digest, "scheduler": str(subject.scheduler.config)}  # fmt: skip
        work = work_folder(Path(out), marks, restart)
        images = sample_set(subject, work, count, reporter)
        labels = subject.conditions.labels
        facts = writer.write(
            partial, images, subject.conditions.texts(count), None if labels is None else labels.tolist(), per_prompt,
            seed=seed,
        )  # fmt: skip
    remove_work(work)
    return {"out": str(out), "layout": layout, "images": count, **facts}

"""Budgets for recipes with the step `mixed`: bits, bytes of the file, or dB of the output, and the check of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.reader import Checkpoint
from ..console import Reporter
from ..errors import DitcompressError
from ..evaluation.denoiser import probe
from ..evaluation.settings import EvaluateSettings
from ..evaluation.subject import open_subject
from ..measures import ratio_db
from ..models.base import Layout
from ..plan import Plan, StepSpec
from ..recipe import Recipe

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
INPUTS, TIMESTEPS = 64, 8  # of the verification pass


def parse_size(text: str) -> int:
    """Bytes of "6GB", "700 MB" or "123456"; E203 for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise DitcompressError("E203", f"--target-size {text}", "is not a size", "write for example 6GB or 700MB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def with_target(
    recipe: Recipe, checkpoint: Checkpoint, layout: Layout, plan: Plan, bits: float | None, size: str | None,
    db: float | None,
) -> Recipe:  # fmt: skip
    """The recipe with its budget replaced; E203 for two budgets at once, none to replace, or too small a file."""
    given = [name for name, value in (("bits", bits), ("size", size), ("db", db)) if value is not None]
    if not given:
        return recipe
    if len(given) > 1:
        raise DitcompressError("E203", f"--target-{given[0]}", f"stands beside --target-{given[1]}", "give one budget")
    if not any(step.name == "mixed" for decision in plan.layers for step in decision.steps):
        raise DitcompressError("E203", f"--target-{given[0]}", f"recipe {recipe.name} has no budget", "use recipe auto")
    if size is not None:
        bits = _bits_for(parse_size(size), size, checkpoint, layout, plan)
    for name, value, least, most in (("bits", bits, 1, 16), ("db", db, 0, 200)):
        if value is not None and not least < value <= most:
            raise DitcompressError(
                "E203", f"--target-{name}", f"{value:g} is not within {least} to {most}", "change it"
            )
    if db is None:
        return retarget(recipe, target_bits=bits, target_db=None, share=None)
    return retarget(recipe, target_db=db, share=None)


def retarget(recipe: Recipe, **params: Any) -> Recipe:
    """The recipe with these parameters in every step `mixed`."""
    rules = []
    for rule in recipe.rules:
        steps = [StepSpec(s.name, {**s.params, **params}) if s.name == "mixed" else s for s in rule.steps]
        rules.append(rule.model_copy(update={"steps": tuple(steps)}))
    return recipe.model_copy(update={"rules": tuple(rules)})


def _bits_for(most: int, said: str, checkpoint: Checkpoint, layout: Layout, plan: Plan) -> float:
    """Bits a planned weight may take so that the tensors of the whole file fit in `most` bytes."""
    planned = {f"{name}.weight" for name in plan.by_site()}
    entries = checkpoint.tensors
    rest = sum(e.stop - e.start for name, e in entries.items() if name not in planned)
    weights = sum(site.in_features * site.out_features for site in layout.sites if f"{site.name}.weight" in planned)
    headers = 512 * (len(planned) + 16)  # names and shapes in the safetensors header
    left = 8 * (most - rest - headers) / weights
    if left <= 1:
        raise DitcompressError(
            "E203", f"--target-size {said}", f"what stays as it is takes {(rest + headers) / 1e6:,.1f} MB",
            "give more, or quantize more layers",
        )  # fmt: skip
    return min(left, 16.0)


def measured_db(
    original: Path, compressed: Path, reporter: Reporter, *, scheduler: str | Path | None = None,
    conditions: str | Path | None = None, device: str = "cpu",
) -> float:  # fmt: skip
    """Output SQNR in dB on held-out inputs: the mean relative squared error of the prediction, over noise and time."""
    settings = EvaluateSettings(pairs=8, images=8, inputs=INPUTS, timesteps=TIMESTEPS, device=device)
    subject = open_subject(
        original, compressed, settings, scheduler=Path(scheduler) if scheduler else None,
        conditions=Path(conditions) if conditions else None, reporter=reporter,
    )  # fmt: skip
    found = probe(subject, reporter, brief=True)["cond"]
    return ratio_db(float(torch.as_tensor(found.noise / found.signal).mean()))

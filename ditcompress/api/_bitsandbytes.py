"""The bitsandbytes backend of `quantize`: which linears, then one tensor after the other into the writer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .. import bnb, engine
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import ShardWriter
from ..console import Reporter
from ..errors import DitcompressError
from ..models.base import Layout
from ..plan import LayerDecision, Plan


def settle(plan: Plan, layout: Layout, model: nn.Module) -> Plan:
    """The plan as diffusers can read it back: see `bnb.split`. E205 where a linear unknown to us would be taken."""
    spec = plan.layers[0].weight
    names, _ = bnb.split(model, plan.by_site())
    sites, decided = layout.by_name(), plan.by_site()
    if not names:
        raise DitcompressError("E205", "recipe", "diffusers keeps every planned linear in float32", "plan others")
    for name in names:
        if name not in sites:
            raise DitcompressError(
                "E205", name, "cannot be kept out of bitsandbytes", "choose a recipe of another kind"
            )
    forced = "diffusers cannot skip it by name"
    return Plan(
        tuple(
            decided.get(site.name) or LayerDecision(site.name, site.role, spec, reason=forced)
            for site in layout.sites
            if site.name in names
        )
    )


def run(
    checkpoint: Checkpoint, layout: Layout, model: nn.Module, plan: Plan, writer: ShardWriter, reporter: Reporter
) -> tuple[engine.Outcome, dict[str, Any]]:
    """Write every tensor; the records, and the `quantization_config` of config.json."""
    decided, sites = plan.by_site(), layout.by_name()
    records: dict[str, engine.LayerRecord] = {}
    misread: list[str] = []
    with reporter.task("quantize", len(checkpoint.tensors)) as advance:
        for name in sorted(checkpoint.tensors):
            site = name.removesuffix(".weight")
            tensor = checkpoint.read(name)
            if site in decided and site != name:
                stored, sqnr, right = bnb.encode(site, tensor, decided[site].weight.params)
                full = {f"{site}.{suffix}": value for suffix, value in stored.items()}
                _add(writer, full)
                records[site] = engine.record(sites[site], decided[site], full, "none", sqnr)
                misread += [] if right else [site]
            else:
                writer.add(name, tensor)
            advance(1)
    bnb.note_cpu(misread, reporter)
    ordered = tuple(records[site.name] for site in layout.sites if site.name in records)
    params = plan.layers[0].weight.params
    return engine.Outcome(ordered, {}), bnb.config_of(params, bnb.split(model, decided)[1])


def _add(writer: ShardWriter, tensors: Mapping[str, Any]) -> None:
    """One layer's tensors into one file: diffusers looks for the parts of a weight in the file it is in."""
    writer.keep_together(sum(t.numel() * t.element_size() for t in tensors.values()))
    for name in sorted(tensors):
        writer.add(name, tensors[name])

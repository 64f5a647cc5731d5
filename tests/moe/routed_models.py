"""Tiny models with routed attentions and blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditcompress import api
from ditcompress.loading import load_model
from ditcompress.models import registry as families
from ditcompress.routed import RoutedPart, apply_routed
from ditcompress.runtime.moe import Router
from tests.moe.test_command import FEW, predicted


def routed_model(family: str, kind: str, path: str, seed: int = 0, **fields: Any) -> tuple[nn.Module, nn.Module, Any]:
    """A tiny model in float64, its copy with one routed part whose routers are random, and this part."""
    model = families.get(family).tiny().double()
    other = copy.deepcopy(model)
    (part,) = apply_routed(other, {path: RoutedPart(kind=kind, **fields)}).values()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for module in other.modules():
        if isinstance(module, Router):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    return model, other, part


def both(family: str, dense: nn.Module, other: nn.Module, times: tuple[int, ...] = (3, 900, 400)) -> list[torch.Tensor]:
    """Predictions of two models for the same inputs, one sample for each timestep."""
    module, generator = families.get(family), torch.Generator().manual_seed(3)
    count = len(times)
    latents = torch.randn((count, *module.latent_shape(dense.config)), generator=generator, dtype=torch.float64)
    cond = module.random_conditions(dense.config, count, generator)
    with torch.no_grad():
        return [module.predict(m, latents, torch.tensor(times), cond) for m in (dense, other)]


def written(tiny_dit: Path, out: Path, method: str, *more: str, **options: Any) -> dict[str, Any]:
    """A converted checkpoint: both doors give the same model, and saving it again too."""
    from diffusers import DiTTransformer2DModel

    facts = api.moe(tiny_dit, out, method=method, overrides=(*FEW, *more), **options)
    theirs, (ours, _) = DiTTransformer2DModel.from_pretrained(out), load_model(out)
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    theirs.save_pretrained(out.with_name(f"{out.name}-again"))
    assert torch.equal(predicted(out), predicted(out.with_name(f"{out.name}-again")))
    return facts

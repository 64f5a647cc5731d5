"""Tiny models of every family with enough blocks to remove some, one input of each, and an independent bypass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditcompress import prune
from ditcompress.api import PruneResult
from ditcompress.loading import load_model
from ditcompress.models import registry
from ditcompress.models._inputs import built

DEPTHS: dict[str, dict[str, Any]] = {
    "dit": {"num_layers": 5},
    "flux": {"num_layers": 3, "num_single_layers": 4},
    "generic": {"num_layers": 4},
    "pixart": {"num_layers": 4},
    "qwen_image": {"num_layers": 4},
    "sd3": {"num_layers": 5, "dual_attention_layers": (0, 1, 3)},
}
REMOVED = {
    "dit": ["transformer_blocks.1", "transformer_blocks.3"],
    "flux": ["transformer_blocks.0", "single_transformer_blocks.1", "single_transformer_blocks.2"],
    "generic": ["transformer_blocks.0", "transformer_blocks.2"],
    "pixart": ["transformer_blocks.0", "transformer_blocks.3"],
    "qwen_image": ["transformer_blocks.0", "transformer_blocks.2"],
    "sd3": ["transformer_blocks.1", "transformer_blocks.2"],
}


def deep(name: str, seed: int = 0) -> nn.Module:
    """The family's tiny model with more blocks."""
    tiny = registry.get(name).tiny(seed)
    config = {key: value for key, value in tiny.config.items() if key[0] != "_"}
    extra = {key: config.pop(key) for key in ("sample_size",) if name in ("flux", "qwen_image")}
    model = built(type(tiny), {**config, **DEPTHS[name]}, seed)
    model.register_to_config(_class_name=type(tiny).__name__, **extra)  # type: ignore[operator]
    return model


def inputs(name: str, model: nn.Module) -> dict[str, Any]:
    """Latents, timesteps and conditions of two images."""
    family, generator = registry.get(name), torch.Generator().manual_seed(1)
    latents = torch.randn((2, *family.latent_shape(model.config)), generator=generator)
    return {"latents": latents, "cond": family.random_conditions(model.config, 2, generator)}


@torch.no_grad()
def run(name: str, model: nn.Module, given: dict[str, Any]) -> Tensor:
    return registry.get(name).predict(model, given["latents"], torch.tensor([400, 400]), given["cond"])


def bypassed(name: str, model: nn.Module, blocks: list[str]) -> nn.Module:
    """A copy in which the named blocks return what they were given, in their family's own order."""
    model = copy.deepcopy(model)

    def identity(hidden_states: Tensor, *_: Any, encoder_hidden_states: Any = None, **__: Any) -> Any:
        return (encoder_hidden_states, hidden_states) if name in ("flux", "qwen_image", "sd3") else hidden_states

    for block in blocks:
        model.get_submodule(block).forward = identity  # type: ignore[method-assign, assignment]
    return model


def same_everywhere(family: str, folder: Path, options: dict[str, Any]) -> tuple[nn.Module, PruneResult, nn.Module]:
    """Prune a model of `family` in memory and as a folder: the model stays as it was, and what is in memory, loaded,
    loaded by stock diffusers, and saved from memory gives the same outputs. The model, the result, the loaded one."""
    model = deep(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(folder / "original")  # type: ignore[operator]
    made = prune(folder / "original", out=folder / "linear", **options)
    in_memory = prune(model, **options)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert in_memory.model is not None
    assert made.facts["width"] == in_memory.facts["width"] and not made.facts["stock"]
    given = inputs(family, model)
    output = run(family, in_memory.model, given)
    stock = type(model).from_pretrained(folder / "linear").eval()  # type: ignore[attr-defined]
    loaded, _ = load_model(folder / "linear")
    in_memory.model.save_pretrained(folder / "saved")
    saved, _ = load_model(folder / "saved")
    for other in (stock, loaded, saved):
        assert torch.equal(run(family, other, given), output)
        assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in loaded.parameters())
    return model, made, loaded

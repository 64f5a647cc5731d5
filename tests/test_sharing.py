"""Modules in several places: tied in memory, stored once, loaded by both doors, saved and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ditcompress import prune
from ditcompress.errors import DitcompressError
from ditcompress.loading import DitcompressConfig, expected_shapes, load_model
from ditcompress.sharing import apply_shared

from .pruning.models import deep, inputs, run

FEW = ("updates=2", "rows=2", "images=2", "samples=2", "steps=3", "timesteps=2", "share=2")
BLOCK = "transformer_blocks"


@pytest.fixture(scope="module", params=["dit", "flux"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A family, a checkpoint of it and the same with two blocks fewer, of which pairs share their weights."""
    there = tmp_path_factory.mktemp(request.param)
    deep(request.param).save_pretrained(there / "original")  # type: ignore[operator]
    prune(there / "original", 0.3, there / "shared", method="foldgpt", overrides=FEW)
    return request.param, there / "original", there / "shared"


def names_in(path: Path) -> set[str]:
    with safe_open(path / "diffusion_pytorch_model.safetensors", "pt") as file:
        return set(file.keys())


def test_both_doors_tie_the_modules_and_give_the_same(folder: tuple[str, Path, Path], tmp_path: Path) -> None:
    family, _, path = folder
    ours, _ = load_model(path)
    stock = type(ours).from_pretrained(path).eval()  # type: ignore[attr-defined]
    shared = json.loads((path / "config.json").read_text())["quantization_config"]["shared"]
    given = inputs(family, ours)
    for model in (ours, stock):
        assert shared and all(model.get_submodule(a) is model.get_submodule(b) for a, b in shared.items())
    assert torch.equal(run(family, ours, given), run(family, stock, given))
    for number, model in enumerate((ours, stock)):
        model.save_pretrained(tmp_path / str(number))
        again, _ = load_model(tmp_path / str(number))
        once_more = type(ours).from_pretrained(tmp_path / str(number)).eval()  # type: ignore[attr-defined]
        assert torch.equal(run(family, again, given), run(family, ours, given))
        assert torch.equal(run(family, once_more, given), run(family, ours, given))
        assert names_in(tmp_path / str(number)) == names_in(path)


def test_tensors_are_stored_and_counted_once(folder: tuple[str, Path, Path]) -> None:
    _, _, path = folder
    model, checkpoint = load_model(path)
    shared = DitcompressConfig.of(checkpoint.config).shared  # type: ignore[union-attr]
    assert not any(name.startswith(tuple(f"{copy}." for copy in shared)) for name in names_in(path))
    assert set(expected_shapes(model)) == names_in(path)
    stored = sum(tensor.numel() for tensor in load_file(path / "diffusion_pytorch_model.safetensors").values())
    assert sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in _buffers(model)) == stored
    facts = json.loads((path / "prune.json").read_text())
    assert facts["shared"] == shared and facts["stock"] is False
    assert "import ditcompress" in (path / "README.md").read_text()


def _buffers(model: nn.Module) -> list[torch.Tensor]:
    kept = set(model.state_dict())
    return [tensor for name, tensor in model.named_buffers() if name in kept]


def test_a_model_in_memory_is_tied_and_can_be_saved(tmp_path: Path) -> None:
    model = deep("dit")
    pruned = prune(model, 0.3, method="foldgpt", overrides=FEW).model
    assert pruned is not None
    pruned.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    again, _ = load_model(tmp_path / "saved")
    given = inputs("dit", model)
    assert torch.equal(run("dit", again, given), run("dit", pruned, given))


def test_a_copy_that_is_stored_too_is_refused(folder: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, _, path = folder
    model, checkpoint = load_model(path)
    copy, owner = next(iter(DitcompressConfig.of(checkpoint.config).shared.items()))  # type: ignore[union-attr]
    tensors = load_file(path / "diffusion_pytorch_model.safetensors")
    save_file(
        {**tensors, f"{copy}.weight": tensors[f"{owner}.weight"] + 1}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(DitcompressError, match="E316"):
        load_model(tmp_path)
    with pytest.raises(DitcompressError, match="E316"):
        type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "shared",
    [
        {f"{BLOCK}.1.attn1.to_q": f"{BLOCK}.1.attn1.to_q"},
        {f"{BLOCK}.1.attn1.to_q": f"{BLOCK}.9.attn1.to_q"},
        {f"{BLOCK}.1.attn1.to_q": f"{BLOCK}.0.ff.net.2"},
        {f"{BLOCK}.1.attn1.to_q": f"{BLOCK}.0.attn1.to_q", f"{BLOCK}.2.attn1.to_q": f"{BLOCK}.1.attn1.to_q"},
        {f"{BLOCK}.1.attn1": f"{BLOCK}.0.attn1", f"{BLOCK}.1.attn1.to_q": f"{BLOCK}.0.attn1.to_q"},
        {f"{BLOCK}.1": BLOCK},
        {"": f"{BLOCK}.0"},
        {"nowhere": "nor_here"},
    ],
)
def test_what_cannot_be_tied_is_refused(shared: dict[str, str]) -> None:
    with pytest.raises(DitcompressError, match=r"E320 bad-config\].*shared"):
        apply_shared(deep("dit"), shared)


def test_shared_weights_are_not_narrowed_or_pruned_again(folder: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, original, path = folder
    with pytest.raises(DitcompressError, match=r"E203 bad-option\]: --width-ratio"):
        prune(original, 0.3, tmp_path / "a", method="foldgpt", overrides=FEW, width_ratio=0.5)
    with pytest.raises(DitcompressError, match="E322"):
        prune(path, 0.3, tmp_path / "b")
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]

"""prune --data: what is left is trained on cached latents; those that do not fit are refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditcompress import api
from ditcompress.api import chain
from ditcompress.distill import data as trajectories
from ditcompress.distill.latents import Latents
from ditcompress.errors import DitcompressError

from ..distill.models import cached
from .models import deep

SHAPE = (4, 8, 8)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "original"
    deep("dit").save_pretrained(folder)  # type: ignore[operator]
    return folder


def pruned(original: Path, out: Path, data: Path | None, steps: int = 3, **options: Any) -> chain.ChainResult:
    """As `ditcompress prune --ratio 0.4 --distill-steps STEPS --data DATA`, with small batches."""
    chosen = api.staged(None, {"ratio": 0.4, "method": "magnitude"}, steps, None if data is None else str(data))
    assert chosen.distill is not None
    small = type(chosen.distill)(**{**chosen.distill.model_dump(exclude_unset=True), "batch": 4})
    return api.run_recipe(original, chosen.model_copy(update={"distill": small}), out, device="cpu", **options)


def test_what_is_left_is_trained_on_the_latents(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    real = Latents.batch

    def batch(self: Latents, step: int, size: int, *rest: Any) -> Any:
        seen.append((step, size))
        return real(self, step, size, *rest)

    monkeypatch.setattr(Latents, "batch", batch)
    monkeypatch.setattr(trajectories.Trajectories, "batch", lambda *_, **__: pytest.fail("no trajectory is drawn"))
    result = pruned(original, tmp_path / "out", cached(tmp_path / "latents", SHAPE))
    assert [row for row in seen if row[1] == 4] == [(0, 4), (1, 4), (2, 4)]
    facts = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert facts["options"]["data"] == str(tmp_path / "latents") and len(facts["losses"]) == 3
    assert result.stages["prune"]["removed"]
    api.prune(original, 0.4, tmp_path / "untrained", method="magnitude")
    before, after = load_file(tmp_path / "untrained" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    other = pruned(original, tmp_path / "other", cached(tmp_path / "more", SHAPE, counts=(5,)))
    assert other.stages["distill"]["losses"] != facts["losses"]


def spoil(folder: Path, how: str) -> None:
    if how == "absent":
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    elif how == "empty":
        for file in folder.iterdir():
            file.unlink()
    else:
        for file in folder.iterdir():
            tensors = load_file(file)
            file.unlink()
            spoiled = {
                "unlabelled": {"latents": tensors["latents"]},
                "channels": {**tensors, "latents": tensors["latents"][:, :3].contiguous()},
                "size": {**tensors, "latents": tensors["latents"].repeat(1, 1, 2, 2)},
                "classes": {**tensors, "class_labels": tensors["class_labels"] + 50},
                "nan": {**tensors, "latents": tensors["latents"] * float("nan")},
            }[how]
            save_file(spoiled, file)


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [("absent", "E301", "there is no such folder"), ("empty", "E338", "holds no .safetensors file"),
     ("unlabelled", "E330", "class_labels"), ("channels", "E338", r"the model draws \(n, 4, 8, 8\)"),
     ("size", "E338", r"latents of shape \(9, 4, 16, 16\)"), ("classes", "E330", "class_labels"),
     ("nan", "E338", "NaN")],
)  # fmt: skip
def test_latents_that_do_not_fit_are_one_line_before_anything_is_pruned(
    how: str, code: str, words: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "prune", lambda *_, **__: pytest.fail("pruned first"))
    folder = cached(tmp_path / "latents", SHAPE)
    spoil(folder, how)
    for options in ({}, {"dry_run": True}):
        with pytest.raises(DitcompressError, match=words) as caught:
            pruned(original, tmp_path / "out", folder, **options)
        assert caught.value.code == code and "\n" not in caught.value.line()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_data_without_steps_are_refused() -> None:
    with pytest.raises(DitcompressError, match=r"E203.*--distill-steps"):
        api.staged(None, {"ratio": 0.4}, None, "latents")

"""`moe` of a model in memory: a converted copy, saved by diffusers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

import ditcompress
from ditcompress import mixture
from ditcompress.errors import DitcompressError
from ditcompress.runtime.moe import Router, routed_parts
from tests.distill.models import cached
from tests.moe.test_command import FEW, predicted


@pytest.mark.parametrize("method", mixture.registry.names())
def test_a_converted_copy_is_saved_and_loaded_by_diffusers_and_the_original_stays(
    method: str, tiny_dit: Path, tmp_path: Path
) -> None:
    model = DiTTransformer2DModel.from_pretrained(tiny_dit)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    few = (*FEW, "method.states=8", "method.tokens=256") if method == "moe_local" else FEW
    facts = ditcompress.moe(model, method=method.replace("_", "-"), overrides=few)
    made = facts["model"]
    assert routed_parts(made) and not routed_parts(model) and "quantization_config" not in model.config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    made.save_pretrained(tmp_path / "m")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "m").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in made.state_dict().items())
    assert bool(predicted(tmp_path / "m").isfinite().all())


def test_it_is_what_the_checkpoint_gives_and_takes_training(tiny_dit: Path, tmp_path: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(tiny_dit)
    options = {"method": "dit-moe", "overrides": FEW, "distill_steps": 3}
    made = ditcompress.moe(model, **options)["model"].state_dict()
    ditcompress.moe(tiny_dit, tmp_path / "disk", **options)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "disk").state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in made.items())


def test_the_dtype_stays_and_routers_are_float32(tiny_dit: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(tiny_dit, torch_dtype=torch.bfloat16)
    made = ditcompress.moe(model, method="random", overrides=FEW)["model"]
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert all(m.weight.dtype == torch.float32 for m in made.modules() if isinstance(m, Router))


def test_a_converted_model_and_images_without_a_vae_are_refused(tiny_dit: Path, tmp_path: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(tiny_dit)
    made = ditcompress.moe(model, method="random", overrides=FEW)["model"]
    (tmp_path / "images.npz").touch()
    for code, call in (
        ("E322", lambda: ditcompress.moe(made, method="random")),
        ("E205", lambda: ditcompress.moe(model, method="random", overrides=FEW, distill_steps=1,
                                         data=tmp_path / "images.npz")),
    ):  # fmt: skip
        with pytest.raises(DitcompressError) as caught:
            call()
        assert caught.value.code == code
    done = ditcompress.moe(
        model, method="random", overrides=FEW, distill_steps=2, data=cached(tmp_path / "latents", (4, 8, 8))
    )
    assert done["distilled"]["steps"] == 2

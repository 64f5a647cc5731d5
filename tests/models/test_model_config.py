"""Configurations from strangers: what is built, and what is refused before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from ditcompress.errors import DitcompressError
from ditcompress.models import adapter_for, build_meta, class_of, dit, known_classes, pixart

DIT: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "_diffusers_version": "0.42.1",
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "out_channels": 8,
    "some_future_key": 3,
}


def refused(config: dict[str, Any]) -> DitcompressError:
    with pytest.raises(DitcompressError) as caught:
        build_meta(config)
    return caught.value


def test_a_model_is_built_without_memory() -> None:
    model = build_meta(DIT)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert len(model.transformer_blocks) == 2
    assert not model.training


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 10**9),
        ("num_layers", -1),
        ("num_layers", "28"),
        ("num_layers", 28.0),
        ("num_layers", True),
        ("num_layers", [28]),
        ("num_layers", None),
        ("num_layers", {"a": 1}),
        ("num_attention_heads", 0),
        ("attention_head_dim", 2**40),
        ("sample_size", 10**7),
        ("norm_eps", float("nan")),
        ("norm_eps", "small"),
        ("dropout", float("inf")),
        ("activation_fn", 3),
        ("attention_bias", "yes"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_key(key: str, value: Any) -> None:
    error = refused({**DIT, key: value})
    assert error.code == "E320"
    assert error.where == f"config.json: {key}"
    assert "\n" not in error.line()


def test_values_that_are_absurd_only_together_are_refused() -> None:
    error = refused({**DIT, "num_attention_heads": 4096, "attention_head_dim": 4096})
    assert (error.code, error.where) == ("E320", "config.json: attention_head_dim")
    error = refused({**DIT, "sample_size": 4096, "num_attention_heads": 64, "attention_head_dim": 64, "patch_size": 1})
    assert (error.code, error.where) == ("E320", "config.json: sample_size")


def test_a_combination_that_the_class_refuses_is_one_line() -> None:
    error = refused({**DIT, "norm_type": "layer_norm"})
    assert error.code == "E320"
    assert "DiTTransformer2DModel cannot be built" in error.line()


def test_lists_are_bounded_inside() -> None:
    flux = {"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1}
    assert refused({**flux, "axes_dims_rope": [16, 10**9, 56]}).where == "config.json: axes_dims_rope"
    assert refused({**flux, "axes_dims_rope": [1] * 5000}).code == "E320"


def test_an_unknown_class_names_the_nearest() -> None:
    error = refused({"_class_name": "DiTTransformer2DModal"})
    assert error.code == "E321"
    assert "'DiTTransformer2DModel'" in error.line()


@pytest.mark.parametrize("name", ["AutoencoderKL", "UNet2DConditionModel", "os.system"])
def test_what_is_no_transformer_of_diffusers_is_refused(name: str) -> None:
    assert refused({"_class_name": name}).code == "E321"


@pytest.mark.parametrize(
    "config",
    [
        {**DIT, "auto_map": {"AutoModel": "model.Evil"}},
        {**DIT, "trust_remote_code": True},
        {**DIT, "_class_name": ["evil", "Model"]},
    ],
    ids=["auto_map", "trust_remote_code", "list"],
)
def test_code_from_the_checkpoint_is_never_asked_for(config: dict[str, Any]) -> None:
    assert refused(config).code == "E403"


def test_a_missing_class_name_is_refused() -> None:
    assert refused({"num_layers": 2}).where == "config.json: _class_name"


def test_the_old_class_name_is_told_apart_by_its_norm() -> None:
    old = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    assert class_of(old) == "DiTTransformer2DModel"
    assert adapter_for(old) is dit
    assert adapter_for({**old, "norm_type": "ada_norm_single"}) is pixart


def test_every_known_class_has_a_family() -> None:
    assert len(known_classes()) >= 70
    assert {adapter_for(name).__name__.rpartition(".")[2] for name in known_classes()} == {
        "dit",
        "pixart",
        "sd3",
        "flux",
        "qwen_image",
        "generic",
    }


def test_the_published_shapes_build() -> None:
    flux = build_meta(
        {"_class_name": "FluxTransformer2DModel", "axes_dims_rope": [16, 56, 56], "guidance_embeds": True}
    )
    assert sum(p.numel() for p in flux.parameters()) == pytest.approx(11.9e9, rel=0.01)
    medium = {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
        "qk_norm": "rms_norm",
    }
    assert sum(p.numel() for p in build_meta(medium).parameters()) == pytest.approx(2.24e9, rel=0.02)

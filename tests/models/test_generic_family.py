"""Classes without a family of their own: what their structure yields, on empty models of the classes' default sizes.

Block lists are those of diffusers 0.42 as read from the classes' sources.
"""

from __future__ import annotations

import pytest
import torch

from ditcompress.errors import DitcompressError
from ditcompress.models import account, adapter_for, build_meta, generic
from ditcompress.models._account import by_role
from ditcompress.models._roles import role_of
from ditcompress.models._table import is_linear

BLOCKS = {
    "AceStepTransformer1DModel": {"layers": 24},
    "AllegroTransformer3DModel": {"transformer_blocks": 32},
    "AuraFlowTransformer2DModel": {"joint_transformer_blocks": 4, "single_transformer_blocks": 32},
    "BriaFiboTransformer2DModel": {
        "transformer_blocks": 19,
        "single_transformer_blocks": 38,
        "caption_projection": 57,
    },
    "ChromaTransformer2DModel": {"transformer_blocks": 19, "single_transformer_blocks": 38},
    "CogVideoXTransformer3DModel": {"transformer_blocks": 30},
    "CogView4Transformer2DModel": {"transformer_blocks": 30},
    "CosmosTransformer3DModel": {"transformer_blocks": 28},
    "DiTTransformer2DModel": {"transformer_blocks": 28},
    "ErnieImageTransformer2DModel": {"layers": 24},
    "Flux2Transformer2DModel": {"transformer_blocks": 8, "single_transformer_blocks": 48},
    "FluxTransformer2DModel": {"transformer_blocks": 19, "single_transformer_blocks": 38},
    "HunyuanImageTransformer2DModel": {"transformer_blocks": 20, "single_transformer_blocks": 40},
    "HunyuanVideo15Transformer3DModel": {"transformer_blocks": 54},
    "JoyImageEditTransformer3DModel": {"double_blocks": 20},
    "Kandinsky5Transformer3DModel": {"text_transformer_blocks": 2, "visual_transformer_blocks": 32},
    "Krea2Transformer2DModel": {"transformer_blocks": 28},
    "LTXVideoTransformer3DModel": {"transformer_blocks": 28},
    "Lumina2Transformer2DModel": {"noise_refiner": 2, "context_refiner": 2, "layers": 26},
    "MochiTransformer3DModel": {"transformer_blocks": 48},
    "NucleusMoEImageTransformer2DModel": {"transformer_blocks": 24},
    "PRXTransformer2DModel": {"blocks": 16},
    "PixArtTransformer2DModel": {"transformer_blocks": 28},
    "PriorTransformer": {"transformer_blocks": 20},
    "QwenImageTransformer2DModel": {"transformer_blocks": 60},
    "SD3Transformer2DModel": {"transformer_blocks": 18},
    "SanaTransformer2DModel": {"transformer_blocks": 20},
    "StableAudioDiTModel": {"transformer_blocks": 24},
    "T5FilmDecoder": {"decoders": 12},
    "WanTransformer3DModel": {"blocks": 40},
    "WanVACETransformer3DModel": {"blocks": 40, "vace_blocks": 8},
    "ZImageTransformer2DModel": {"noise_refiner": 2, "context_refiner": 2, "layers": 30},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_roles_and_parameters_are_all_found(name: str) -> None:
    model = build_meta({"_class_name": name})
    layout = adapter_for(name).layout(model)
    lists: dict[str, int] = {}
    for block in layout.blocks:
        lists[block.rpartition(".")[0]] = lists.get(block.rpartition(".")[0], 0) + 1
    assert lists == BLOCKS[name]
    linears = [path for path, module in model.named_modules() if is_linear(module)]
    assert sorted(site.name for site in layout.sites) == sorted(linears)
    named = sum(site.role != "other" for site in layout.sites)
    assert named >= 0.85 * len(linears)
    assert {"qkv", "attn_out", "ffn_in", "ffn_out"} <= {s.role for s in layout.sites if s.block} or "Sana" in name
    entries = account(model, layout)
    assert [entry.name for entry in entries] == [path for path, _ in model.named_parameters()]
    assert sum(entry.params for entry in entries) == sum(p.numel() for p in model.parameters())


def test_what_tools_for_linears_overlook_is_accounted_for() -> None:
    sana = by_role(account(build_meta({"_class_name": "SanaTransformer2DModel"})))
    assert sana["conv"] / sum(sana.values()) == pytest.approx(0.47, abs=0.01)
    nucleus = by_role(account(build_meta({"_class_name": "NucleusMoEImageTransformer2DModel"})))
    assert nucleus["raw"] / sum(nucleus.values()) == pytest.approx(0.93, abs=0.01)


def test_modulation_is_a_third_of_qwen_image() -> None:
    shares = by_role(account(build_meta({"_class_name": "QwenImageTransformer2DModel"})))
    assert shares["modulation"] / sum(shares.values()) == pytest.approx(0.33, abs=0.01)


@pytest.mark.parametrize(
    ("path", "block", "role"),
    [
        ("blocks.0.attn.to_q", "blocks.0", "qkv"),
        ("blocks.0.attn.add_k_proj", "blocks.0", "qkv"),
        ("blocks.0.attn.to_qkv_mlp_proj", "blocks.0", "qkv"),
        ("blocks.0.attn.to_add_out", "blocks.0", "attn_out"),
        ("blocks.0.self_attention.out_layer", "blocks.0", "attn_out"),
        ("blocks.0.feed_forward.out_layer", "blocks.0", "ffn_out"),
        ("blocks.0.feed_forward.linear_2", "blocks.0", "ffn_out"),
        ("blocks.0.experts.3.w2", "blocks.0", "ffn_out"),
        ("blocks.0.mlp.gate_up_proj", "blocks.0", "ffn_in"),
        ("blocks.0.adaLN_modulation.1", "blocks.0", "modulation"),
        ("blocks.0.img_mod.1", "blocks.0", "modulation"),
        ("time_text_embed.timestep_embedder.linear_1", "", "time_embedding"),
        ("context_embedder", "", "embedding"),
        ("norm_out.linear", "", "modulation"),
        ("proj_out", "", "head"),
    ],
)
def test_a_role_follows_from_the_path(path: str, block: str, role: str) -> None:
    assert role_of(path, block) == role


def test_one_leaf_name_with_two_meanings_is_told_apart_by_its_neighbours() -> None:
    beside = frozenset({"linear_1", "linear_2", "out_projection"})
    assert role_of("blocks.0.ff.linear_2", "blocks.0", beside=beside) == "ffn_in"


def test_cross_attention_does_not_share_its_query_input() -> None:
    layout = adapter_for("WanTransformer3DModel").layout(build_meta({"_class_name": "WanTransformer3DModel"}))
    sites = layout.by_name()
    own = {sites[f"blocks.0.attn1.to_{leaf}"].input_key for leaf in "qkv"}
    cross = [sites[f"blocks.0.attn2.to_{leaf}"].input_key for leaf in "qkv"]
    assert len(own) == 1
    assert cross[0] != cross[1] == cross[2]


def test_nothing_is_cut_where_a_norm_runs_across_heads() -> None:
    layout = adapter_for("LTXVideoTransformer3DModel").layout(build_meta({"_class_name": "LTXVideoTransformer3DModel"}))
    assert not any(axis.cut and axis.unit == "head" for axis in layout.axes.values())


AURAFLOW = {
    "_class_name": "AuraFlowTransformer2DModel",
    "sample_size": 8,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pos_embed_max_size": 16,
}


def test_an_image_class_is_driven_from_its_signature() -> None:
    import diffusers.models

    torch.manual_seed(0)
    model = diffusers.models.AuraFlowTransformer2DModel(**{k: v for k, v in AURAFLOW.items() if k[0] != "_"})
    cond = generic.random_conditions(AURAFLOW, 2, torch.Generator().manual_seed(0))
    assert {k: tuple(v.shape) for k, v in cond.items()} == {"encoder_hidden_states": (2, generic.TEXT_TOKENS, 12)}
    latents = torch.randn(2, *generic.latent_shape(AURAFLOW))
    expected = model(latents, timestep=torch.tensor([0.4, 0.4]), **cond).sample
    assert torch.allclose(generic.predict(model, latents, torch.tensor([400.0, 400.0]), cond), expected)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"_class_name": "CogView4Transformer2DModel", "text_embed_dim": 16}, "original_size"),
        ({"_class_name": "ChromaTransformer2DModel", "joint_attention_dim": 16}, "img_ids"),
    ],
    ids=["required", "optional-in-name-only"],
)
def test_a_class_that_cannot_be_driven_names_the_missing_argument(config: dict[str, object], word: str) -> None:
    with pytest.raises(DitcompressError) as caught:
        generic.random_conditions(config, 1, torch.Generator())
    assert caught.value.code == "E205"
    assert f"give {word} with --conditions" in caught.value.line()


def test_a_class_without_a_latent_size_says_what_to_add() -> None:
    with pytest.raises(DitcompressError, match="sample_size"):
        generic.latent_shape({"_class_name": "WanTransformer3DModel", "in_channels": 16})

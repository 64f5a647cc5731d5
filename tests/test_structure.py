"""Structure on its own: offsets in concatenations, attributes that must follow a cut, and what is refused.

That the output stays the same for every family is in contracts/test_families.py; here the derived table of the
generic adapter is held to the same, on models whose families know better, and gated feed-forwards one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, CogVideoXTransformer3DModel, DiTTransformer2DModel
from torch import Tensor, nn

from ditcompress import api, structure
from ditcompress.errors import DitcompressError
from ditcompress.models import build_meta, dit, flux, generic, pixart, registry, sd3
from ditcompress.models._inputs import built
from ditcompress.models.base import Axis, Fold, Layout, Site

TWO = Layout(
    sites=(
        Site("first", "ffn_in", ("",), ("a",), "", 3, 4),
        Site("second", "ffn_in", ("",), ("b",), "", 3, 2),
        Site("out", "ffn_out", ("a", "b"), ("",), "", 6, 3),
        Site("rest", "ffn_out", ("", "b"), ("",), "", 5, 3),
    ),
    axes={
        "a": Axis("a", 4, "neuron", 2, (Fold("first.weight", 0, 4), Fold("first.bias", 0, 4, "one_plus")), cut=True),
        "b": Axis("b", 2, "neuron"),
    },
    blocks=(),
)


def test_an_axis_is_found_at_its_place_in_a_concatenation() -> None:
    assert list(structure.spans(TWO, ("a", "b"), 6, "b")) == [(4, 6)]
    assert list(structure.spans(TWO, ("", "b"), 5, "b")) == [(3, 5)]
    assert list(structure.spans(TWO, ("b", "a", "b"), 8, "b")) == [(0, 2), (6, 8)]


def test_a_fold_divides_rows_and_multiplies_only_the_columns_of_its_axis() -> None:
    tensors = {
        "first.weight": torch.ones(4, 3),
        "first.bias": torch.tensor([0.0, 1.0, 3.0, 7.0]),
        "out.weight": torch.ones(3, 6),
    }
    s = torch.tensor([1.0, 2.0, 4.0, 8.0])
    folded = structure.apply_fold(tensors, "a", TWO, s)
    assert torch.equal(folded["first.weight"][:, 0], torch.tensor([1.0, 0.5, 0.25, 0.125]))
    assert torch.equal(folded["first.bias"], torch.zeros(4))  # (b + 1) / s - 1
    assert torch.equal(folded["out.weight"][0], torch.tensor([1.0, 2.0, 4.0, 8.0, 1.0, 1.0]))
    assert torch.equal(tensors["out.weight"], torch.ones(3, 6))
    assert structure.apply_fold({k: v.bfloat16() for k, v in tensors.items()}, "a", TWO, s)["out.weight"].dtype == (
        torch.bfloat16
    )


def test_an_axis_without_a_producer_cannot_be_folded() -> None:
    with pytest.raises(DitcompressError) as caught:
        structure.apply_fold({}, "b", TWO, torch.ones(2))
    assert caught.value.code == "E205"


def test_a_fold_over_an_incomplete_dict_fails_instead_of_changing_the_model() -> None:
    with pytest.raises(KeyError, match=r"out\.weight"):
        structure.apply_fold({"first.weight": torch.ones(4, 3), "first.bias": torch.ones(4)}, "a", TWO, torch.ones(4))


def test_cutting_a_head_shrinks_linears_and_the_attributes_that_forward_reads() -> None:
    model = dit.tiny()
    structure.cut_units(model, "transformer_blocks.0.attn1.heads", dit.layout(model), [0, 2])
    attention = model.transformer_blocks[0].attn1
    assert (attention.heads, attention.inner_dim, attention.to_q.out_features) == (2, 32, 32)
    assert attention.to_v.weight.shape == (32, 64)
    assert attention.to_v.bias.shape == (32,)
    assert attention.to_out[0].weight.shape == (64, 32)
    assert model.transformer_blocks[1].attn1.heads == 4


def test_cutting_neurons_of_a_single_block_leaves_the_attention_columns() -> None:
    model = flux.tiny()
    block = model.single_transformer_blocks[0]
    before = block.proj_out.weight.detach().clone()
    structure.cut_units(model, "single_transformer_blocks.0.mlp.neurons", flux.layout(model), [0])
    assert block.mlp_hidden_dim == 255
    assert block.proj_out._tp_packed_row_blocks == [64, 255]
    assert torch.equal(block.proj_out.weight, torch.cat([before[:, :64], before[:, 65:]], dim=1))


def test_every_unit_cannot_be_cut() -> None:
    model = dit.tiny()
    with pytest.raises(DitcompressError, match="every unit"):
        structure.cut_units(model, "transformer_blocks.0.attn1.heads", dit.layout(model), range(4))


def test_channels_of_the_residual_stream_cannot_be_reordered() -> None:
    model = dit.tiny()
    with pytest.raises(DitcompressError) as caught:
        structure.permute_units(model, "transformer_blocks.0.norm1.out", dit.layout(model), range(64))
    assert caught.value.code == "E205"


@pytest.mark.parametrize("units", [[0, 0], [4], [-1]])
def test_unit_indices_must_be_valid(units: list[int]) -> None:
    model = dit.tiny()
    with pytest.raises(ValueError, match="unit indices"):
        structure.cut_units(model, "transformer_blocks.0.attn1.heads", dit.layout(model), units)


def test_a_partition_must_hold_every_neuron_once() -> None:
    model = dit.tiny()
    with pytest.raises(ValueError, match="expected all 256"):
        structure.split_ffn(model, "transformer_blocks.0.ff.neurons", dit.layout(model), [[0, 1], [2]])


def test_a_feed_forward_that_is_no_module_of_its_own_is_not_split() -> None:
    model = flux.tiny()
    with pytest.raises(DitcompressError, match="module of its own"):
        structure.split_ffn(model, "single_transformer_blocks.0.mlp.neurons", flux.layout(model), [range(256)])


def test_experts_do_not_share_memory_with_the_dense_model() -> None:
    model = dit.tiny()
    split = structure.split_ffn(
        model, "transformer_blocks.0.ff.neurons", dit.layout(model), [range(100), range(100, 256)]
    )
    dense = {parameter.data_ptr() for parameter in model.parameters()}
    assert not dense & {parameter.data_ptr() for parameter in split.parameters()}
    assert split.experts[0].net[0].proj.weight.shape == (100, 64)
    assert split.experts[1].net[2].bias is None


def scales(axis: Axis, seed: int = 0) -> Tensor:
    return torch.rand(axis.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 0.2


def hold_to_table(model: nn.Module, layout: Layout, run: Callable[[nn.Module], Tensor]) -> None:
    """Fold every foldable axis and reverse the units of every axis that can be cut: the output must stay."""
    with torch.no_grad():
        reference = run(model)
        changed = copy.deepcopy(model)
        tensors: dict[str, Tensor] = dict(changed.named_parameters())
        for name, axis in layout.axes.items():
            if axis.fold:
                tensors = structure.apply_fold(tensors, name, layout, scales(axis))
        changed.load_state_dict({**changed.state_dict(), **tensors})
        for name, axis in layout.axes.items():
            if axis.cut:
                structure.permute_units(changed, name, layout, list(reversed(range(axis.size // axis.unit_size))))
        torch.testing.assert_close(run(changed), reference, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", [dit, pixart, sd3, flux], ids=lambda family: family.__name__.rpartition(".")[2])
def test_the_derived_table_holds_for_models_with_a_family(family: object) -> None:
    family = registry.get(family.__name__.rpartition(".")[2])  # type: ignore[attr-defined]
    model = family.tiny().double()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((2, *family.latent_shape(model.config)), generator=generator, dtype=torch.float64)
    cond = family.random_conditions(model.config, 2, generator)
    layout = generic.layout(model)
    assert any(axis.cut and axis.unit == "head" for axis in layout.axes.values())
    hold_to_table(model, layout, lambda m: family.predict(m, latents, torch.tensor([400, 400]), cond))


@pytest.mark.parametrize("activation", ["geglu", "swiglu", "geglu-approximate", "linear-silu"])
def test_gated_and_other_feed_forwards_of_a_dit_hold(activation: str) -> None:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "sample_size": 4,
        "num_embeds_ada_norm": 4,
        "activation_fn": activation,
        "attention_bias": False,
    }
    model = built(DiTTransformer2DModel, config, 0).double()
    layout = dit.layout(model)
    neurons = layout.axes["transformer_blocks.0.ff.neurons"]
    assert bool(neurons.fold) == (activation in ("geglu", "swiglu"))
    latents = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    cond = {"class_labels": torch.tensor([0, 1])}
    hold_to_table(model, layout, lambda m: dit.predict(m, latents, torch.tensor([5, 900]), cond))
    cut = copy.deepcopy(model)
    structure.cut_units(cut, neurons, layout, [3])
    assert cut.transformer_blocks[0].ff.net[2].in_features == neurons.size - 1
    assert dit.layout(cut).axes[neurons.name].size == neurons.size - 1
    with torch.no_grad():
        assert dit.predict(cut, latents, torch.tensor([5, 900]), cond).shape == latents.shape


def test_the_derived_table_holds_for_auraflow() -> None:
    config = {
        "sample_size": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 16,
    }
    model = built(AuraFlowTransformer2DModel, config, 0).double()
    latents, text = torch.randn(2, 4, 4, 4).double(), torch.randn(2, 5, 12).double()
    layout = generic.layout(model)
    assert sum(bool(axis.fold) for axis in layout.axes.values()) == 5  # two attentions, three feed-forwards
    time = torch.tensor([0.3, 0.6], dtype=torch.float64)
    hold_to_table(model, layout, lambda m: m(latents, text, timestep=time, return_dict=False)[0])


def test_the_derived_table_holds_for_cogvideox() -> None:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 4,
        "text_embed_dim": 8,
        "num_layers": 1,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 1,
        "max_text_seq_length": 6,
    }
    model = built(CogVideoXTransformer3DModel, config, 0).double()
    latents, text = torch.randn(2, 1, 4, 4, 4).double(), torch.randn(2, 6, 8).double()
    layout = generic.layout(model)
    assert any(axis.unit == "head" for axis in layout.axes.values())
    time = torch.tensor([3, 600])
    hold_to_table(model, layout, lambda m: m(latents, text, time, return_dict=False)[0])


GATED_MODELS = (
    "AuraFlowTransformer2DModel",
    "BriaFibo2Transformer2DModel",
    "Cosmos3OmniTransformer",
    "ErnieImageTransformer2DModel",
    "Ideogram4Transformer2DModel",
    "Krea2Transformer2DModel",
    "Lumina2Transformer2DModel",
    "QwenImage21Transformer2DModel",
    "T5FilmDecoder",
    "ZImageTransformer2DModel",
)


def gated_classes() -> dict[str, tuple[nn.Module, list[str]]]:
    """Class name of each module that the derived table takes for gated -> one, with its gate, value and output."""
    found: dict[str, tuple[nn.Module, list[str]]] = {}
    for name in GATED_MODELS:
        model = build_meta({"_class_name": name})
        layout = generic.layout(model)
        for axis in layout.axes.values():
            out = structure.readers(layout, axis.name)
            into = structure.writers(layout, axis.name)
            owner = axis.name.removesuffix(".neurons")
            if axis.unit == "neuron" and axis.fold and len(into) == 2 and owner not in layout.blocks:
                module = model.get_submodule(owner)
                value = axis.fold[0].tensor.removesuffix(".weight")
                (gate,) = {site.name for site in into} - {value}
                leaves = [path[len(owner) + 1 :] for path in (gate, value, out[0].name)]
                found.setdefault(type(module).__name__, (module, leaves))
    return found


def test_every_gated_feed_forward_of_diffusers_lets_a_scale_through_its_value() -> None:
    """The derived table takes them for gated by the names of their linears alone; here their code is run."""
    classes = gated_classes()
    assert len(classes) >= 9
    for name, (meta, (gate, value, out)) in classes.items():
        module = copy.deepcopy(meta)
        for leaf, shape in ((gate, (5, 7)), (value, (5, 7)), (out, (7, 5))):
            setattr(module, leaf, nn.Linear(*shape, dtype=torch.float64))
        hidden = torch.randn(3, 5, dtype=torch.float64)
        with torch.no_grad():
            reference = module(hidden)
            scale = torch.rand(7, dtype=torch.float64) + 0.5
            getattr(module, value).weight.div_(scale[:, None])
            getattr(module, value).bias.div_(scale)
            getattr(module, out).weight.mul_(scale)
            assert torch.allclose(module(hidden), reference, atol=1e-9), name
            getattr(module, gate).weight.mul_(2)
            assert not torch.allclose(module(hidden), reference, atol=1e-6), name


def test_a_narrowed_model_in_memory_stays_narrow_through_quantize(tmp_path: Path) -> None:
    narrow_model = api.prune(registry.get("dit").tiny(0), width_ratio=0.5).model
    compressed = api.quantize(narrow_model, "w8a16").model
    assert compressed is not None and narrow_model is not None
    compressed.save_pretrained(tmp_path / "q")  # type: ignore[operator]
    found = type(narrow_model).from_pretrained(tmp_path / "q")  # type: ignore[attr-defined]
    assert {n: t.shape for n, t in found.state_dict().items()} == {
        n: t.shape for n, t in compressed.state_dict().items()
    }

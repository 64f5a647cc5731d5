"""Narrower feed-forwards and fewer heads: what is left is the model with the others silenced, and it loads again."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ditcompress import api, prune
from ditcompress.api._pruned import cut_tensors
from ditcompress.api.width import Cut
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model
from ditcompress.models import registry
from ditcompress.models._inputs import built
from ditcompress.pruning.width import cut_axes, kept_units
from ditcompress.pruning.width.magnitude import magnitudes
from ditcompress.structure import narrow, readers, spans

from .models import deep, inputs, run

FAMILIES = ["dit", "flux", "pixart", "sd3"]


def silenced(name: str, model: nn.Module, ratio: float) -> nn.Module:
    """A copy in which the units that would go are zero at every reader."""
    model, layout = copy.deepcopy(model), registry.get(name).layout(model)
    state = model.state_dict()
    axes = cut_axes(layout, "both")
    scores = {axis.name: magnitudes(layout, axis, lambda key: state[key]) for axis in axes}
    kept = kept_units(layout, axes, scores, ratio)
    with torch.no_grad():
        for axis in axes:
            gone = set(range(axis.size // axis.unit_size)) - set(kept[axis.name])
            for site in readers(layout, axis.name):
                weight = model.get_submodule(site.name).weight
                for start, _ in spans(layout, site.reads, site.in_features, axis.name):
                    for unit in gone:
                        weight[:, start + unit * axis.unit_size : start + (unit + 1) * axis.unit_size] = 0  # type: ignore[index]
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_narrowed_model_is_the_one_with_its_weakest_units_silenced(name: str, tmp_path: Path) -> None:
    model = deep(name)
    expected = run(name, silenced(name, model, 0.25), inputs(name, model))
    in_memory = prune(model, width_ratio=0.25, width_method="magnitude")
    assert in_memory.model is not None and in_memory.facts["stock"] is False
    torch.testing.assert_close(run(name, in_memory.model, inputs(name, model)), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "original")  # type: ignore[operator]
    result = prune(tmp_path / "original", out=tmp_path / "narrow", width_ratio=0.25, width_method="magnitude")
    loaded, _ = load_model(tmp_path / "narrow")
    again = type(model).from_pretrained(tmp_path / "narrow").eval()  # type: ignore[attr-defined]
    output = run(name, in_memory.model, inputs(name, model))
    assert torch.equal(run(name, loaded, inputs(name, model)), output)
    assert torch.equal(run(name, again, inputs(name, model)), output)
    in_memory.model.save_pretrained(tmp_path / "saved")
    saved, _ = load_model(tmp_path / "saved")
    assert torch.equal(run(name, saved, inputs(name, model)), output)
    for row in result.facts["width"]["axes"].values():
        assert row["kept"] == row["of"] - round(row["of"] / 4)
    assert sum(p.numel() for p in again.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())


def test_depth_and_width_together_load_in_a_fresh_process_and_can_be_quantized(tmp_path: Path) -> None:
    out = tmp_path / "small"
    facts = prune(digits_folder(), 0.25, out, method="magnitude", width_ratio=0.25, width_method="magnitude").facts
    assert len(facts["removed"]) == 3 and facts["width"]["axes"]["transformer_blocks.8.ff.neurons"]["of"] == 256
    code = (
        "import sys, ditcompress, torch; from diffusers import DiTTransformer2DModel as M\n"
        f"m = M.from_pretrained({str(out / 'transformer')!r}).eval(); b = m.transformer_blocks\n"
        "print(len(b), b[0].attn1.heads, b[0].ff.net[2].in_features)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["9", "3", "192"], done.stderr[-2000:]
    result = api.quantize(out, "w8a16", tmp_path / "packed")
    assert result.path is not None
    model, _ = load_model(tmp_path / "packed")
    output = model(torch.randn(1, 1, 8, 8), torch.tensor([500]), torch.tensor([3]))[0]
    assert bool(output.isfinite().all())
    assert api.inspect(tmp_path / "packed")["parameters"] == api.inspect(out)["parameters"]
    with pytest.raises(DitcompressError, match="E205"):
        api.export(out, tmp_path / "plain")
    with pytest.raises(DitcompressError, match="E322"):
        prune(out, 0.5, tmp_path / "again", method="magnitude")


@pytest.mark.parametrize("how", ["narrow", "linear", "shared", "quantized"])
def test_a_compressed_model_in_memory_is_not_pruned_again(how: str) -> None:
    few = ["samples=1", "steps=2"]
    make: dict[str, Any] = {
        "narrow": lambda model: prune(model, width_ratio=0.3, width_method="magnitude"),
        "linear": lambda model: prune(model, width_ratio=0.3, width_method="linear-ffn", width_overrides=few),
        "shared": lambda model: prune(model, 0.3, method="foldgpt",
                                      overrides=[*few, "share=2", "updates=1", "images=2", "rows=2"]),
        "quantized": lambda model: api.quantize(model, "w8a16"),
    }  # fmt: skip
    model = make[how](deep("dit")).model
    for options in ({"ratio": 0.3, "method": "magnitude"}, {"width_ratio": 0.3, "width_method": "magnitude"}):
        with pytest.raises(DitcompressError, match="E322"):
            prune(model, **options)
    if how == "quantized":
        with pytest.raises(DitcompressError, match="E322"):
            api.quantize(model, "w8a16")


def test_what_takes_the_place_of_parts_without_tensors_has_the_dtype_around_it() -> None:
    block, half = "blocks.1", torch.bfloat16
    held = {f"{block}.attn.add_k_proj.weight": half, f"{block}.mlp.weight": torch.float16, "proj.weight": torch.float32}
    checkpoint: Any = SimpleNamespace(
        tensors={name: SimpleNamespace(dtype=dtype) for name, dtype in held.items()},
        read=lambda name: torch.ones(1, dtype=held[name]),
    )
    new = {f"{block}.norm": nn.Linear(2, 2), f"{block}.mlp": nn.Linear(2, 2)}
    found = dict(cut_tensors(checkpoint, Cut({}, {}, linear=new), {name: name for name in held}, {}))
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        f"{block}.attn.add_k_proj.weight": half, "proj.weight": torch.float32,
        **{f"{block}.norm.{leaf}": half for leaf in ("weight", "bias")},
        **{f"{block}.mlp.{leaf}": torch.float16 for leaf in ("weight", "bias")},
    }  # fmt: skip


def test_a_width_that_one_number_of_the_configuration_says_needs_no_package_of_ours(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    config = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 8,
        "freq_dim": 16, "ffn_dim": 64, "num_layers": 3,
    }  # fmt: skip
    built(WanTransformer3DModel, config, 0).save_pretrained(tmp_path / "wan")  # type: ignore[operator]
    facts = prune(
        tmp_path / "wan", out=tmp_path / "narrow", width_ratio=0.5, width_units="neurons", width_method="magnitude"
    ).facts
    written = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert facts["stock"] and written["ffn_dim"] == 32 and "quantization_config" not in written
    model = WanTransformer3DModel.from_pretrained(tmp_path / "narrow")
    assert model.blocks[0].ffn.net[2].in_features == 32


def test_the_magnitude_of_a_unit_is_the_norm_of_all_that_belongs_to_it() -> None:
    model = deep("dit").double()
    layout = registry.get("dit").layout(model)
    state = model.state_dict()
    axis = layout.axes["transformer_blocks.1.attn1.heads"]
    found = magnitudes(layout, axis, lambda key: state[key])
    for head in range(4):
        rows, attn = slice(16 * head, 16 * head + 16), "transformer_blocks.1.attn1"
        parts = [state[f"{attn}.{leaf}.weight"][rows] for leaf in ("to_q", "to_k", "to_v")]
        parts.append(state[f"{attn}.to_out.0.weight"][:, rows])
        assert float(found[head]) == pytest.approx(float(sum(p.square().sum() for p in parts)) ** 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width_ratio": 1.0}, r"E203 bad-option\]: --width-ratio 1.0: is not between 0 and 1"),
        ({}, r"E203 bad-option\]: --ratio: is missing; give --ratio, --width-ratio or both"),
        ({"width_ratio": 0.5, "width_units": "rows"}, r"E203 bad-option\]: --width-units rows: is not known"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DitcompressError, match=message):
        prune(digits_folder(), dry_run=True, **arguments)


DAMAGED = {"transformer_blocks.0.ff.neurons": 0, "nowhere": 3, "transformer_blocks.0.attn1.heads": 9,
           "transformer_blocks.0.norm1.out": 3}  # fmt: skip


@pytest.mark.parametrize("axis", DAMAGED)
def test_a_damaged_entry_of_widths_is_refused(axis: str, tmp_path: Path) -> None:
    prune(digits_folder(), out=tmp_path / "narrow", width_ratio=0.25, width_method="magnitude")
    file = tmp_path / "narrow" / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["shapes"][axis] = DAMAGED[axis]
    file.write_text(json.dumps(config))
    with pytest.raises(DitcompressError, match="E320 bad-config"):
        load_model(tmp_path / "narrow")


def test_a_dry_run_says_what_would_be_narrowed() -> None:
    facts = prune(digits_folder(), width_ratio=0.5, width_units="heads", width_method="magnitude", dry_run=True).facts
    assert facts["removed"] == [] and {row["kept"] for row in facts["width"]["axes"].values()} == {2}


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_ratio_that_leaves_an_attention_without_a_head_is_refused_before_anything_runs(
    scope: str, tmp_path: Path
) -> None:
    model = deep("dit")  # four heads
    model.save_pretrained(tmp_path / "original")  # type: ignore[operator]
    model.forward = None  # type: ignore[method-assign, assignment]
    options: dict[str, Any] = {"width_ratio": 0.9, "width_method": "obs-diff", "width_overrides": [f"scope={scope}"]}
    line = (
        r"E203 bad-option\]: --width-ratio 0\.9: would leave no head of the 4 in transformer_blocks\.0\.attn1; "
        r"give a smaller ratio, or --width-units neurons\."
    )
    for given, more in ((model, {}), (tmp_path / "original", {"out": tmp_path / "narrow"})):
        with pytest.raises(DitcompressError, match=line) as caught:
            prune(given, **options, **more)
        assert "\n" not in caught.value.line()
    assert [path.name for path in tmp_path.iterdir()] == ["original"]
    with pytest.raises(DitcompressError, match="would leave no neuron of the 256"):
        prune(model, width_ratio=0.999, width_units="neurons", width_method="magnitude")


def test_three_of_four_heads_and_most_neurons_may_go() -> None:
    model = deep("dit")
    found = prune(model, width_ratio=0.8, width_method="magnitude").model
    assert found is not None and found.transformer_blocks[0].attn1.heads == 1  # type: ignore[union-attr, index]
    assert bool(run("dit", found, inputs("dit", model)).isfinite().all())
    narrow = prune(model, width_ratio=0.9, width_units="neurons", width_method="magnitude").model
    assert narrow is not None and narrow.transformer_blocks[0].ff.net[2].in_features == 26  # type: ignore[union-attr, index]


def test_a_block_whose_heads_all_score_lowest_keeps_its_best_one() -> None:
    """No configuration says that a block has no attention, so none loses all of it, however the loss is shared."""
    layout = registry.get("dit").layout(deep("dit"))
    axes = cut_axes(layout, "heads")
    scores = {axis.name: torch.arange(4.0) + (0 if number == 2 else 10) for number, axis in enumerate(axes)}
    kept = kept_units(layout, axes, scores, 0.5, "global")
    assert kept[axes[2].name] == [3]
    assert sum(4 - len(units) for units in kept.values()) == 2 * len(axes)


def test_narrowing_to_nothing_is_refused() -> None:
    model = deep("dit")
    layout = registry.get("dit").layout(model)
    with pytest.raises(DitcompressError, match=r"E205.*every unit would be removed; keep at least one"):
        narrow(model, layout, {"transformer_blocks.1.attn1.heads": []})

"""Removing blocks: what is left is the model with those blocks bypassed, and stock diffusers loads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ditcompress import api
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model
from ditcompress.models import adapter_for, depth_of, shortened
from ditcompress.pruning import Choice, Scores
from ditcompress.structure import remove_blocks, without_blocks

from .models import DEPTHS, REMOVED, bypassed, deep, inputs, run

FAMILIES = sorted(DEPTHS)


def depth(model: Any) -> Any:
    config = dict(model.config)
    return depth_of(config, adapter_for(config).layout(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_removing_blocks_equals_bypassing_them_in_the_running_model(name: str) -> None:
    model, removed = deep(name), REMOVED[name]
    given = inputs(name, model)
    expected = run(name, bypassed(name, model, removed), given)
    before = run(name, model, given)
    pruned = remove_blocks(model, depth(model), removed)
    assert torch.equal(run(name, pruned, given), expected)
    assert not torch.equal(before, expected)
    with without_blocks(model, depth(model), removed):
        assert torch.equal(run(name, model, given), expected)
    assert torch.equal(run(name, model, given), before)
    assert dict(model.config) == dict(deep(name).config)
    saved = sum(p.numel() for b in removed for p in model.get_submodule(b).parameters())
    assert sum(p.numel() for p in pruned.parameters()) == sum(p.numel() for p in model.parameters()) - saved


FRESH = """
import sys, torch, diffusers
for folder in sys.argv[1:]:
    given = torch.load(f"{folder}/../call.pt")
    model, report = getattr(diffusers, given["class"]).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        output = model.eval()(*given["args"], **given["kwargs"])[0]
    assert torch.equal(output, given["output"]), folder
assert "ditcompress" not in sys.modules
"""


def test_a_fresh_process_with_plain_diffusers_gives_the_same_outputs(tmp_path: Path, monkeypatch: Any) -> None:
    folders = []
    for name in FAMILIES:
        model = deep(name)
        model.save_pretrained(tmp_path / name / "original")  # type: ignore[operator]
        _choose(monkeypatch, REMOVED[name])
        out = tmp_path / name / "pruned"
        result = api.prune(tmp_path / name / "original", 0.5, out, method="magnitude")
        assert result.facts["removed"] == REMOVED[name]
        pruned = remove_blocks(model, depth(model), REMOVED[name])
        call: dict[str, Any] = {"class": type(model).__name__}

        def keep(module: Any, args: Any, kwargs: Any, output: Any, call: dict[str, Any] = call) -> None:
            call.update(args=args, kwargs=kwargs, output=output[0])

        pruned.register_forward_hook(keep, with_kwargs=True)
        run(name, pruned, inputs(name, model))
        torch.save(call, tmp_path / name / "call.pt")
        folders.append(str(out))
    done = subprocess.run([sys.executable, "-c", FRESH, *folders], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def _choose(monkeypatch: Any, blocks: list[str]) -> None:
    """Make `prune` remove exactly these blocks."""

    def chosen(context: Any, *_: Any) -> Choice:
        return Choice(tuple(blocks), tuple(blocks), Scores(dict.fromkeys(context.names, 0.0)), 0.5, None)

    monkeypatch.setattr("ditcompress.api.depth.choose", chosen)


def test_a_ratio_that_removes_nothing_reproduces_the_model_bit_for_bit(tmp_path: Path) -> None:
    result = api.prune(digits_folder(), 0.01, tmp_path / "out", method="random")
    assert result.facts["removed"] == []
    kept, original = tmp_path / "out" / "transformer", digits_folder() / "transformer"
    found, expected = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (kept, original))
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[n], expected[n]) and found[n].dtype == expected[n].dtype for n in found)
    configs = [json.loads((f / "config.json").read_text()) for f in (kept, original)]
    assert configs[0] == configs[1]


def test_a_pipeline_stays_a_pipeline_and_prune_json_says_what_went(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = api.prune(digits_folder(), 0.5, out, method="shortgpt", overrides=["samples=2", "timesteps=3"])
    facts = json.loads((out / "transformer" / "prune.json").read_text())
    assert facts == json.loads(json.dumps(result.facts))
    assert len(facts["removed"]) == 6 and len(facts["kept"]) == 6 and facts["kept"][0]["was"] == "transformer_blocks.0"
    assert set(facts["scores"]) == set(facts["by_timestep"]) and len(facts["timesteps"]) == 3
    for name, row in facts["by_timestep"].items():
        assert facts["scores"][name] == pytest.approx(sum(row) / 3)
    assert facts["output_sqnr_db"] > 5
    assert json.loads((out / "transformer" / "config.json").read_text())["num_layers"] == 6
    for file in ("model_index.json", "scheduler/scheduler_config.json", "manifest.json", "README.md"):
        assert (out / file).is_file()
    model, _ = load_model(out)
    original, _ = load_model(digits_folder())
    for row in facts["kept"]:
        pairs = zip(
            model.get_submodule(row["block"]).parameters(), original.get_submodule(row["was"]).parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def test_quantize_works_on_the_pruned_folder(tmp_path: Path) -> None:
    api.prune(digits_folder(), 0.5, tmp_path / "pruned", method="magnitude")
    result = api.quantize(tmp_path / "pruned", "w8a16", tmp_path / "small")
    assert {r.block for r in result.records} == {f"transformer_blocks.{i}" for i in range(6)}
    model, _ = load_model(tmp_path / "small")
    output = model(torch.randn(1, 1, 8, 8), torch.tensor([500]), torch.tensor([3]))[0]
    assert output.shape == (1, 1, 8, 8) and bool(output.isfinite().all())


def test_sd3_keeps_its_last_block_and_renumbers_its_table_of_second_attentions() -> None:
    model = deep("sd3")
    found = depth(model)
    assert "transformer_blocks.4" in found.fixed and len(found.units) == 4
    config = shortened(model.config, found, ["transformer_blocks.0", "transformer_blocks.2"])
    assert (config["num_layers"], tuple(config["dual_attention_layers"])) == (3, (0, 1))


def test_flux_counts_each_of_its_lists() -> None:
    model = deep("flux")
    config = shortened(model.config, depth(model), REMOVED["flux"])
    assert (config["num_layers"], config["num_single_layers"]) == (2, 2)


def test_dit_keeps_the_first_block_whose_embedding_the_head_reads() -> None:
    assert list(depth(deep("dit")).fixed) == ["transformer_blocks.0"]


HUNYUAN = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8,
    "hidden_size": 16, "num_layers": 8, "cross_attention_dim": 8, "cross_attention_dim_t5": 8, "text_len": 4,
    "text_len_t5": 4, "pooled_projection_dim": 8, "activation_fn": "gelu-approximate",
    "use_style_cond_and_image_meta_size": False,
}  # fmt: skip


def test_long_skips_go_in_pairs() -> None:
    from diffusers import HunyuanDiT2DModel

    from ditcompress.models._inputs import built

    model = built(HunyuanDiT2DModel, HUNYUAN, 0)
    model.register_to_config(_class_name="HunyuanDiT2DModel")  # type: ignore[operator]
    found = depth(model)
    assert [unit.blocks for unit in found.units] == [("blocks.0", "blocks.7"), ("blocks.1", "blocks.6"),
                                                     ("blocks.2", "blocks.5")]  # fmt: skip
    removed = found.of(["blocks.1"])
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 4, 8, generator=generator)
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator), "timestep": torch.tensor([4.0, 4.0]),
        "encoder_hidden_states": text, "text_embedding_mask": torch.ones(2, 4), "encoder_hidden_states_t5": text,
        "text_embedding_mask_t5": torch.ones(2, 4),
    }  # fmt: skip
    pruned, expected = remove_blocks(model, found, removed), bypassed("hunyuan", model, list(removed))
    with torch.no_grad():
        assert torch.equal(pruned(**call)[0], expected(**call)[0])


@pytest.mark.parametrize(
    ("cls", "units", "keys"),
    [
        ("Lumina2Transformer2DModel", 28, {"num_layers", "num_refiner_layers"}),
        ("MochiTransformer3DModel", 47, {"num_layers"}),
        ("NucleusMoEImageTransformer2DModel", 20, {"num_layers"}),
        ("WanVACETransformer3DModel", 32, {"num_layers"}),
        ("PRXTransformer2DModel", 16, {"depth"}),
        ("ChromaTransformer2DModel", 0, set()),
    ],
)
def test_what_may_go_is_read_from_the_class(cls: str, units: int, keys: set[str]) -> None:
    from ditcompress.models import build_meta

    config = {"_class_name": cls}
    found = depth_of(config, adapter_for(config).layout(build_meta(config)))
    assert (len(found.units), set(found.keys.values())) == (units, keys)

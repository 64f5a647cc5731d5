"""Shared weights through quantization: rounded once, stored once and tied, from the statistics of all their places."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ditcompress import api, prune, quantize, recipe
from ditcompress.api.calibration import calibrate
from ditcompress.errors import DitcompressError
from ditcompress.loading import dequantized, load_model
from ditcompress.models import adapter_for
from ditcompress.runtime.linear import PackedLinear
from ditcompress.sharing import copies_of, owner_of, tied

from .pruning.models import deep, inputs, run
from .test_sharing import FEW

WEIGHTS = "diffusion_pytorch_model.safetensors"
FEWER = ("calibration.samples=2", "calibration.steps=2", "calibration.reservoir=64")
SMOOTH = {
    "name": "smooth8",
    "calibration": {"samples": 2, "steps": 2},
    "rules": [
        {
            "roles": ["qkv", "attn_out", "ffn_in", "ffn_out"],
            "weight": {"format": "int", "bits": 8, "scale": "float32"},
            "smooth": "fold",
            "steps": [{"smooth": {}}, "rtn"],
        }
    ],
}
TRAINED = {
    "name": "trained",
    "training": {"steps": 2, "batch": 2, "images": 2, "sample_steps": 2, "learning_rate": 1e-4},
    "rules": [
        {
            "roles": ["qkv", "ffn_in", "ffn_out"],
            "weight": {"format": "ternary", "layout": "tensor", "packing": "bits"},
            "steps": ["terdit"],
        }
    ],
}
MIXED = {
    "name": "mixed",
    "calibration": {"samples": 2, "steps": 2, "weighting": "fisher"},
    "rules": [
        {
            "roles": ["qkv", "attn_out", "ffn_in", "ffn_out"],
            "weight": {"format": "int", "bits": 4, "layout": "group", "group": 32},
            "steps": [{"mixed": {"target_bits": 6.0}}, "gptq"],
        }
    ],
}
RECIPES = {"trained": TRAINED, "mixed": MIXED}


@pytest.fixture(scope="module", params=["dit", "flux"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family, and a folder with a model in which pairs of blocks share their weights."""
    there = tmp_path_factory.mktemp(request.param)
    deep(request.param).save_pretrained(there / "original")  # type: ignore[operator]
    prune(there / "original", 0.3, there / "shared", method="foldgpt", overrides=FEW)
    return request.param, there


def test_shared_linears_are_rounded_and_stored_once_and_tied(folder: tuple[str, Path]) -> None:
    family, there = folder
    made = quantize(there / "shared", "w8a8", there / "w8a8", overrides=FEWER)
    before, _ = load_model(there / "shared")
    after, checkpoint = load_model(there / "w8a8")
    stock = type(after).from_pretrained(there / "w8a8").eval()  # type: ignore[attr-defined]
    shared = copies_of(after)
    assert dict(shared) == dict(copies_of(before)) and shared
    for model in (after, stock):
        for copy, owner in shared.items():
            assert model.get_submodule(copy) is model.get_submodule(owner)
            assert isinstance(model.get_submodule(owner), PackedLinear)
    assert not any(name.startswith(tuple(f"{copy}." for copy in shared)) for name in checkpoint.tensors)
    assert not {record.site for record in made.records} & set(shared)
    given = inputs(family, before)
    wanted, found = run(family, before, given), run(family, after, given)
    assert torch.equal(found, run(family, stock, given))
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    facts = api.inspect(there / "w8a8")
    assert facts["parameters"] == sum(p.numel() for p in before.parameters())
    assert facts["bits"] == pytest.approx(made.bits)
    tensors = load_file(there / "w8a8" / WEIGHTS)
    assert facts["bytes"] == sum(t.nbytes for t in tensors.values())
    assert sum(r.stored_bytes for r in made.records) == sum(
        t.nbytes for n, t in tensors.items() if owner_of(n, shared).rpartition(".")[0] in facts_of(made)
        and not n.endswith(".bias")
    )  # fmt: skip
    again = quantize(before, recipe.load_recipe("w8a8", FEWER)).model
    assert again is not None and torch.equal(run(family, again, given), found)
    plain = dequantized(after)
    assert all(plain.get_submodule(a) is plain.get_submodule(b) for a, b in shared.items())


def facts_of(made: Any) -> set[str]:
    return {record.site for record in made.records}


def test_statistics_of_all_places_add_up(folder: tuple[str, Path]) -> None:
    _, there = folder
    api.export(there / "shared", there / "plain", dtype="float32", overwrite=True)
    one, many = (calibrate(there / name, recipe="w4a8", overrides=FEWER).inputs for name in ("shared", "plain"))
    offloaded = calibrate(there / "shared", recipe="w4a8", overrides=FEWER, offload="disk").inputs
    model, checkpoint = load_model(there / "shared")
    whole, shared = adapter_for(checkpoint.config).layout(model), copies_of(model)
    sites, seen = tied(whole, shared).by_name(), 0
    for name in {site.name for site in whole.sites} & set(shared.values()):
        places = [site.input_key for site in whole.sites if owner_of(site.name, shared) == name]
        found, parts = one[sites[name].input_key], [many[key] for key in places]
        assert len(parts) == 2 and found.gram is not None
        wanted = sum(part.gram for part in parts)  # type: ignore[misc]
        torch.testing.assert_close(found.gram, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        assert float(found.tokens) == sum(float(part.tokens) for part in parts)
        assert torch.allclose(found.high, torch.maximum(parts[0].high, parts[1].high), rtol=1e-4, atol=1e-5)
        other = offloaded[sites[name].input_key]  # its blocks are weighed last one first
        torch.testing.assert_close(found.gram, other.gram, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
        assert torch.equal(found.high, other.high) and torch.equal(found.reservoir, other.reservoir)
        seen += 1
    assert seen >= 4 and set(one) == {site.input_key for site in sites.values()}


class Notes:
    """A reporter that keeps its notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def task(self, name: str, total: int) -> Any:
        from ditcompress.console import Silent

        return Silent().task(name, total)


def test_smoothing_folds_into_rows_that_are_shared_too_and_else_stays_online(folder: tuple[str, Path]) -> None:
    family, there = folder
    notes = Notes()
    made = quantize(there / "shared", recipe.parse_recipe(SMOOTH, "test"), there / "smooth", reporter=notes)  # type: ignore[arg-type]
    before, _ = load_model(there / "shared")
    shared = set(copies_of(before).values())
    how = {record.site: (record.smooth, record.role) for record in made.records}
    assert {how[name][0] for name in shared if how[name][1] == "qkv"} == {"online"}
    assert "fold" in {how[name][0] for name in shared if how[name][1] == "attn_out"} | ({"fold"} & {family})
    assert any("shared linears smooth their inputs at run time" in line for line in notes.lines)
    after, _ = load_model(there / "smooth")
    given = inputs(family, before)
    wanted = run(family, before, given)
    assert float((run(family, after, given) - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("kind", ["trained", "mixed"])
def test_steps_that_train_or_choose_run_on_the_tied_model(kind: str, folder: tuple[str, Path]) -> None:
    family, there = folder
    made = quantize(there / "shared", recipe.parse_recipe(RECIPES[kind], "test"), there / kind)
    after, _ = load_model(there / kind)
    assert copies_of(after) and (kind == "trained" or made.bits <= 6)
    assert bool(run(family, after, inputs(family, after)).isfinite().all())


def test_a_fresh_process_loads_it_with_plain_diffusers(folder: tuple[str, Path]) -> None:
    family, there = folder
    if family != "dit":
        pytest.skip("one family is enough")
    quantize(there / "shared", "w4a16-rtn", there / "fresh")
    model, _ = load_model(there / "fresh")
    code = (
        "import ditcompress, torch; from diffusers import DiTTransformer2DModel as M\n"
        f"m = M.from_pretrained({str(there / 'fresh')!r}).eval()\n"
        "y = m(torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.tensor([3]))[0]\n"
        f"print(len({{id(m.get_submodule(n)) for n in {[*next(iter(copies_of(model).items()))]!r}}}))\n"
        "print(float(y.double().sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    with torch.no_grad():
        y = model(torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.tensor([3]))[0]
    assert done.stdout.split() == ["1", repr(float(y.double().sum()))], done.stderr[-2000:]
    facts = api.evaluate(
        there / "original", there / "fresh", pairs=2, inputs=2, timesteps=1, steps=2, shown=0, extractor="none",
        classifier="none", fresh_process=False, cost_batches=(1,), device="cpu",
    )  # fmt: skip
    assert facts["sizes"]["compressed"]["disk_bytes"] == (there / "fresh" / WEIGHTS).stat().st_size


def test_export_writes_every_place_and_distill_trains_what_is_stored(folder: tuple[str, Path]) -> None:
    family, there = folder
    quantize(there / "shared", "w8a16", there / "w8a16")
    api.export(there / "w8a16", there / "exported", dtype="float32")
    packed, _ = load_model(there / "w8a16")
    plain, checkpoint = load_model(there / "exported")
    assert checkpoint.quantization is None
    given = inputs(family, packed)
    torch.testing.assert_close(run(family, plain, given), run(family, packed, given), rtol=1e-4, atol=1e-5)
    api.distill(
        there / "original",
        there / "shared",
        there / "distilled",
        steps=2,
        batch=2,
        images=2,
        sample_steps=2,
        device="cpu",
    )
    old, new = (load_file(there / name / WEIGHTS) for name in ("shared", "distilled"))
    shared = json.loads((there / "distilled" / "config.json").read_text())["quantization_config"]["shared"]
    owner = next(iter(shared.values()))
    assert set(old) == set(new) and not torch.equal(old[f"{owner}.weight"], new[f"{owner}.weight"])
    load_model(there / "distilled")


def broken(config: dict[str, Any]) -> None:
    copy, owner = next(iter(config["shared"].items()))
    config["layers"][copy] = config["layers"][owner]


def turned(config: dict[str, Any]) -> None:
    config["shared"] = {owner: copy for copy, owner in config["shared"].items()}


@pytest.mark.parametrize("harm", [broken, turned])
def test_a_scheme_for_a_copy_and_an_owner_that_comes_later_are_refused(
    harm: Callable[[dict[str, Any]], None], folder: tuple[str, Path], tmp_path: Path
) -> None:
    _, there = folder
    if not (there / "bad").exists():
        quantize(there / "shared", "w4a16-rtn", there / "bad")
    shutil.copy(there / "bad" / WEIGHTS, tmp_path)
    config = json.loads((there / "bad" / "config.json").read_text())
    harm(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DitcompressError, match="E320"):
        load_model(tmp_path)


def test_what_cannot_be_done_with_shared_weights_is_one_line(folder: tuple[str, Path], tmp_path: Path) -> None:
    _, there = folder
    for other in (
        lambda: prune(there / "shared", 0.3, tmp_path / "a"),
        lambda: api.moe(there / "shared", tmp_path / "b"),
    ):
        with pytest.raises(DitcompressError, match="E322"):
            other()
    with pytest.raises(DitcompressError, match="E205"):
        quantize(there / "shared", "nf4", tmp_path / "c", overrides=("backend=bitsandbytes",))

"""Offloaded models: the same bits as resident ones for everything that runs them, and bad requests in one line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ditcompress import api
from ditcompress.calibration.collect import CalibrationSettings, collect
from ditcompress.calibration.conditions import get_conditions
from ditcompress.calibration.sensitivity import see_token_weights
from ditcompress.calibration.statistics import Statistics, flatten
from ditcompress.checkpoint.source import ModuleSource
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model
from ditcompress.models import registry
from ditcompress.offload import ATTRIBUTE, load_to_run, loaded, rewritten, tensor_of
from ditcompress.pruning import registry as methods
from ditcompress.structure import without_blocks

from .pruning.models import DEPTHS, REMOVED, deep, inputs, run
from .pruning.test_methods import context, few

FAMILIES = sorted(DEPTHS)
METHODS = [name for name in methods.names() if "training" not in methods.get(name).NEEDS]


@pytest.fixture(scope="module", params=FAMILIES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family and its deep tiny model on disk."""
    folder = tmp_path_factory.mktemp("offload") / request.param
    deep(request.param).save_pretrained(folder)  # type: ignore[operator]
    return request.param, folder


def models(folder: Path, way: str = "disk", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The resident and the offloaded one."""
    return load_model(folder, dtype=dtype)[0], load_to_run(folder, dtype=dtype, offload=way)[0]


def empty_inside(model: nn.Module) -> bool:
    """Whether no block holds data."""
    blocks = tuple(f"{block}." for block in getattr(model, ATTRIBUTE).blocks)
    return all(tensor.is_meta == name.startswith(blocks) for name, tensor in model.state_dict().items())


def same_statistics(first: Statistics, second: Statistics, blocks: Sequence[str]) -> None:
    """To the bit; but Gram matrices outside the blocks, which gather gradients of all blocks, to rounding."""
    inside = tuple(f"{block}." for block in blocks)
    ours, theirs = flatten(first), flatten(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        key, _, leaf = name.rpartition("|")
        if leaf == "gram" and not key.startswith(inside):
            assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6 * float(ours[name].abs().max())), name
        else:
            assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(("way", "dtype"), [("disk", torch.float32), ("cpu", torch.bfloat16)])
def test_outputs_are_those_of_the_resident_model(stored: tuple[str, Path], way: str, dtype: torch.dtype) -> None:
    name, folder = stored
    resident, offloaded = models(folder, way, dtype)
    given = inputs(name, resident)
    assert empty_inside(offloaded)
    assert torch.equal(run(name, resident, given), run(name, offloaded, given))
    assert empty_inside(offloaded)


def test_blocks_can_be_left_out(stored: tuple[str, Path]) -> None:
    name, folder = stored
    resident, offloaded = models(folder)
    given = inputs(name, resident)
    whole = run(name, offloaded, given)
    found = []
    for model in (resident, offloaded):
        with without_blocks(model, context(name, model).depth, REMOVED[name]):
            found.append(run(name, model, given))
    assert torch.equal(*found) and not torch.equal(found[1], whole)
    assert torch.equal(run(name, offloaded, given), whole)


@pytest.mark.parametrize("weighting", ["none", "fisher"])
def test_statistics_are_the_same_bits(stored: tuple[str, Path], weighting: Any) -> None:
    name, folder = stored
    family = registry.get(name)
    settings = CalibrationSettings(samples=2, steps=2, weighting=weighting, batch=2, buckets=2, reservoir=16)
    found = []
    for model in models(folder):
        config: Any = model.config
        conditions = get_conditions(ModuleSource(deep(name)), family, 2, 0)
        scheduler = family.default_scheduler(config)
        found.append(collect(model, family, config, family.layout(model), scheduler, conditions, settings))
    same_statistics(*found, family.layout(deep(name)).blocks)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_the_same_bits(stored: tuple[str, Path], method: str) -> None:
    name, folder = stored
    module = methods.get(method)
    first, second = (module.scores(context(name, model), module.Params()) for model in models(folder))
    assert first.values == second.values and first.by_timestep == second.by_timestep


def test_a_backward_pass_keeps_no_weight_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix that a gradient passes through is read twice: for the forward pass, and again on the way back."""
    deep("dit").save_pretrained(tmp_path / "dit")  # type: ignore[operator]
    model, _ = load_to_run(tmp_path / "dit", dtype=torch.float32, offload="disk")
    parts, read = getattr(model, ATTRIBUTE), []
    original = type(parts).__getitem__
    monkeypatch.setattr(type(parts), "__getitem__", lambda self, name: read.append(name) or original(self, name))
    module = methods.get("taylor")
    module.scores(context("dit", model), module.Params())
    matrix = "transformer_blocks.2.ff.net.2"
    assert read.count(f"{matrix}.weight") == 2 and read.count(f"{matrix}.bias") == 1
    assert empty_inside(model) and parts.watched is None


def test_weights_can_be_looked_at(stored: tuple[str, Path]) -> None:
    resident, offloaded = models(stored[1])
    block = getattr(offloaded, ATTRIBUTE).blocks[1]
    with loaded(offloaded, block) as part:
        mine, theirs = part.state_dict(), resident.get_submodule(block).state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert empty_inside(offloaded)


def test_a_compressed_model_and_one_with_experts_run_offloaded(w4a8: Path, tiny_dit: Path, tmp_path: Path) -> None:
    first, second = (api.sensitivity(w4a8, overrides=few("shortgpt"), offload=way) for way in ("none", "disk"))
    assert first == second
    api.moe(tiny_dit, tmp_path / "moe", method="random", overrides=["calibration.samples=4", "calibration.steps=4"])
    first, second = (
        api.sensitivity(tmp_path / "moe", overrides=few("shortgpt"), offload=way) for way in ("none", "cpu")
    )
    assert first == second


def test_calibrate_gives_the_same_digest_for_experts_too(tiny_dit: Path, tmp_path: Path) -> None:
    few = ["calibration.samples=4", "calibration.steps=4"]
    api.moe(tiny_dit, tmp_path / "moe", method="random", overrides=few)
    for folder in (tiny_dit, tmp_path / "moe"):
        first, second = (api.calibrate(folder, overrides=few, offload=way) for way in ("none", "disk"))
        same_statistics(first, second, ["transformer_blocks"] if folder == tiny_dit else [])


@pytest.mark.parametrize("method", ["moh", "uoe", "switch-dit"])
def test_routed_heads_and_masks_are_there_when_they_run(method: str, tiny_dit: Path, tmp_path: Path) -> None:
    """Their weights are read without calling the linears that own them."""
    few = ["calibration.samples=2", "calibration.steps=2"]
    api.moe(tiny_dit, tmp_path / "moe", method=method, overrides=few)
    first, second = (flatten(api.calibrate(tmp_path / "moe", overrides=few, offload=w)) for w in ("none", "disk"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():  # sums of many small gradients, in another order
        assert float((tensor.double() - second[name].double()).norm()) <= 1e-3 * float(tensor.double().norm()), name


def test_a_method_without_probes_can_be_measured_in_flops(tiny_dit: Path) -> None:
    first, second = (
        api.prune(tiny_dit, ratio=0.5, by="flops", method="magnitude", dry_run=True, offload=way)
        for way in ("none", "disk")
    )
    assert first.facts == second.facts


def test_commands_give_the_same_result(tmp_path: Path) -> None:
    given: dict[str, Any] = {"ratio": 0.5, "method": "oracle-greedy", "overrides": few("oracle_greedy")}
    results = [api.prune(digits_folder(), out=tmp_path / way, offload=way, **given) for way in ("none", "disk")]
    assert results[0].facts == results[1].facts
    weights = [(r.path / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() for r in results if r.path]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("method", "way"), [("magnitude", "disk"), ("udfc", "cpu"), ("obs-diff", "disk")])
def test_width_gives_the_same_result(method: str, way: str, tmp_path: Path) -> None:
    """After a block has gone, so that the offloaded ones have other names than in the file."""
    settings = [] if method != "obs-diff" else ["samples=2", "steps=2"]
    given: dict[str, Any] = {"ratio": 1 / 12, "method": "random", "width_ratio": 0.3, "width_method": method}
    results = [
        api.prune(digits_folder(), out=tmp_path / how, offload=how, width_overrides=settings, **given)
        for how in ("none", way)
    ]
    assert results[0].facts == results[1].facts
    assert (results[0].facts["width"]["output_sqnr_db"] is not None) == (method == "obs-diff")
    weights = [(r.path / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() for r in results if r.path]
    assert weights[0] == weights[1]


def test_rewritten_tensors_of_an_offloaded_block_run_and_are_put_back() -> None:
    name = "transformer_blocks.1.ff.net.2.weight"
    resident, offloaded = models(digits_folder() / "transformer")
    given = inputs("dit", resident)
    before = run("dit", offloaded, given)
    new = {name: torch.zeros_like(resident.get_parameter(name))}
    with rewritten(resident, new), rewritten(offloaded, new):
        assert torch.equal(run("dit", resident, given), run("dit", offloaded, given))
        assert torch.equal(tensor_of(offloaded, name), new[name])
        assert not torch.equal(run("dit", offloaded, given), before)
    assert torch.equal(run("dit", offloaded, given), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"offload": "gpu"}, r"E203 bad-option\]: --offload gpu: is not known; use none, cpu, disk"),
        ({"offload": "disk", "method": "tinyfusion"}, r"E203 bad-option\]: --offload disk: tinyfusion trains"),
        ({"offload": "disk", "method": "prune-best"}, r"E203 bad-option\]: --offload disk: prune-best"),
        (
            {"offload": "cpu", "width_ratio": 0.5, "width_method": "ecodiff", "method": "random"},
            "--offload cpu: ecodiff",
        ),
        ({"offload": "cpu", "by": "latency"}, r"E203 bad-option\]: --offload cpu: --by latency would time"),
    ],
)
def test_what_offloading_cannot_serve_is_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(DitcompressError, match=message):
        api.prune(digits_folder(), 0.5, dry_run=True, **arguments)  # type: ignore[arg-type]


class Mixer(nn.Module):
    """A block of two streams, which may change one of them."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.inner, self.changes = nn.Linear(8, 8), changes

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x.add_(0.1) if self.changes else x + 0.1
        return self.inner(x * (text.mean(1, keepdim=True) + 1))


class Text(nn.Module):
    """A linear of the text whose output enters every block as it is, as in PRX."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.text, self.last = nn.Linear(6, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Mixer(changes) for _ in range(3))

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        text = self.text(text)
        for block in self.blocks:
            x = 1.5 * x
            x = x + block(x, text)
        return self.last(x)


@pytest.mark.parametrize("changes", [False, True], ids=["kept", "changed in place"])
def test_what_enters_all_blocks_is_weighed_once(changes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a block changes its input in place, so that it cannot be run twice."""
    torch.manual_seed(0)
    model = Text(changes=changes).requires_grad_(False)
    blocks = tuple(f"blocks.{n}" for n in range(3))
    names = ["text", *(f"{block}.inner" for block in blocks), "last"]
    layout: Any = SimpleNamespace(sites=[SimpleNamespace(name=n, input_key=n) for n in names], blocks=blocks)
    adapter: Any = SimpleNamespace(predict=lambda model, x, t, cond: model(x * 1.0, cond["text"]))
    given = (model, adapter, layout, torch.randn(2, 5, 8), torch.tensor([3]), {"text": torch.randn(2, 4, 6)}, 7, None)
    found: list[dict[str, torch.Tensor]] = []
    for offloaded in (False, True):
        if offloaded:  # as far as this module is concerned
            monkeypatch.setattr("ditcompress.calibration.sensitivity.holding", lambda model: nullcontext())
            monkeypatch.setattr("ditcompress.calibration.sensitivity.reread", lambda model: nullcontext())
            setattr(model, ATTRIBUTE, object())
        seen: dict[str, torch.Tensor] = {}
        see_token_weights(*given, lambda key, x, w, seen=seen: seen.update({key: seen.get(key, 0) + w}))  # type: ignore[misc]
        found.append(seen)
    assert found[0].keys() == found[1].keys() == set(names)
    for name in names:
        assert torch.allclose(found[0][name], found[1][name], rtol=1e-5), name

"""dit-moe: upcycling keeps the function, gates are the router's softmax, the balance loss, and the page of the use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from ditcompress import api
from ditcompress.mixture._tokens import grid
from ditcompress.mixture._use import Use
from ditcompress.runtime.moe import MoEFeedForward, balance_loss, feed_forwards
from tests.moe.test_command import FEW, predicted
from tests.moe.test_layer import converted, layer


def upcycled(active: int, gate: str) -> MoEFeedForward:
    """A layer whose experts all are the first one."""
    moe = layer(active, gate)
    for expert in moe.experts:
        expert.load_state_dict(moe.experts[0].state_dict())
    moe.copies = True
    return moe


@pytest.mark.parametrize("active", [1, 2, 5])
def test_equal_experts_with_normalised_gates_are_that_expert_for_any_routing(active: int) -> None:
    moe = upcycled(active, "norm")
    x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert moe.shared is not None and moe.bias is not None
    wanted = moe.shared(x) + moe.experts[0](x) + moe.bias
    assert torch.allclose(moe(x), wanted, atol=1e-6)  # the router is float32
    assert torch.allclose(moe(x), moe.reference(x), atol=1e-12)


def test_without_normalising_the_routed_part_is_scaled_by_the_sum_of_the_chosen_scores() -> None:
    moe = upcycled(2, "softmax")
    x = torch.randn(11, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert moe.shared is not None and moe.bias is not None
    scores = moe.router(x).softmax(-1).topk(2, dim=-1).values.sum(-1, keepdim=True).double()
    assert torch.allclose(moe(x), moe.shared(x) + scores * moe.experts[0](x) + moe.bias, atol=1e-6)
    assert torch.allclose(moe(x), moe.reference(x), atol=1e-12)


def test_the_balance_loss_of_a_collapse_on_k_experts_and_its_gradient() -> None:
    experts, k = 8, 2
    uniform = torch.full((64, experts), 1 / experts)
    turns = torch.stack([torch.arange(64) % experts, (torch.arange(64) + 1) % experts], 1)
    assert float(balance_loss(uniform, turns)) == pytest.approx(1)
    collapsed = torch.zeros(64, experts)
    collapsed[:, :k] = 1 / k
    assert float(balance_loss(collapsed, torch.arange(k).expand(64, k))) == pytest.approx(experts / k)
    moe, x = layer(2, "softmax").float(), torch.randn(40, 16)
    moe.router.weight.requires_grad_(True)
    found = moe.route(x)
    share = torch.bincount(found.chosen.flatten(), minlength=5).float() / found.chosen.numel()
    (mine,) = torch.autograd.grad(balance_loss(found.probabilities, found.chosen), moe.router.weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(5 * (share * found.probabilities.mean(0)).sum(), moe.router.weight)
    assert torch.equal(mine, wanted) and float(mine.abs().sum()) > 0


def test_slices_have_gates_of_one_on_average_and_all_of_them_are_the_dense_layer() -> None:
    dense, sparse = converted("dit", "dit_moe", slices=8, shared=1, active=3)
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    for path, moe in feed_forwards(sparse).items():
        moe.gate = "share"
        assert torch.allclose(moe.route(x.reshape(-1, 64)).gates.mean(-1), torch.ones(18), atol=1e-6)
        moe.gate, moe.active = "one", 7
        assert torch.allclose(moe(x), dense.get_submodule(path)(x), atol=1e-10)


@pytest.fixture(scope="module")
def grown(
    tiny_dit: Path, tmp_path_factory: pytest.TempPathFactory, drawn: Callable[[], AbstractContextManager[None]]
) -> Path:
    out = tmp_path_factory.mktemp("moe") / "grown"
    with drawn():
        api.moe(tiny_dit, out, experts=4, method="dit-moe", overrides=(*FEW, "method.upcycle=copies"))
    return out


def test_an_upcycled_checkpoint_is_the_dense_model_and_is_counted(grown: Path, tiny_dit: Path) -> None:
    a, b = predicted(tiny_dit), predicted(grown)
    assert (a - b).norm() < 1e-5 * a.norm()
    facts = json.loads((grown / "moe.json").read_text())
    assert facts["sqnr_db"] > 80
    model = DiTTransformer2DModel.from_pretrained(grown)
    (ff, _) = feed_forwards(model).values()
    assert [e.net[0].proj.out_features for e in ff.experts] == [192] * 3 and ff.shared.net[0].proj.out_features == 64
    flops = facts["feed_forward_flops_per_token"]
    assert flops["dense"] == 2 * 2 * 2 * 64 * 256
    assert flops["active"] == 2 * 2 * 2 * 64 * (64 + 2 * 192) + 2 * 2 * 3 * 64
    assert facts["active_neurons"] == (64 + 2 * 192) / 256


def test_training_adds_the_balance_losses_of_the_layers(tiny_dit: Path, tmp_path: Path) -> None:
    first = {}
    for over in ("sum", "mean"):
        more = (
            *FEW,
            "training.balance=100",
            "training.output=0",
            "training.features=0",
            f"training.balance_over={over}",
        )
        first[over] = api.moe(tiny_dit, tmp_path / over, method="dit-moe", distill_steps=1, overrides=more)["distilled"]
    assert first["sum"]["first"] == pytest.approx(2 * first["mean"]["first"], rel=1e-5)  # two layers
    default = api.moe(tiny_dit, tmp_path / "d", method="dit-moe", distill_steps=1, overrides=more[:-1])["distilled"]
    assert default["first"] == first["sum"]["first"]


# --- the analyses ----------------------------------------------------------------------------------------------------


def test_use_by_timestep_and_class_adds_up_to_the_use_of_the_layer(grown: Path) -> None:
    facts = json.loads((grown / "moe.json").read_text())
    assert set(facts["routing"]) == {"timestep", "class"}
    for table in facts["routing"].values():
        assert list(table["layers"]) == list(facts["layers"])
        for rows in table["layers"].values():
            assert len(rows) == len(table["values"]) and all(sum(row) == pytest.approx(1, abs=1e-3) for row in rows)
    for row in facts["layers"].values():
        assert row["idlest"] == pytest.approx(min(row["use"]) * 3, abs=1e-4)


def test_use_is_attributed_to_the_samples_own_timestep_and_class() -> None:
    from ditcompress.distill.data import Batch

    moe = layer(1)
    moe.router.weight.zero_()
    model = torch.nn.Sequential(moe)
    use = Use(model)
    for expert, (time, label) in enumerate([(10, 3), (10, 4), (900, 3)]):
        moe.router.bias.copy_(5.0 * torch.nn.functional.one_hot(torch.tensor(expert), 5))
        use.next(Batch(torch.zeros(2, 1), torch.tensor([time] * 2), {"class_labels": torch.tensor([label] * 2)}))
        model(torch.zeros(2, 7, 16).double())
    use.close()
    tables = use.tables()
    assert tables["timestep"] == {"values": [10.0, 900.0], "layers": {"0": [[0.5, 0.5, 0, 0, 0], [0, 0, 1.0, 0, 0]]}}
    assert tables["class"] == {"values": [3, 4], "layers": {"0": [[0.5, 0, 0.5, 0, 0], [0, 1.0, 0, 0, 0]]}}
    assert moe.seen is None


def test_the_page_shows_heat_maps_and_tokens_and_asks_for_nothing_outside(grown: Path) -> None:
    page = (grown / "moe.html").read_text()
    for kind in ("timestep", "class"):
        assert f"Busiest expert by block and {kind}" in page and f"Every expert by {kind}" in page
    assert page.count("tokens of sample 1 by expert") == 2 * 3  # layers, steps
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page


@pytest.mark.parametrize(
    ("tokens", "shape", "wanted"),
    [
        (16, (4, 8, 8), (4, 4)),
        (8, (4, 8, 16), (2, 4)),
        (7, (4, 8, 8), None),
        (16, (16, 64), None),
        (15, (4, 8, 8), None),
    ],
)
def test_tokens_are_drawn_where_they_form_the_grid_of_the_latents(
    tokens: int, shape: tuple[int, ...], wanted: tuple[int, int] | None
) -> None:
    assert grid(tokens, shape) == wanted

"""moh: all heads on is the dense layer, grouped execution equals computing everything, scores, and the way to disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from typer.testing import CliRunner

from ditcompress import api
from ditcompress.cli.app import app
from ditcompress.runtime.attention import RoutedAttention
from ditcompress.runtime.heads import HeadRouter
from ditcompress.runtime.moe import Router
from tests.moe.routed_models import both, routed_model, written
from tests.moe.test_command import predicted

ATTN = "transformer_blocks.0.attn1"


@pytest.mark.parametrize("family", ["dit", "pixart"])
@pytest.mark.parametrize("shared", [[0, 2], [], [3]])
def test_all_heads_on_is_the_dense_model(family: str, shared: list[int]) -> None:
    heads = {"dit": 4, "pixart": 6}[family]
    dense, other, part = routed_model(
        family, "heads", ATTN, count=heads - len(shared), active=heads - len(shared), shared=shared
    )
    a, b = both(family, dense, other)
    assert torch.allclose(a, b, atol=1e-12)
    part.active = 1
    _, c = both(family, dense, other)
    assert (a - c).norm() > 1e-6 * a.norm()


@pytest.mark.parametrize("score", ["query", "learned"])
@pytest.mark.parametrize("shared", [[1], [0, 2], []])
@pytest.mark.parametrize("active", [1, 2])
def test_grouped_execution_equals_computing_every_head(score: str, shared: list[int], active: int) -> None:
    _, other, _ = routed_model("dit", "heads", ATTN, count=4 - len(shared), active=active, shared=shared, score=score)
    attn = other.get_submodule(ATTN)
    x = torch.randn(3, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(attn(x), RoutedAttention(reference=True)(attn, x), atol=1e-12)


def test_a_token_reaches_the_output_columns_of_its_own_heads_only() -> None:
    _, other, part = routed_model("dit", "heads", ATTN, count=3, active=1, shared=[1])
    attn, seen = other.get_submodule(ATTN), []
    part.seen = seen.append
    x = torch.randn(1, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = attn(x)[0]
    head = int(seen[0].chosen[0, 0])
    with torch.no_grad():
        attn.to_out[0].weight[:, [h for h in range(64) if h // 16 == part.routed[head]]] = 0
    changed = (attn(x)[0] - before).norm(dim=1) > 0
    assert torch.equal(changed, (seen[0].chosen == head).any(1))


def test_queries_choose_by_their_norm_in_standard_deviations() -> None:
    router = HeadRouter(8, 4, [0], 2, "query")
    queries = torch.zeros(1, 4, 2)
    queries[0, :, 0] = torch.tensor([9.0, 1, 3, 2])
    found = router.route(torch.zeros(1, 8), queries)
    assert found.chosen.tolist() == [[1, 2]]  # of the routed heads 1, 2, 3
    wanted = (torch.tensor([1.0, 3, 2]) / 1.0).softmax(-1)  # their standard deviation is 1
    assert torch.allclose(found.probabilities[0], wanted)
    assert torch.equal(found.gates, torch.ones(1, 2))


def test_learned_gates_from_zero_are_one_and_ties_go_by_index() -> None:
    _, _other, part = routed_model("dit", "heads", ATTN, count=2, active=1, shared=[0, 3], score="learned")
    for module in part.modules():
        if isinstance(module, Router):
            module.weight.zero_()
    x = torch.randn(6, 64)
    found = part.route(x, torch.randn(6, 4, 16))
    assert torch.equal(found.chosen, torch.zeros(6, 1, dtype=torch.long))
    assert torch.allclose(found.gates, torch.ones(6, 1)) and torch.allclose(part.shared_gates(x), torch.ones(6, 2))
    part.router.weight.normal_()
    part.within.weight.normal_()
    part.between.weight.normal_()
    gates, shared = part.route(x, torch.randn(6, 4, 16)).gates, part.shared_gates(x)
    assert torch.allclose(gates.mean(1) + shared.mean(1), torch.full((6,), 2.0))  # each averages its own weight of 2


def test_gradients_of_the_choice_reach_the_queries() -> None:
    _, other, _ = routed_model("dit", "heads", ATTN, count=3, active=1, shared=[0])
    attn = other.get_submodule(ATTN)
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    plain = attn(x).detach()
    attn.requires_grad_(True)
    y = attn(x)
    assert torch.allclose(y, plain, atol=1e-6)
    y.square().sum().backward()
    assert float(attn.to_q.weight.grad.abs().sum()) > 0


def test_the_checkpoint_loads_counts_and_trains(tiny_dit: Path, tmp_path: Path) -> None:
    facts = written(tiny_dit, tmp_path / "m", "moh")
    entry = facts["layers"][f"{ATTN}.head_router"]
    assert len(entry["shared"]) == 2 and entry["count"] == 2 and entry["active"] == 1
    flops = facts["block_linear_flops_per_token"]
    assert flops["dense"] - flops["active"] == 2 * 2 * 64 * 64 // 4  # a quarter of the output linears of two blocks
    done = written(tiny_dit, tmp_path / "t", "moh", "training.learning_rate=0.001", distill_steps=10)
    assert done["distilled"]["last"] < done["distilled"]["first"] and done["sqnr_db"] > facts["sqnr_db"]
    dense, model = (DiTTransformer2DModel.from_pretrained(p) for p in (tiny_dit, tmp_path / "t"))
    assert torch.equal(dense.transformer_blocks[0].ff.net[2].weight, model.transformer_blocks[0].ff.net[2].weight)
    assert not torch.equal(dense.get_submodule(ATTN).to_q.weight, model.get_submodule(ATTN).to_q.weight)


def test_all_heads_active_is_the_original_on_disk_and_a_quantized_one_runs(tiny_dit: Path, tmp_path: Path) -> None:
    written(tiny_dit, tmp_path / "all", "moh", shared=2, active=2)
    assert torch.allclose(predicted(tmp_path / "all"), predicted(tiny_dit), atol=1e-5)
    api.quantize(tmp_path / "all", "w8a16", tmp_path / "q")
    a, b = predicted(tiny_dit), predicted(tmp_path / "q")
    assert (a - b).norm() < 0.05 * a.norm()


@pytest.mark.parametrize("options", [["--shared", "4"], ["--active", "3"], ["--experts", "3"], ["--shared", "-1"]])
def test_numbers_that_do_not_fit_are_one_line(options: list[str], tiny_dit: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["moe", str(tiny_dit), "--out", str(tmp_path / "out"), "--method", "moh", *options])
    assert done.exit_code == 2 and "error[E203" in done.stderr and len(done.stderr.strip().splitlines()) == 1

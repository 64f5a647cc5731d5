"""uoe: the tensor-parallel partition is exact with everything active, experts choose tokens, and the way to disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ditcompress import api
from ditcompress.cli.app import app
from ditcompress.runtime.attention import RoutedAttention
from ditcompress.runtime.moe import assignments, share_of
from tests.moe.routed_models import both, routed_model, written
from tests.moe.test_command import predicted
from tests.moe.test_layer import layer

ATTN = "transformer_blocks.0.attn1"


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_all_groups_with_all_tokens_are_the_dense_attention(groups: int) -> None:
    dense, other, part = routed_model("dit", "groups", ATTN, count=groups, active=groups)
    a, b = both("dit", dense, other)
    assert torch.allclose(a, b, atol=1e-12)
    if groups > 1:
        part.active = 1
        assert (a - both("dit", dense, other)[1]).norm() > 1e-6 * a.norm()


@pytest.mark.parametrize("active", [1, 2, 4])
def test_groups_attend_among_their_own_tokens_as_a_mask_would_have_it(active: int) -> None:
    _, other, _ = routed_model("dit", "groups", ATTN, count=4, active=active)
    attn = other.get_submodule(ATTN)
    x = torch.randn(3, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(attn(x), RoutedAttention(reference=True)(attn, x), atol=1e-12)


def test_queries_are_computed_for_the_chosen_tokens_only() -> None:
    _, other, part = routed_model("dit", "groups", ATTN, count=4, active=1)
    attn, seen = other.get_submodule(ATTN), []
    part.seen = seen.append
    x = torch.randn(2, 8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = attn(x)
    none = (seen[0].chosen < 0).all(-1).reshape(2, 8)
    bias = attn.to_out[0].bias
    assert torch.allclose(before[none], bias.expand(int(none.sum()), -1)) and bool(none.any())
    counts = torch.bincount(seen[0].chosen[seen[0].chosen >= 0], minlength=4)
    assert counts.tolist() == [2 * 2] * 4  # samples, a quarter of the tokens: every group has the same load


@pytest.mark.parametrize("active", [0, 1, 2, 5])
@pytest.mark.parametrize("shared", [False, True])
def test_feed_forward_experts_that_choose_tokens_equal_the_loop(active: int, shared: bool) -> None:
    moe = layer(active, "one", shared)
    moe.choice = "expert"
    x = torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if active:
        assert torch.allclose(moe(x), moe.reference(x), atol=1e-12)
        alone = torch.cat([moe(sample[None]) for sample in x])
        assert torch.allclose(moe(x), alone, atol=1e-12)  # samples do not compete
    assert moe(x).shape == x.shape and moe(x[:0]).shape == x[:0].shape
    if active == 5:
        assert moe.bias is not None
        total = sum(expert(x) for expert in moe.experts) + moe.bias
        assert torch.allclose(moe(x), total if moe.shared is None else total + moe.shared(x), atol=1e-12)


def test_shares_and_assignments_of_tokens() -> None:
    assert [share_of(9, k, 4) for k in (1, 2, 4)] == [3, 5, 9] and share_of(2, 1, 8) == 1
    found = assignments(torch.tensor([[[0, 2], [2, 1]]]), 4)
    assert found.tolist() == [[0, -1], [1, -1], [1, 0], [-1, -1]]


def test_all_active_is_the_original_on_disk(tiny_dit: Path, tmp_path: Path) -> None:
    facts = written(tiny_dit, tmp_path / "all", "uoe", active=4)
    assert torch.allclose(predicted(tmp_path / "all"), predicted(tiny_dit), atol=1e-5)
    flops = facts["block_linear_flops_per_token"]
    assert flops["dense"] == flops["active"]


def test_half_of_everything_trains_and_tells_of_tokens_without_an_expert(tiny_dit: Path, tmp_path: Path) -> None:
    facts = written(tiny_dit, tmp_path / "m", "uoe")
    assert {path.rpartition(".")[2] for path in facts["layers"]} == {"ff", "head_router"}
    row = facts["layers"]["transformer_blocks.0.ff"]
    assert row["choice"] == "expert" and row["use"] == [0.25] * 4 and 0 <= row["without"] < 0.5
    flops = facts["block_linear_flops_per_token"]
    assert flops["dense"] - flops["active"] == 2 * (2 * 64 * 256 + 4 * 64 * 64)  # half of both, in two blocks
    more = ("training.learning_rate=0.001",)
    done = written(tiny_dit, tmp_path / "t", "uoe", *more, distill_steps=12)
    assert done["distilled"]["last"] < done["distilled"]["first"] and done["sqnr_db"] > facts["sqnr_db"]
    api.quantize(tmp_path / "t", "w8a16", tmp_path / "q")
    a, b = predicted(tmp_path / "t"), predicted(tmp_path / "q")
    assert (a - b).norm() < 0.1 * a.norm()


def test_tokens_may_choose_the_feed_forwards_experts(tiny_dit: Path, tmp_path: Path) -> None:
    facts = written(tiny_dit, tmp_path / "m", "uoe", "method.choice=token", "method.attention=false")
    assert list(facts["layers"]) == [f"transformer_blocks.{n}.ff" for n in (0, 1)]
    assert all(row["without"] == 0 and row["choice"] == "token" for row in facts["layers"].values())


@pytest.mark.parametrize("options", [["--experts", "3"], ["--experts", "8"], ["--active", "5"], ["--active", "0"]])
def test_numbers_that_do_not_fit_are_one_line(options: list[str], tiny_dit: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["moe", str(tiny_dit), "--out", str(tmp_path / "out"), "--method", "uoe", *options])
    assert done.exit_code == 2 and "error[E203" in done.stderr and len(done.stderr.strip().splitlines()) == 1

"""bench: every arm in its modes, ratios to the plain one, bytes as they are in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ditcompress import api
from ditcompress.console import Silent
from ditcompress.errors import DitcompressError
from ditcompress.evaluation import peers
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model

from ..commands import run


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "w4"
    api.quantize(digits_folder(), "w4a16-rtn", out, reporter=Silent())
    return out


def test_a_packed_model_is_timed_beside_the_plain_one_at_every_level(packed: Path) -> None:
    facts = api.bench([packed], batch=2, modes=["eager"], seconds=0, steps=2, peers=False, reporter=Silent())
    rows = {(r["level"], r["arm"]): r for r in facts["rows"]}
    plain, once, kept = "bfloat16 (w4)", "w4", "w4, kept decoded"
    assert {arm for _, arm in rows} == {plain, once, kept}
    assert {level for level, _ in rows} == {"linear", "block", "forward", "sampling"}
    for (_, arm), row in rows.items():
        assert 0 < row["p10"] <= row["seconds"] <= row["p90"]
        assert arm != plain or row["ratio"] == 1
    forward = {arm: rows["forward", arm] for arm in (plain, once, kept)}
    assert forward[once]["bytes"] < forward[plain]["bytes"] / 2 < forward[kept]["bytes"]
    assert forward[once]["sqnr_db"] > 30 and abs(forward[once]["sqnr_db"] - forward[kept]["sqnr_db"]) < 0.2
    assert facts["skipped"] == []


def test_peers_quantize_the_plain_model_where_they_are_installed() -> None:
    reporter = Silent()
    facts = api.bench([digits_folder()], batch=1, modes=["eager"], seconds=0, reporter=reporter)
    arms = {r["arm"] for r in facts["rows"]}
    for name in peers.PEERS:
        assert (name in arms) != any(name in note for note in reporter.notes)
    assert {r["ratio"] for r in facts["rows"] if r["arm"] == "bfloat16 (digits)"} == {1.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA graphs are there")
def test_a_mode_that_the_device_lacks_is_one_line() -> None:
    with pytest.raises(DitcompressError, match="--mode graph: is none for cpu; take eager, compiled"):
        api.bench([digits_folder()], modes=["graph"])


def test_the_command_prints_a_document(packed: Path) -> None:
    done = run("bench", packed, "--mode", "eager", "--seconds", "0", "--no-peers", "--batch", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["batch"] == 1


def test_inspect_says_which_kernel_runs_what(packed: Path) -> None:
    rows = api.inspect(packed)["kernels"]
    assert sum(row["layers"] for row in rows) == sum("int" in layer["done"] for layer in api.inspect(packed)["layers"])
    assert all(row["cpu"] == "reference" and row["shape"] and "int4 group" in row["done"] for row in rows)


def test_a_packed_model_is_one_graph(packed: Path) -> None:
    model, _ = load_model(packed)
    size, channels = model.config.sample_size, model.config.in_channels
    latents = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    given = {"timestep": torch.tensor([3, 500]), "class_labels": torch.tensor([1, 2])}
    torch._dynamo.reset()
    with torch.no_grad():
        traced = torch.compile(model, backend="eager", fullgraph=True)(latents, **given).sample
        assert torch.equal(traced, model(latents, **given).sample)

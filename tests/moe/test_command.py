"""The whole path: convert, load with plain diffusers in a fresh process, quantize, distil, refuse bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ditcompress
from ditcompress import api
from ditcompress.cli.app import app
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model
from ditcompress.runtime.linear import PackedLinear
from ditcompress.runtime.moe import MoEFeedForward, feed_forwards
from tests.test_loading import IMPORTS, fresh

FEW = ("calibration.samples=4", "calibration.steps=4", "probe=1", "training.images=4", "training.sample_steps=3",
       "training.batch=4", "scoring=2", "images=1")  # fmt: skip


# As LOAD for every folder given, in one process: starting it takes most of the time.
LOAD_ALL = """
import sys, hashlib, torch
{first}
{second}
torch.set_num_threads(1)
found = []
for folder in sys.argv[1:]:
    model = DiTTransformer2DModel.from_pretrained(folder)
    torch.manual_seed(0)
    c = model.config
    x = torch.randn(2, c.in_channels, c.sample_size, c.sample_size)
    with torch.no_grad():
        y = model(x, torch.tensor([3, 900]), torch.tensor([0, 1])).sample
    found.append(hashlib.sha256(y.numpy().tobytes()).hexdigest())
print(*found)
"""


def predicted(folder: Path, **options: Any) -> torch.Tensor:
    model = DiTTransformer2DModel.from_pretrained(folder, **options)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    c = model.config
    x = torch.randn(2, c.in_channels, c.sample_size, c.sample_size)
    with torch.no_grad():
        return model(x.to(model.dtype), torch.tensor([3, 900]), torch.tensor([0, 1])).sample


@pytest.fixture(scope="module")
def experts(tiny_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moe") / "tiny"
    api.moe(tiny_dit, out, overrides=(*FEW, "method.refit=false"))
    return out


@pytest.fixture(scope="module")
def quantized(experts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The converted model by recipe."""
    folder = tmp_path_factory.mktemp("small")
    few = {"w4a16-rtn": [], "w4a8": ["calibration.samples=2", "calibration.steps=2"]}
    for recipe, overrides in few.items():
        api.quantize(experts, recipe, folder / recipe, overrides=overrides)
    return {recipe: folder / recipe for recipe in few}


def test_a_fresh_process_with_plain_diffusers_gives_the_same_outputs(experts: Path, quantized: dict[str, Path]) -> None:
    """The fresh process imports ours first, this one diffusers."""
    folders = [experts, *quantized.values()]
    mine = [hashlib.sha256(predicted(folder).numpy().tobytes()).hexdigest() for folder in folders]
    assert fresh(LOAD_ALL.format(first=IMPORTS[0], second=IMPORTS[1]), *map(str, folders)) == " ".join(mine)
    ours, _ = load_model(experts)
    theirs = DiTTransformer2DModel.from_pretrained(experts).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


def test_routing_is_real_and_the_router_survives_a_bfloat16_load(experts: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(experts, torch_dtype=torch.bfloat16)
    stored = load_file(experts / "diffusion_pytorch_model.safetensors")
    layers = feed_forwards(model)
    assert list(layers) == ["transformer_blocks.0.ff", "transformer_blocks.1.ff"]
    seen: list[int] = []
    for path, layer in layers.items():
        assert layer.router.weight.dtype == torch.float32
        assert torch.equal(layer.router.weight, stored[f"{path}.router.weight"])
        for expert in layer.experts:
            expert.register_forward_hook(lambda m, a, y: seen.append(len(a[0])))
    model(torch.randn(2, 4, 8, 8).bfloat16(), torch.tensor([3, 900]), torch.tensor([0, 1]))
    assert sum(seen) == 2 * 2 * 2 * 16  # layers, active, images, tokens: no expert saw more than its own


def test_with_all_experts_the_saved_model_is_the_original(experts: Path, tiny_dit: Path, tmp_path: Path) -> None:
    shutil.copytree(experts, tmp_path / "all")
    config = json.loads((tmp_path / "all/config.json").read_text())
    for entry in config["quantization_config"]["experts"].values():
        entry["active"] = entry["experts"]
    (tmp_path / "all/config.json").write_text(json.dumps(config))
    a, b, two = predicted(tiny_dit), predicted(tmp_path / "all"), predicted(experts)
    assert (a - b).norm() < 1e-5 * a.norm() < 1e-2 * (a - two).norm()


def test_saving_the_loaded_model_again_gives_the_same_model(experts: Path, tmp_path: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(experts)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(predicted(tmp_path / "again"), predicted(experts))


def test_the_same_command_gives_the_same_bytes(experts: Path, tiny_dit: Path, tmp_path: Path) -> None:
    api.moe(tiny_dit, tmp_path / "again", overrides=(*FEW, "method.refit=false"))
    first, second = (json.loads((f / "manifest.json").read_text()) for f in (experts, tmp_path / "again"))
    assert (
        first["files"]["diffusion_pytorch_model.safetensors"] == second["files"]["diffusion_pytorch_model.safetensors"]
    )


def test_the_report_counts_what_is_there(experts: Path) -> None:
    facts = json.loads((experts / "moe.json").read_text())
    model, _ = load_model(experts)
    buffers = sum(b.numel() for n, b in model.named_buffers() if ".router." in n)
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters()) + buffers
    idle = sum(5 * sum(p.numel() for p in m.experts[0].parameters()) for m in feed_forwards(model).values())
    assert facts["parameters"]["active"] == facts["parameters"]["total"] - idle
    flops = facts["feed_forward_flops_per_token"]
    assert flops["dense"] == 2 * 2 * 2 * 64 * 256
    assert flops["active"] == flops["dense"] * 3 // 8 + 2 * 2 * 7 * 64
    for row in facts["layers"].values():
        assert sum(row["use"]) == pytest.approx(1, abs=1e-4) and row["busiest"] >= 1


def test_inspect_shows_experts(experts: Path) -> None:
    facts = api.inspect(experts)
    assert set(facts["experts"].values()) == {"2 of 7 routed experts, 1 shared"}
    assert facts["active_parameters"] < facts["parameters"]
    assert CliRunner().invoke(app, ["inspect", str(experts), "--layers"]).exit_code == 0


@pytest.mark.parametrize("recipe", ["w4a16-rtn", "w4a8"])
def test_experts_are_quantized(recipe: str, experts: Path, quantized: dict[str, Path]) -> None:
    model = DiTTransformer2DModel.from_pretrained(quantized[recipe])
    layer = model.transformer_blocks[0].ff
    assert isinstance(layer, MoEFeedForward)
    assert all(isinstance(e.net[0].proj, PackedLinear) for e in layer.experts)
    a, b = predicted(experts), predicted(quantized[recipe])
    assert (a - b).norm() < 0.5 * a.norm()


def test_a_converted_model_in_memory_is_quantized_too(experts: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(experts)
    small = ditcompress.quantize(model, "w8a16").model
    assert small is not None and isinstance(small.transformer_blocks[0].ff.experts[3].net[2], PackedLinear)


def test_distillation_lowers_the_loss_resumes_and_leaves_plain_weights(
    tiny_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditcompress.distill import trainer

    more = (*FEW, "training.save_every=3", "training.learning_rate=0.001")
    facts = api.moe(tiny_dit, tmp_path / "whole", distill_steps=12, overrides=more)
    assert facts["distilled"]["steps"] == 12 and facts["distilled"]["last"] < facts["distilled"]["first"]
    step = trainer._step

    def killed(task: Any, settings: Any, optimizer: Any, number: int, ranks: Any) -> float:
        if number == 7:
            raise KeyboardInterrupt
        return step(task, settings, optimizer, number, ranks)

    monkeypatch.setattr(trainer, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        api.moe(tiny_dit, tmp_path / "parts", distill_steps=12, overrides=more)
    monkeypatch.setattr(trainer, "_step", step)
    api.moe(tiny_dit, tmp_path / "parts", distill_steps=12, overrides=more)
    a, b = (load_file(tmp_path / n / "diffusion_pytorch_model.safetensors") for n in ("whole", "parts"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert torch.equal(predicted(tmp_path / "whole"), predicted(tmp_path / "parts"))


def test_without_training_ours_is_at_least_3_db_above_random_on_the_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    less = ("images=0", "probe=1", "calibration.samples=8", "calibration.reservoir=512", "calibration.steps=6",
            "training.sample_steps=3")  # fmt: skip
    quick = {"random": (), "moe-best": ("method.rounds=1",)}
    found = {
        method: api.moe(digits_folder(), tmp_path / method, method=method, overrides=(*less, *more))
        for method, more in quick.items()
    }
    shares = {f["feed_forward_flops_per_token"]["active"] for f in found.values()}
    assert len(shares) == 1
    with capsys.disabled():
        print({name: round(f["sqnr_db"], 2) for name, f in found.items()}, "dB at", found["random"]["active_neurons"])
    assert found["moe-best"]["sqnr_db"] > found["random"]["sqnr_db"] + 3


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        (["--experts", "7"], "E203", 2),
        (["--active", "8"], "E203", 2),
        (["--shared", "8"], "E203", 2),
        (["--distill-steps", "-1"], "E203", 2),
        (["--distill-steps", "2", "--data", "/no/such", "--dry-run"], "E301", 3),
        (["--method", "moe-bset"], "E201", 2),
        (["--set", "method.round=3"], "E202", 2),
        (["--set", "calibration.sample=3"], "E202", 2),
        (["--set", "training.learning_rate=-1"], "E202", 2),
        (["--set", "gate=two"], "E202", 2),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], code: str, status: int, tiny_dit: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["moe", str(tiny_dit), "--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code == status, done.output
    assert f"error[{code}" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_converting_twice_bitsandbytes_and_the_plain_export_are_refused(experts: Path, tmp_path: Path) -> None:
    for call, code in (
        (lambda: api.moe(experts, tmp_path / "a"), "E322"),
        (lambda: api.quantize(experts, "nf4", tmp_path / "b"), "E205"),
        (lambda: api.export(experts, tmp_path / "c", "diffusers"), "E205"),
    ):
        with pytest.raises(DitcompressError) as caught:
            call()
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"active": 8}, "E320"), ({"width": 31}, "E320"), ({"experts": 10**6}, "E320"), ({"gate": "x"}, "E320"),
        ({"more": 1}, "E320"), ({"active": "2"}, "E320"), ({"offset": False}, "E316"),
    ],
)  # fmt: skip
def test_a_damaged_entry_is_refused_by_both_doors(
    change: dict[str, Any], code: str, experts: Path, tmp_path: Path
) -> None:
    shutil.copytree(experts, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["quantization_config"]["experts"]["transformer_blocks.0.ff"].update(change)
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    for door in (load_model, DiTTransformer2DModel.from_pretrained):
        with pytest.raises(DitcompressError) as caught:
            door(tmp_path / "m")
        assert caught.value.code == code


def test_a_missing_tensor_of_an_expert_is_refused_by_both_doors(experts: Path, tmp_path: Path) -> None:
    shutil.copytree(experts, tmp_path / "m")
    file = tmp_path / "m/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["transformer_blocks.1.ff.experts.4.net.2.weight"]
    save_file(tensors, file)
    for door in (load_model, DiTTransformer2DModel.from_pretrained):
        with pytest.raises(DitcompressError) as caught:
            door(tmp_path / "m")
        assert caught.value.code == "E315"


def test_a_dry_run_writes_nothing(tiny_dit: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["moe", str(tiny_dit), "--out", str(tmp_path / "out"), "--dry-run", "--json"])
    facts = json.loads(done.stdout)
    assert facts["active_neurons"] == 3 / 8 and not (tmp_path / "out").exists()

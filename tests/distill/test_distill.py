"""distill: what a student must be, what training does to it, resumption, adapters, and what stock diffusers loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from ditcompress import api
from ditcompress.api._logs import open_log
from ditcompress.calibration.trajectory import generator
from ditcompress.console import Silent
from ditcompress.distill.data import Batch
from ditcompress.distill.losses import FEATURES, SIGMA, masked_features, normalised_features, parse_loss
from ditcompress.distill.matching import pairs_of, read_kept
from ditcompress.distill.student import Student
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.models import registry as families

from .models import cached, shortened

WEIGHTS = "diffusion_pytorch_model.safetensors"
FEW: dict[str, Any] = {"steps": 12, "batch": 8, "images": 8, "sample_steps": 5, "device": "cpu"}
EVERY = ",".join(f"{name}=0.5" for name in ("output", *FEATURES))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with every second of its twelve blocks."""
    folder = tmp_path_factory.mktemp("students") / "half"
    return shortened(digits_folder() / "transformer", folder, list(range(0, 12, 2)))


class Stop(Silent):
    """Interrupts the training after some steps."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Any]:
        done = [0]

        def advance(units: int = 1, said: str = "") -> None:
            done[0] += units
            if description == "train" and done[0] > 7:
                raise KeyboardInterrupt

        yield advance


# --- losses and matching ---------------------------------------------------------------------------------------------


def test_features_are_relative_and_outliers_are_masked() -> None:
    draw = generator(0, 0)
    teacher = [torch.randn(3, 16, 32, generator=draw) for _ in range(2)]
    student = [t + 0.1 * torch.randn(t.shape, generator=draw) for t in teacher]
    for name, loss in FEATURES.items():
        assert loss(teacher, teacher) == 0, name
        scaled = loss([7 * s for s in student], [7 * t for t in teacher])
        assert scaled == pytest.approx(loss(student, teacher).item(), rel=1e-4)
        parts = [loss([s[i : i + 1] for s in student], [t[i : i + 1] for t in teacher]) for i in range(3)]
        assert torch.stack(parts).mean() == pytest.approx(loss(student, teacher).item(), rel=1e-5)  # ranks may average
    assert SIGMA == 2
    wild = [t.clone() for t in teacher]
    for tensor in wild:
        tensor[:, 3, 5] = 1e4
    masked = masked_features(student, wild)
    plain = normalised_features(student, teacher)
    assert masked == pytest.approx(plain.item(), rel=0.05)
    assert normalised_features(student, wild) > 10 * plain


def test_blocks_answer_for_the_removed_ones_behind_them(tmp_path: Path) -> None:
    teacher = [f"blocks.{i}" for i in range(8)]
    student = [f"blocks.{i}" for i in range(4)]
    even = [(f"blocks.{i}", f"blocks.{2 * i + 1}") for i in range(4)]
    assert list(pairs_of(student, teacher, None)) == even
    assert list(pairs_of(student, teacher, {"blocks.0": "blocks.9"})) == even  # of another model: not believed
    kept = dict(zip(student, ("blocks.0", "blocks.1", "blocks.5", "blocks.6"), strict=True))
    assert [t for _, t in pairs_of(student, teacher, kept)] == ["blocks.0", "blocks.4", "blocks.5", "blocks.7"]
    assert pairs_of(teacher, teacher, None) == tuple((b, b) for b in teacher)
    rows = {"kept": [{"block": new, "was": old} for new, old in kept.items()], "removed": teacher[2:5] + teacher[7:]}
    (tmp_path / "prune.json").write_text(json.dumps(rows))
    assert read_kept(tmp_path, teacher) == kept and read_kept(tmp_path, [*teacher, "blocks.8"]) is None
    (tmp_path / "prune.json").write_text("[")
    assert read_kept(tmp_path, teacher) is None


@pytest.mark.parametrize(
    ("text", "code"), [("outptu=1", "E201"), ("output=x", "E203"), ("output=-1", "E203"), ("output=0", "E203")]
)
def test_bad_weights_of_losses(text: str, code: str) -> None:
    with pytest.raises(DitcompressError) as caught:
        parse_loss(text)
    assert caught.value.code == code
    assert parse_loss("output,masked=0.1,task=0") == {"output": 1.0, "masked": 0.1}


class Fixed:
    """One batch for ever."""

    def __init__(self, adapter: Any, config: Any, size: int = 3) -> None:
        self.adapter = adapter
        draw = generator(0, 1)
        latents = torch.randn(size, *adapter.latent_shape(config), generator=draw)
        self.held = Batch(
            latents, torch.tensor([3.0, 400.0, 900.0][:size]), adapter.random_conditions(config, size, draw)
        )

    def batch(self, step: int, size: int, part: int = 0, rows: slice = slice(None)) -> Batch:
        return self.held


def task_of(family: Any, model: Any, teacher: Any, loss: str = EVERY, **options: Any) -> Student:
    blocks = family.layout(model).blocks
    pairs = pairs_of(blocks, family.layout(teacher).blocks, None)
    return Student(model, teacher, Fixed(family, teacher.config), parse_loss(loss), pairs, blocks=blocks, batch=3,
                   steps=1, **options)  # fmt: skip


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "generic"])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(name: str) -> None:
    family = families.get(name)
    for seed, zero in ((0, True), (1, False)):
        task = task_of(family, family.tiny(seed), family.tiny(0))
        loss = task.loss(0, 0)
        loss.backward()
        moved = [p.grad.abs().max() for p in task.parameters().values() if p.grad is not None]
        assert (loss.item() == 0) is zero and (max(moved).item() == 0) is zero


def test_adapters_merge_to_what_they_were_and_begin_at_the_model() -> None:
    family = families.get("dit")
    task = task_of(family, family.tiny(1), family.tiny(0), "output=1", lora=4)
    plain = task_of(family, family.tiny(1), family.tiny(0), "output=1")
    assert task.loss(0, 0).item() == plain.loss(0, 0).item()
    names = task.parameters()
    assert "transformer_blocks.0.ff.net.2.lora_up" in names and "transformer_blocks.0.ff.net.2.bias" in names
    assert "transformer_blocks.0.ff.net.2.weight" not in names and "proj_out_2.weight" not in names
    draw = generator(0, 2)
    with torch.no_grad():
        for tensor in names.values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=draw)
    apart = task.loss(0, 0).item()
    trained = task.finish()
    assert task.loss(0, 0).item() == pytest.approx(apart, rel=1e-5)
    assert "transformer_blocks.0.ff.net.2.weight" in trained and not any("lora" in name for name in trained)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    family = families.get("dit")
    grads = []
    for on in (False, True):
        task = task_of(family, family.tiny(1), family.tiny(0), checkpointing=on)
        task.loss(0, 0).backward()
        grads.append({name: p.grad for name, p in task.parameters().items() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][n], grads[1][n], rtol=1e-4, atol=1e-7) for n in grads[0])


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_training_half_of_the_blocks_lowers_the_error_and_stock_diffusers_loads_it(half: Path, tmp_path: Path) -> None:
    options = {**FEW, "steps": 60, "batch": 32, "images": 16, "learning_rate": 1e-3, "loss": "output=1,masked=0.3"}
    result = api.distill(digits_folder(), half, tmp_path / "out", **options)
    before, after = result.facts["before"], result.facts["after"]
    assert after["output"] < 0.3 * before["output"] and after["masked"] < before["masked"]
    assert result.facts["matched_by"] == "prune.json" and len(result.history.losses) == 60
    assert result.facts["blocks"][-1] == ["transformer_blocks.5", "transformer_blocks.11"]
    said = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert said["losses"] == list(result.history.losses) and said["options"]["steps"] == 60
    assert (tmp_path / "out" / "prune.json").exists() and not list(tmp_path.glob(".out*"))
    code = (
        "import sys, diffusers; m = diffusers.DiTTransformer2DModel.from_pretrained(sys.argv[1]);"
        "print(len(m.transformer_blocks), 'ditcompress' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.stdout.split() == ["6", "False"], done.stderr


def test_a_student_equal_to_its_teacher_stays_what_it_is(tiny_dit: Path, tmp_path: Path) -> None:
    result = api.distill(tiny_dit, shutil.copytree(tiny_dit, tmp_path / "same"), tmp_path / "out", loss=EVERY, **FEW)
    assert set(result.history.losses) == {0.0} and set(result.facts["after"].values()) == {0.0}
    found, was = load_file(tmp_path / "out" / WEIGHTS), load_file(tiny_dit / WEIGHTS)
    assert found.keys() == was.keys() and all(torch.equal(found[name], was[name]) for name in was)


@pytest.mark.parametrize(
    "more", [{}, {"lora": 4, "ema": 0.9}, {"data": "latents", "accumulate": 2}, {"optimizer": "adamw8bit"}]
)
def test_an_interrupted_run_ends_with_the_same_bytes(half: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    if "data" in more:
        more = {**more, "data": str(cached(tmp_path / "latents")), "loss": "output=1,task=0.1"}
    options = {**FEW, **more, "learning_rate": 1e-3, "save_every": 4}
    try:
        api.distill(digits_folder(), half, tmp_path / "whole", **options)
    except DitcompressError as error:
        if error.code != "E205":
            raise
        pytest.skip(error.line())  # no 8-bit moments on this device
    with pytest.raises(KeyboardInterrupt):
        api.distill(digits_folder(), half, tmp_path / "out", reporter=Stop(), **options)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.work" / "training.pt").exists()
    with pytest.raises(DitcompressError, match=r"E503.*learning_rate"):
        api.distill(digits_folder(), half, tmp_path / "out", **{**options, "learning_rate": 1e-4})
    api.distill(digits_folder(), half, tmp_path / "out", **options)
    for name in (WEIGHTS, "distill.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_dtype_and_pipeline_stay_as_the_student_had_them(tmp_path: Path) -> None:
    pipeline = shutil.copytree(digits_folder(), tmp_path / "pipeline")
    shutil.rmtree(pipeline / "transformer")
    shortened(digits_folder() / "transformer", pipeline / "transformer", [0, 3, 6, 11], dtype=torch.bfloat16)
    api.distill(digits_folder(), pipeline, tmp_path / "out", **FEW, dtype="bfloat16", learning_rate=1e-3)
    found = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    was = load_file(pipeline / "transformer" / WEIGHTS)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {n: (t.dtype, t.shape) for n, t in was.items()}
    assert any(not torch.equal(found[name], was[name]) for name in was)
    assert (tmp_path / "out" / "model_index.json").exists() and (tmp_path / "out" / "scheduler").is_dir()


def test_a_diverged_training_keeps_its_last_state_and_goes_on_with_a_lower_rate(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**FEW, "save_every": 2, "learning_rate": 1e-3}
    loss = Student.loss

    def broken(self: Student, step: int, part: int) -> torch.Tensor:
        return loss(self, step, part) * (float("nan") if step == 7 else 1.0)

    monkeypatch.setattr(Student, "loss", broken)
    with pytest.raises(DitcompressError, match=r"E703.*step 7.*state of step 6 is kept"):
        api.distill(digits_folder(), half, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.work" / "training.pt").exists()
    monkeypatch.undo()
    with pytest.raises(DitcompressError, match="E503"):
        api.distill(digits_folder(), half, tmp_path / "out", **{**options, "learning_rate": 1e-2})
    result = api.distill(digits_folder(), half, tmp_path / "out", **{**options, "learning_rate": 1e-4})
    assert result.facts["diverged"] == [{"at": "training step 7", "learning_rate": 1e-3}]
    assert len(result.history.losses) == 12 and result.facts["options"]["learning_rate"] == 1e-4
    monkeypatch.setattr(Student, "measure", lambda self, batch: {"output": float("nan")})
    with pytest.raises(DitcompressError, match=r"E701.*before any training"):
        api.distill(digits_folder(), half, tmp_path / "wild", **options)
    monkeypatch.undo()
    with pytest.raises(DitcompressError, match="E703"):  # a rate beyond any sense
        api.distill(digits_folder(), half, tmp_path / "wild", **{**options, "learning_rate": 1e30})


def test_eight_bit_moments_where_the_device_has_them(half: Path, tmp_path: Path) -> None:
    try:
        result = api.distill(digits_folder(), half, tmp_path / "out", **FEW, optimizer="adamw8bit")
    except DitcompressError as error:
        assert error.code == "E205" and "adamw8bit" in error.line()
    else:
        assert result.facts["after"]["output"] < result.facts["before"]["output"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code"),
    [({"steps": 0}, "E203"), ({"batch": 0}, "E203"), ({"dtype": "float16"}, "E203"), ({"loss": "task=1"}, "E203"),
     ({"data": "/no/such"}, "E301"), ({"data": "/no/such", "dry_run": True}, "E301"),
     ({"learning_rate": float("inf")}, "E203"), ({"guidance": float("nan")}, "E203"),
     ({"lora": -1}, "E203"), ({"sched": 1}, "E203")],
)  # fmt: skip
def test_options_out_of_range(tiny_dit: Path, tmp_path: Path, options: dict[str, Any], code: str) -> None:
    student = shutil.copytree(tiny_dit, tmp_path / "student")
    with pytest.raises(DitcompressError) as caught:
        api.distill(tiny_dit, student, tmp_path / "out", **{**FEW, **options})
    assert caught.value.code == code and not (tmp_path / "out").exists()


def test_a_model_that_is_no_part_of_the_teacher(tiny_dit: Path, half: Path, tmp_path: Path) -> None:
    families.get("pixart").tiny().save_pretrained(tmp_path / "pixart")
    digits = digits_folder()
    config = diffusers.DiTTransformer2DModel.load_config(half)
    for name, change in (("wide", {"num_attention_heads": 8}), ("large", {"sample_size": 16})):
        diffusers.DiTTransformer2DModel.from_config({**config, **change}).save_pretrained(tmp_path / name)
    for teacher, student, word in (
        (digits, tmp_path / "pixart", "class"),
        (digits, tmp_path / "wide", "teacher's"),
        (digits, tmp_path / "large", "draws"),
        (half, digits, "blocks"),
        (tiny_dit, half, "draws"),
    ):
        with pytest.raises(DitcompressError, match=f"E340.*{word}"):
            api.distill(teacher, student, tmp_path / "out", **FEW)
    result = api.distill(digits, half, tmp_path / "out", **FEW, dry_run=True)
    assert result.path is None and not (tmp_path / "out").exists()


def test_a_tensorboard_log_where_tensorboard_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "out.tensorboard")

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *error: Any) -> None:
            pass

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with open_log(tmp_path / "out", True, Silent()) as log:
        assert log is not None
        log(3, 0.5, 1e-4)
    assert seen == [("loss", 0.5, 3), ("learning_rate", 1e-4, 3)]
    with open_log(tmp_path / "out", False, Silent()) as log:
        assert log is None

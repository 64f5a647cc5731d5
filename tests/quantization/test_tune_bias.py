"""Trained biases: what is trained is what will run, codes stay, the output comes nearer, and it may be left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditcompress import api, recipe
from ditcompress.api import _training
from ditcompress.calibration.conditions import get_conditions
from ditcompress.calibration.trajectory import Sampling
from ditcompress.checkpoint.source import ModuleSource
from ditcompress.distill.data import Trajectories
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model
from ditcompress.models import registry as families

RULE: dict[str, Any] = {
    "weight": {"format": "int", "bits": 3, "layout": "group", "group": 16, "symmetric": False},
    "steps": ["rtn", "tune_bias"],
}
INPUT = {"mode": "token", "bits": 4, "symmetric": False}
TRAINING = {"steps": 60, "batch": 16, "images": 16, "sample_steps": 8, "refresh": 100}


def small(training: dict[str, Any] | None = TRAINING, **rule: Any) -> recipe.Recipe:
    value = {"name": "small", "calibration": {"samples": 2, "steps": 2}, "rules": [{**RULE, **rule}]}
    return recipe.parse_recipe(value | ({"training": training} if training else {}), "small")


def forward(family: Any, model: Any, count: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, *family.latent_shape(model.config), generator=generator)
    cond = family.random_conditions(model.config, count, generator)
    with torch.no_grad():
        return family.predict(model, latents, torch.linspace(20, 980, count), cond)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "rule", [{}, {"activation": INPUT, "rotate": "full"}, {"activation": INPUT, "smooth": "online"}]
)
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_the_student_is_the_model_that_will_run(monkeypatch: pytest.MonkeyPatch, name: str, rule: Any) -> None:
    family = families.get(name)
    model, seen = family.tiny(), []
    if "smooth" in rule:
        rule = {**rule, "steps": ["smooth", "rtn", "tune_bias"]}

    def untrained(task: Any, *_: Any, **__: Any) -> Any:
        seen.append(forward(family, task.student))
        return _training.History((1.0,))

    monkeypatch.setattr(_training, "train", untrained)
    compressed = api.quantize(model, small(**rule)).model
    error = (forward(family, compressed) - seen[0]).norm() / seen[0].norm()
    assert error < 5e-3  # a value on the border between two codes may fall to either side


def test_the_output_comes_nearer_with_the_same_codes() -> None:
    family, model = families.get("dit"), load_model(digits_folder())[0]
    before = [p.requires_grad for p in model.parameters()]
    plain, tuned = (api.quantize(model, small(training)).model for training in (None, TRAINING))
    assert plain is not None and tuned is not None
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    wanted = forward(family, model)
    errors = [float((forward(family, found) - wanted).square().sum()) for found in (plain, tuned)]
    assert errors[1] < 0.95 * errors[0]
    one, other = plain.state_dict(), tuned.state_dict()
    assert {n for n in one if not torch.equal(one[n], other[n])} <= {n for n in one if n.endswith(".bias")}


def test_without_memory_it_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditcompress.console import Silent

    class Notes(Silent):
        def __init__(self) -> None:
            self.said: list[str] = []

        def note(self, text: str) -> None:
            self.said.append(text)

    monkeypatch.setattr(_training, "free_memory", lambda device: 10)
    notes = Notes()
    api.quantize(families.get("dit").tiny(), small(), reporter=notes)
    assert any(text.startswith("not trained") for text in notes.said)


def test_folded_smoothing_is_refused() -> None:
    with pytest.raises(DitcompressError, match=r"E202.*smooth: online"):
        api.quantize(families.get("dit").tiny(), small(smooth="fold", steps=["smooth", "rtn", "tune_bias"]))


def test_only_as_much_of_a_training_is_kept_as_held_out_states_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that ran away is undone, with a note; the codes and biases are those of no training."""
    family = families.get("dit")
    model, settled = family.tiny(), []

    def away(task: Any, *_: Any, **__: Any) -> Any:
        with torch.no_grad():
            for tensor in task.parameters().values():
                tensor.add_(100 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
        return _training.History((1.0,))

    settle = _training.Imitation.settle
    monkeypatch.setattr(_training, "train", away)
    monkeypatch.setattr(_training.Imitation, "settle", lambda *given: settled.append(settle(*given)) or settled[-1])
    tuned, plain = (api.quantize(model, small(training)).model for training in (TRAINING, None))
    assert settled == [0.0]
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in tuned.state_dict().items())


@pytest.mark.parametrize(("steps", "images", "size"), [(25, 512, 64), (20, 128, 64), (64, 128, 64), (10, 64, 64)])
def test_held_out_states_are_of_all_steps(steps: int, images: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    no_conditions = SimpleNamespace(null=None)
    data = Trajectories(None, None, {}, None, no_conditions, None, images=images, held=images // 8)  # type: ignore[arg-type]
    data.latents, data.timesteps, data.number = torch.zeros(steps, images, 1), torch.arange(steps), 0
    monkeypatch.setattr(data, "_states", lambda where, image, _: (where.tolist(), image.tolist()))
    where, image = data.judging(0, size)  # type: ignore[misc]
    assert len({*zip(where, image, strict=True)}) == size and min(image) >= images - images // 8
    assert len({*where}) == min(steps, size)


def test_held_out_images_are_not_trained_on() -> None:
    family = families.get("dit")
    model = family.tiny()
    conditions = get_conditions(ModuleSource(model), family, 6, 0)
    scheduler = family.default_scheduler(model.config)
    data = Trajectories(model, family, model.config, scheduler, conditions, Sampling(3, 1.0, 0), images=6, held=2,
                        refresh=10)  # fmt: skip
    judged = data.judging(9, 100)
    assert len(judged.latents) == 6 and len(judged.timestep.unique()) == 3
    trained = torch.cat([data.batch(step, 16).latents for step in range(10)]).flatten(1)
    assert not (trained[:, None] == judged.latents.flatten(1)[None]).all(-1).any()
    assert len(data.judging(9, 4).latents) == 4

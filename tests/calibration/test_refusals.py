"""What calibration is given is checked before it is used, and the cache notices another scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ditcompress.api.calibration import scheduler_digest
from ditcompress.calibration import text
from ditcompress.calibration.conditions import get_conditions
from ditcompress.calibration.schedulers import load_scheduler
from ditcompress.checkpoint.source import ModuleSource
from ditcompress.console import Silent
from ditcompress.errors import DitcompressError
from ditcompress.models import dit, flux, pixart


@pytest.mark.parametrize(
    "fields",
    [
        {"_class_name": "DDIMScheduler", "beta_schedule": "nope"},
        {"_class_name": "DDIMScheduler", "num_train_timesteps": -5},
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "x"},
    ],
    ids=["schedule", "steps", "algorithm"],
)
def test_a_scheduler_that_does_not_build_is_one_line(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(fields))
    with pytest.raises(DitcompressError, match="E332"):
        load_scheduler(dit.tiny().config, tmp_path, dit, Silent())


EMBEDS = torch.zeros(2, 5, 48)


@pytest.mark.parametrize(
    ("family", "tensors", "word"),
    [
        (dit, {"class_labels": torch.tensor([1, 99])}, "labels 1 to 99"),
        (dit, {"class_labels": torch.tensor([1, 2]), "null.class_labels": torch.tensor([11])}, "null.class_labels"),
        (dit, {"class_labels": torch.tensor([1.0, 2.0])}, "float32"),
        (pixart, {"encoder_hidden_states": torch.zeros(2, 5, 47)}, "shape"),
        (pixart, {"encoder_hidden_states": torch.zeros(2, 48)}, "shape"),
        (pixart, {"encoder_hidden_states": EMBEDS / 0}, "NaN"),
        (flux, {"encoder_hidden_states": EMBEDS}, "pooled_projections is missing"),
    ],
    ids=["label", "null-label", "label-kind", "width", "rank", "nan", "missing"],
)
def test_a_conditions_file_that_does_not_fit_names_the_tensor(
    tmp_path: Path, family: Any, tensors: dict[str, torch.Tensor], word: str
) -> None:
    path = tmp_path / "c.safetensors"
    save_file(tensors, path)
    with pytest.raises(DitcompressError, match="E330") as caught:
        get_conditions(ModuleSource(family.tiny()), family, 2, 0, file=path)
    assert word in f"{caught.value.where} {caught.value.what}"


def test_other_token_counts_and_no_mask_are_accepted_and_a_lacking_null_branch_is_said(tmp_path: Path) -> None:
    path, reporter = tmp_path / "c.safetensors", Silent()
    save_file({"encoder_hidden_states": EMBEDS}, path)
    found = get_conditions(ModuleSource(pixart.tiny()), pixart, 3, 0, file=path, reporter=reporter)
    assert found.count == 3 and found.null is None and "null." in reporter.notes[0]


@pytest.mark.parametrize("body", ["[", "[]", "{}"])
def test_a_pipeline_without_an_index_is_one_line(tmp_path: Path, body: str) -> None:
    (tmp_path / "model_index.json").write_text(body)
    with pytest.raises(DitcompressError, match=r"E3[23]0.*model_index"):
        text.from_pipeline(tmp_path, ["a cat"], 1, {})


def test_the_cache_notices_another_scheduler_of_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    file.write_text("{}")
    before = scheduler_digest(tmp_path)
    file.write_text('{"timestep_spacing": "trailing"}')
    assert scheduler_digest(tmp_path) != before and scheduler_digest(None) == ""


def test_a_recipe_may_name_its_class_labels() -> None:
    """DiTAS calibrates on 16 fixed ImageNet classes; a model with fewer classes gets all of its own, said aloud."""
    model = dit.tiny()
    source, told = ModuleSource(model), Silent()
    classes = int(model.config["num_embeds_ada_norm"])
    asked = [0, classes - 1]
    assert get_conditions(source, dit, 5, 0, labels=asked).labels.tolist() == [0, classes - 1, 0, classes - 1, 0]
    found = get_conditions(source, dit, classes, 0, labels=[classes], reporter=told)
    assert sorted(found.labels.tolist()) == list(range(classes)) and "beyond this model's" in told.notes[0]

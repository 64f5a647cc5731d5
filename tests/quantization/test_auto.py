"""Budgets of bits, bytes and dB, and the trade-off curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditcompress import api
from ditcompress.api import compress
from ditcompress.api._quantized import checked_plan
from ditcompress.api.target import parse_size, retarget, with_target
from ditcompress.console import Silent
from ditcompress.errors import DitcompressError
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import open_model
from ditcompress.models import adapter_for
from ditcompress.plan import LayerDecision, StepSpec, WeightSpec
from ditcompress.quantization import mixed
from ditcompress.quantization._damage import sampled
from ditcompress.quantization._knapsack import Choice
from ditcompress.recipe import load_recipe

CHEAP = "rules.0.steps.1={rtn: {}}"
FEW = ["calibration.samples=4", "calibration.steps=4", "rules.0.steps.1={gptq: {damp: 0.01}}"]


@pytest.fixture(scope="module")
def auto(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("auto") / "out"
    return api.quantize(digits_folder(), "auto", out, overrides=FEW, target_bits=4.0, device="cpu")


def test_the_budget_holds_for_what_is_stored_and_the_curve_rises(auto: Any) -> None:
    assert 3.7 < auto.bits <= 4.0
    curve = json.loads((auto.path / "transformer" / "tradeoff.json").read_text())
    assert [p["bits"] for p in curve] == sorted(p["bits"] for p in curve)
    assert [p["predicted_db"] for p in curve] == sorted(p["predicted_db"] for p in curve)
    (chosen,) = [p for p in curve if p["chosen"]]
    assert chosen["bits"] == pytest.approx(auto.bits, abs=1e-6)
    assert len({(d.weight.params["bits"], d.weight.params.get("group")) for d in auto.plan.layers}) > 3


def test_the_verification_pass_measures_about_what_is_predicted(auto: Any) -> None:
    (chosen,) = [p for p in auto.plan.curve if p.chosen]
    # four images: GPTQ fits their few tokens better than those of others
    assert chosen.nearest_db - 6 < auto.measured_db < chosen.predicted_db + 3
    assert chosen.predicted_db > chosen.nearest_db + 1  # GPTQ leaves less than rounding to nearest


def test_a_size_is_kept(tmp_path: Path) -> None:
    result = api.quantize(digits_folder(), "auto", tmp_path / "out", overrides=FEW, target_size="600kB", device="cpu")
    assert 560_000 < result.bytes <= 600_000


def test_a_db_target_is_met_by_the_measurement(tmp_path: Path) -> None:
    result = api.quantize(digits_folder(), "auto", tmp_path / "out", overrides=FEW, target_db=20.0, device="cpu")
    assert result.measured_db is not None and 20 <= result.measured_db < 25
    assert result.bits < 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target_bits": 4.0, "target_db": 30.0}, "one budget"),
        ({"target_size": "many"}, "is not a size"),
        ({"target_size": "1kB"}, "what stays as it is takes"),
        ({"target_bits": 0.5}, "is not within"),
    ],
)
def test_bad_targets_are_one_line(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DitcompressError, match="E203") as caught:
        api.quantize(digits_folder(), "auto", tmp_path / "out", **arguments)
    assert words in caught.value.line() and not (tmp_path / "out").exists()


def test_a_target_that_no_choice_meets_names_the_nearest(tmp_path: Path) -> None:
    for target, unit in (({"target_bits": 1.5}, "bits"), ({"target_db": 150.0}, "dB")):
        with pytest.raises(DitcompressError, match=rf"E202.*the nearest is [0-9.]+ {unit}"):
            api.quantize(digits_folder(), "auto", tmp_path / "out", overrides=FEW, device="cpu", **target)  # type: ignore[arg-type]


def test_a_recipe_without_a_budget_refuses_a_target(tmp_path: Path) -> None:
    with pytest.raises(DitcompressError, match=r"E203.*use recipe auto"):
        api.quantize(digits_folder(), "w8a16", tmp_path / "out", target_bits=4.0)


def test_a_budget_that_no_layer_has_refuses_a_target(tmp_path: Path) -> None:
    auto, plain = load_recipe("auto"), load_recipe("w4a16-rtn")
    unmatched = auto.rules[0].model_copy(update={"names": ("nothing*",)})
    recipe = auto.model_copy(update={"rules": (unmatched, *plain.rules)})
    with pytest.raises(DitcompressError, match=r"E203.*has no budget"):
        api.quantize(digits_folder(), recipe, tmp_path / "out", target_db=30.0, dry_run=True)


def test_fallbacks_are_said(tmp_path: Path) -> None:
    reporter = Silent()
    overrides = ["rules.0.weight={format: int, bits: 4, layout: group, group: 36}"]
    api.quantize(digits_folder(), "w4a16-rtn", tmp_path / "out", overrides=overrides, dry_run=True, reporter=reporter)
    assert any("group 36 does not divide width 64" in note for note in reporter.notes)


def test_sizes_are_read_with_their_units() -> None:
    assert [parse_size(t) for t in ("6GB", "1.5 MB", "12", "2KiB")] == [6 * 10**9, 1_500_000, 12, 2048]


def test_a_new_budget_replaces_all_of_the_old_one() -> None:
    recipe = retarget(load_recipe("auto"), target_db=40.0, share=0.3)
    checkpoint, meta = open_model(digits_folder())
    layout = adapter_for(checkpoint.config).layout(meta)
    plan = checked_plan(recipe, layout)
    for given, expected in (
        ((5.0, None, None), {"target_bits": 5.0, "target_db": None, "share": None}),
        ((None, None, 30.0), {"target_db": 30.0, "share": None}),
    ):
        found = with_target(recipe, checkpoint, layout, plan, *given)
        (params,) = [step.params for rule in found.rules for step in rule.steps if step.name == "mixed"]
        assert {name: params[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("measured", "aims", "said"),
    [([31.0], [30.0], ""), ([20.0, 29.0, 31.0], [30.0, 30.3, 31.6], ""), ([20.0, 21.0, 22.0], [30.0], "not reached")],
)
def test_a_missed_target_is_aimed_at_by_what_was_measured(
    measured: list[float], aims: list[float], said: str, tiny_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second try knows the share of the damage that was left, the third also how far the second missed."""
    left, asked = iter(measured), []
    real = mixed.choose

    def choose(decisions: Any, read: Any, statistics: Any, params: Any) -> Any:
        asked.append((params.target_db, params.share))
        return real(decisions, read, statistics, params)

    monkeypatch.setattr(compress, "measured_db", lambda *args, **more: next(left))
    monkeypatch.setattr(mixed, "choose", choose)
    reporter = Silent()
    result = api.quantize(tiny_dit, "auto", tmp_path / "out", overrides=[*FEW, CHEAP], target_db=30.0,
                          device="cpu", reporter=reporter)  # fmt: skip
    assert result.measured_db == measured[-1] and len(asked) >= len(measured)
    assert [aim for aim, _ in asked][: len(aims)] == pytest.approx(aims, abs=0.5)
    assert asked[0][1] is None and all(share is not None for _, share in asked[1:])
    assert any(said in note for note in reporter.notes) if said else not any("reached" in n for n in reporter.notes)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no work of a try is left


def test_the_sample_of_the_gain_counts_a_linear_by_its_damage() -> None:
    decision = LayerDecision("x", "qkv", WeightSpec("int", {"bits": 4}), steps=(StepSpec("rtn"),))
    costs = [60.0, 10.0, 10.0, 10.0, 10.0]
    found = sampled([Choice(1, cost, decision) for cost in costs])
    assert sum(times for _, times in found) == 8
    assert [times for choice, times in found if choice.cost == 60] == [5]

"""Margins and gates at their edges, the number of pairs that is named, and unsafe texts in reports and cards."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from ditcompress import api
from ditcompress.errors import DitcompressError
from ditcompress.evaluation import intervals
from ditcompress.evaluation.digits import digits_folder
from ditcompress.evaluation.verdict import (
    FAIL,
    INCONCLUSIVE,
    PASS,
    PROFILES,
    Margin,
    decide,
    gate,
    margins_of,
    missing_gates,
    moved,
)
from ditcompress.report.card import evaluated_card, quantized_card
from ditcompress.result import Measurement

LEAST, MOST = Margin("psnr", least=25.0), Margin("psnr", most=5.0)


def measured(low: float, high: float, **others: Any) -> Measurement:
    fields: dict[str, Any] = {"value": (low + high) / 2, "low": low, "high": high, "n": 64, **others}
    return Measurement("psnr", "PSNR", "T3", "dB", True, **fields)


@pytest.mark.parametrize(
    ("low", "high", "margin", "outcome"),
    [
        (25.0, 30.0, LEAST, PASS),
        (24.999, 30.0, LEAST, INCONCLUSIVE),
        (20.0, 25.0, LEAST, INCONCLUSIVE),
        (20.0, 24.999, LEAST, FAIL),
        (0.0, 5.0, MOST, PASS),
        (0.0, 5.001, MOST, INCONCLUSIVE),
        (5.0, 9.0, MOST, INCONCLUSIVE),
        (5.001, 9.0, MOST, FAIL),
        (-3.0, math.inf, LEAST, INCONCLUSIVE),
        (math.inf, math.inf, LEAST, PASS),
        (math.nan, math.nan, MOST, INCONCLUSIVE),
    ],
)
def test_a_whole_interval_on_one_side_decides(low: float, high: float, margin: Margin, outcome: str) -> None:
    found = gate(measured(low, high, note="said before"), margin)
    assert found.gate == outcome and found.margin == ("≥ 25 dB" if margin is LEAST else "≤ 5 dB")
    assert found.note.startswith("said before") and (found.note != "said before") == (outcome == INCONCLUSIVE)


@pytest.mark.parametrize("margin", [Margin("psnr", least=-0.3), Margin("psnr", most=0.3)])
def test_the_number_of_pairs_that_is_named_decides(margin: Margin) -> None:
    """Draws of that number, whose true mean lies where the first value lay, nearly always pass."""
    random, passed = np.random.default_rng(0), 0
    low, high = intervals.mean_interval(random.permutation(np.linspace(-3.4, 3.4, 64)))
    note = gate(measured(low, high, value=0.0 + 1e-9), margin).note
    named = re.findall(r"about (\d+) pairs would decide", note)
    assert len(named) == 1 and 64 < int(named[0]) < 4096
    for _ in range(100):
        values = random.uniform(-3.4, 3.4, int(named[0]))
        passed += gate(measured(*intervals.mean_interval(values)), margin).gate == PASS
    assert passed >= 90


def test_the_note_knows_rare_events_margins_that_are_met_and_missing_intervals() -> None:
    none = measured(0.0, 4.7, value=0.0)  # no event: the rule of three bounds the rate
    assert "at least 300 pairs" in gate(none, Margin("psnr", most=1.0)).note
    assert "on its margin" in gate(measured(20, 30), LEAST).note
    assert "no interval" in gate(Measurement("psnr", "", "T3", "dB", True, 3.0), LEAST).note
    assert "unbounded" in gate(measured(20, math.inf), LEAST).note


def test_profiles_gate_what_they_say() -> None:
    assert {m.measurement for m in PROFILES["quality"]} == {
        "class_accuracy",
        "fd_reference_percent",
        "recall",
        "coverage",
    }
    assert "psnr" not in {m.measurement for m in PROFILES["fidelity-latent"]}  # it does not transfer to latents
    for name, margins in PROFILES.items():
        assert margins_of(name, {}) == margins and all((m.least is None) != (m.most is None) for m in margins)
    changed = {m.measurement: m for m in margins_of("fidelity", {"gain_error": 2, "psnr": 31})}
    assert changed["gain_error"] == Margin("gain_error", most=2) and changed["psnr"] == Margin("psnr", least=31)
    with pytest.raises(DitcompressError, match=r"E203.*--margin psnr.*number"):
        margins_of("fidelity", {"psnr": math.nan})
    for text in ("psnr", "psnr=", "psnr=much", "=1="):
        with pytest.raises(DitcompressError, match=r"E203.*name=value"):
            api.parse_margins([text])
    assert api.parse_margins(["psnr=30", "recall=-0.05"]) == {"psnr": 30.0, "recall": -0.05}


def test_a_gate_that_was_not_measured_leaves_the_verdict_open() -> None:
    margins = (LEAST, Margin("ssim", least=0.9))
    good = measured(26, 30)
    assert decide([good], margins, False)[0] == INCONCLUSIVE and missing_gates([good], margins) == ["ssim"]
    assert decide([], (), False)[0] == INCONCLUSIVE
    assert decide([measured(1, 2)], margins, False)[0] == FAIL  # what is missing does not hide a failure
    verdict, rows = decide([good, Measurement("other", "", "T3", "", True, 1.0)], (LEAST,), False)
    assert verdict == PASS and [m.gate for m in rows] == [PASS, ""]


@pytest.mark.parametrize(
    ("distance", "shift", "floor", "said"),
    [(-1.0, 5.0, 1.0, True), (-1.0, 0.4, 1.0, False), (1.0, 5.0, 1.0, False), (-1.0, 5.0, None, True)],
)
def test_a_lower_distance_of_moved_images_is_not_called_better(
    distance: float, shift: float, floor: float | None, said: bool
) -> None:
    rows = [
        Measurement("fd_reference", "", "T4", "", False, distance),
        Measurement("fd_original", "", "T4", "", False, shift, floor=floor),
    ]
    assert ("not evidence of better quality" in moved(rows)) is said
    assert moved(rows[:1]) == "" and moved([]) == ""


# --- unsafe texts ----------------------------------------------------------------------------------------------------

FIRST, SECOND = "<img src=x onerror=y>|*a*", '"><script>alert(1) [l](javascript:x) `c`'


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def unsafe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A report of two models whose folders have hostile names."""
    folder = tmp_path_factory.mktemp("unsafe")
    for name in (FIRST, SECOND):
        shutil.copytree(digits_folder(), folder / name)
    result = api.evaluate(
        folder / FIRST, folder / SECOND, folder / "<i>run", pairs=8, images=60, inputs=8, timesteps=2, steps=2, shown=2,
        fresh_process=False, cost_batches=(1,), command="evaluate <u>x</u> | `y`", device="cpu",
    )  # fmt: skip
    return folder / "<i>run", result


def harmless(page: str) -> Tags:
    tags = Tags(page)
    assert not {t for t, _ in tags.found} & {"script", "i", "u", "iframe", "object"}
    assert all(not name.startswith("on") for _, attributes in tags.found for name in attributes)
    sources = [a["src"] or "" for t, a in tags.found if t == "img"]
    assert sources and all(s.startswith("data:image/") for s in sources)
    return tags


def columns(card: str) -> list[int]:
    """The number of cells of every line of a Markdown table."""
    return [len(re.findall(r"(?<!\\)\|", line)) for line in card.splitlines() if line.startswith("|")]


def test_names_of_folders_are_text_in_the_report(unsafe: Any) -> None:
    folder, result = unsafe
    assert result["verdict"] == PASS and result["provenance"]["original"]["name"] == FIRST
    tags = harmless((folder / "report.html").read_text())
    assert FIRST in tags.text and SECOND in tags.text and "<u>x</u> | `y`" in tags.text


def test_names_of_runs_are_text_in_the_comparison(unsafe: Any, tmp_path: Path) -> None:
    other = tmp_path / "<u>run"
    shutil.copytree(unsafe[0], other)
    report = json.loads((other / "report.json").read_text())
    row = next(m for m in report["measurements"] if m["name"] == "psnr")
    row.update(identical=False, value=30.0, low=29.0, high=31.0)
    (other / "report.json").write_text(json.dumps(report))
    facts = api.compare([unsafe[0], other], tmp_path / "out")
    assert [r["name"] for r in facts["rows"]] == ["<i>run", "<u>run"] and facts["front"] == ["<u>run"]
    assert "<u>run" in harmless((tmp_path / "out" / "compare.html").read_text()).text


def test_names_and_reasons_are_text_in_the_card_of_an_evaluation(unsafe: Any) -> None:
    folder, result = unsafe
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == FIRST and head["model-index"][0]["name"] == SECOND
    changed = {**result, "skipped": [{"name": "a\n# b", "reason": "<b>x</b> | y\n---", "code": ""}]}
    for text in (card, evaluated_card(changed)):
        body = text.split("---\n", 2)[2]
        assert len(set(columns(body))) == 1 and not re.search(r"(?<!\\)<\w", body)
        assert not re.search(r"(?<!\\)\]\(", body) and not re.search(r"^(# b|---)", body, re.MULTILINE)


def test_the_card_of_a_compressed_model_holds_its_names_as_text() -> None:
    records = [SimpleNamespace(role=r, shape=(4, 8), bits=b) for r, b in (("a|b", 4.0), ("<b>", 8.0), ("<b>", 6.0))]
    recipe = {"name": "r: [x]\n- y", "source": "<b>z</b> | w"}
    card = quantized_card(SECOND, FIRST, "DiTTransformer2DModel", recipe, records, 1000, 250, True)
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == FIRST and recipe["name"] in head["tags"]
    body = card.split("---\n", 2)[2]
    assert not re.search(r"(?<!\\)<\w", body) and not re.search(r"(?<!\\)\]\(", body)
    table = columns(body)
    assert table == [4, 4, 4, 4] + [5] * 4 and "4.00x smaller" in body and "| 2 | 64 | 7.00 |" in body

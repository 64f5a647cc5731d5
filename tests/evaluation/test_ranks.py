"""Two processes that each make half of the images find what one finds; the first one has the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ditcompress import api
from ditcompress.errors import DitcompressError
from ditcompress.evaluation import images
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model
from ditcompress.ranks import Ranks
from tests.processes import in_two

FEW: dict[str, Any] = {"pairs": 7, "inputs": 12, "timesteps": 3, "steps": 4, "batch": 2, "extractor": "none",
                       "classifier": "none", "fresh_process": False, "cost_batches": (1,), "device": "cpu",
                       "fresh": True, "guidance": 1.5}  # fmt: skip
CHUNK = 4  # so that there are two chunks


def judged(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """An evaluation, and another into the same folder."""
    images.CHUNK = CHUNK
    found = api.evaluate(folder / "original", folder / "other", folder / "two", **FEW)
    try:
        api.evaluate(folder / "original", folder / "other", folder / "two", **FEW)
    except DitcompressError as error:
        return {"found": found, "code": error.code}
    return {}


def differs(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The compressed model makes an error in one process only, while both sample."""
    from ditcompress.evaluation import subject

    inner = subject.sample

    def broken(*args: Any, **options: Any) -> Any:
        raise DitcompressError("E319", "sample", "is not finite", "mend it")

    subject.sample = broken if ranks.rank == 1 else inner  # type: ignore[assignment]
    try:
        api.evaluate(folder / "original", folder / "other", **FEW)
    except DitcompressError as error:
        return {"line": error.line()}
    finally:
        subject.sample = inner
    return {}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    model, _ = load_model(digits_folder() / "transformer", dtype=torch.float32)
    model.save_pretrained(folder / "original")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "other")
    return folder, in_two(folder, [judged, differs])


def test_two_processes_report_what_one_does(
    two: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, facts = two
    monkeypatch.setattr(images, "CHUNK", CHUNK)
    one = api.evaluate(folder / "original", folder / "other", tmp_path / "one", **FEW)
    found, none = (f["found"] for f in facts["judged"])
    assert none == {} and found["verdict"] == one["verdict"]
    assert [m["name"] for m in found["measurements"]] == [m["name"] for m in one["measurements"]]
    for ours, theirs in zip(found["measurements"], one["measurements"], strict=True):
        assert ours["n"] == theirs["n"]
        for field in ("value", "low", "high", "floor"):
            expected = theirs[field] if theirs[field] is None else pytest.approx(theirs[field], rel=2e-3, abs=2e-3)
            assert ours[field] == expected, (ours["name"], field)
    for ours, theirs in zip(found["timesteps"], one["timesteps"], strict=True):
        assert ours["sqnr_db"] == pytest.approx(theirs["sqnr_db"], abs=1e-2) and ours["n"] == theirs["n"]
    assert json.loads((folder / "two" / "report.json").read_text()) == found
    assert [f["code"] for f in facts["judged"]] == ["E501", "E501"]
    assert not list(folder.glob(".two*"))


def test_every_image_is_where_one_process_puts_it() -> None:
    """Dealt out and put together again, whatever the number of images in a chunk."""

    class Part(Ranks):
        """The last of several processes that hold rows of their own."""

        def collect(self, value: Any) -> list[Any]:
            return [rows[number :: self.count] if number < 5 else None for number in range(self.count)]

    rows = torch.arange(10.0).view(5, 2)
    for count in (2, 3, 5, 6):
        assert torch.equal(Part(0, count).undealt(rows), rows)
        assert sorted(i for rank in range(count) for i in Ranks(rank, count).own(range(5))) == [0, 1, 2, 3, 4]


def test_a_failure_in_one_ends_both(two: tuple[Path, Any]) -> None:
    lines = [f["line"] for f in two[1]["differs"]]
    assert lines[0].startswith("error[E319 non-finite]: process 1: sample: is not finite")
    assert lines[1].startswith("error[E319 non-finite]: sample: is not finite")

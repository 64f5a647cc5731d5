"""Tables in a terminal: numbers stay whole where there is room, and nothing is ever cut off."""

from __future__ import annotations

import pytest

from ditcompress.console import print_table

COLUMNS = ["model", "ms", "p10 to p90", "memory"]
ROW = ["a long name of many words that goes on", "109.11", "109.30 to 119.27", "34.58 MB"]


@pytest.mark.parametrize(("width", "whole"), [(60, True), (40, False)])
def test_the_first_column_folds_before_numbers_do(
    width: int, whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_table("times", COLUMNS, [ROW])
    printed = capsys.readouterr().out
    assert all(len(line) <= width for line in printed.splitlines())
    assert all(cell in printed for cell in ROW[1:]) == whole
    letters = "".join(printed.split())
    assert all(sum(letters.count(c) for c in set(cell)) >= len(cell.replace(" ", "")) for cell in ROW)

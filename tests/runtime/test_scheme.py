"""A scheme from config.json is read to the letter: what is not understood is refused, never guessed at."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ditcompress.errors import DitcompressError
from ditcompress.plan import ActivationSpec, WeightSpec
from ditcompress.runtime.scheme import Scheme

GOOD: dict[str, Any] = {
    "weight": {"format": "int", "params": {"bits": 4, "layout": "group", "group": 32, "symmetric": False}},
    "activation": {"mode": "token", "bits": 8, "symmetric": False},
    "smooth": "online",
    "rank": 4,
}
REMOVED = object()
FAULTS: dict[str, tuple[str, Any]] = {
    "unknown mode": ("activation.mode", "row"),
    "one-bit input": ("activation.bits", 1),
    "nine-bit input": ("activation.bits", 9),
    "bits as text": ("activation.bits", "8"),
    "truth as text": ("activation.symmetric", "no"),
    "unknown key of the input": ("activation.zero", 1),
    "input missing": ("activation", None),
    "unknown smoothing": ("smooth", "offline"),
    "smoothing missing": ("smooth", REMOVED),
    "rank below zero": ("rank", -3),
    "rank beyond memory": ("rank", 2**70),
    "half a rank": ("rank", 0.5),
    "rank as truth": ("rank", True),
    "group of none": ("weight.params.group", 0),
    "99 bits": ("weight.params.bits", 99),
    "unknown key of the format": ("weight.params.blocks", 3),
    "format that is a path": ("weight.format", "..os"),
    "format missing": ("weight.format", REMOVED),
    "unknown key": ("rotation", "hadamard"),
}


def test_a_good_scheme_is_taken_as_it_stands() -> None:
    scheme = Scheme.from_json(GOOD)
    assert scheme == Scheme(
        WeightSpec("int", GOOD["weight"]["params"]), ActivationSpec("token", 8, False), "online", 4
    )  # fmt: skip
    assert set(scheme.layout((24, 40))) == {"qweight", "scale", "zero", "low_rank_up", "low_rank_down", "smooth"}


@pytest.mark.parametrize("key,value", FAULTS.values(), ids=FAULTS)
def test_anything_else_is_refused_in_one_line_that_names_the_key(key: str, value: Any) -> None:
    wrong = copy.deepcopy(GOOD)
    *path, last = key.split(".")
    place = wrong
    for part in path:
        place = place[part]
    if value is REMOVED:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(DitcompressError) as caught:
        Scheme.from_json(wrong)
    assert caught.value.code == "E320" and caught.value.where.endswith(key)
    assert "\n" not in str(caught.value)

"""plug: any intervals of a PPCL result can get the original's blocks back, bit for bit and without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditcompress import prune
from ditcompress.api import plug
from ditcompress.errors import DitcompressError
from ditcompress.loading import load_model
from ditcompress.models import Depth
from ditcompress.models._depth import Unit
from ditcompress.pruning.ppcl import taken

from ..commands import fails
from ..commands import run as command
from .models import deep, inputs, run
from .test_methods import few

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=["dit", "flux"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Family, original and what PPCL made of it: two intervals."""
    folder = tmp_path_factory.mktemp(request.param)
    model = deep(request.param)
    model.save_pretrained(folder / "original")  # type: ignore[operator]
    prune(folder / "original", 0.4, folder / "pruned", method="ppcl", overrides=[*few("ppcl"), "learning_rate=0.01"])
    return request.param, folder / "original", folder / "pruned"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def same(first: Path, second: Path) -> bool:
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and config(first) == config(second)


def test_none_is_the_original_and_all_are_the_pruned_model(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, original, pruned = pair
    none, every = plug(original, pruned, [], tmp_path / "none"), plug(original, pruned, None, tmp_path / "all")
    assert same(tmp_path / "none", original) and same(tmp_path / "all", pruned)
    assert not same(original, pruned)
    assert json.loads((tmp_path / "all" / "prune.json").read_text()) == json.loads((pruned / "prune.json").read_text())
    assert none.facts["parameters"] == none.facts["original_parameters"] > every.facts["parameters"]


def test_each_interval_alone_has_its_trained_block_between_those_of_the_original(
    pair: tuple[str, Path, Path], tmp_path: Path
) -> None:
    family, original, pruned = pair
    rows = plug(original, pruned, dry_run=True).facts["intervals"]
    assert len(rows) == 2
    before, cut, note = tensors(original), tensors(pruned), json.loads((pruned / "prune.json").read_text())
    place = {row["was"]: row["block"] for row in note["kept"]}
    for number, row in enumerate(rows):
        out = tmp_path / str(number)
        found = plug(original, pruned, [number], out)
        model, _ = load_model(out)
        again = type(model).from_pretrained(out).eval()  # type: ignore[attr-defined]  # stock diffusers
        assert sum(p.numel() for p in again.parameters()) == found.facts["parameters"]
        assert found.facts["parameters"] == found.facts["original_parameters"] - row["saves"]
        given = inputs(family, model)
        output = run(family, model, given)
        in_memory = plug(original, pruned, [number]).model
        assert in_memory is not None
        assert torch.equal(run(family, again, given), output) and torch.equal(run(family, in_memory, given), output)
        mixed = json.loads((out / "prune.json").read_text())
        assert mixed["removed"] == row["stand_for"]
        state = tensors(out)
        was = {kept["block"]: kept["was"] for kept in mixed["kept"]}
        changed = 0
        for name, tensor in state.items():
            block = next((b for b in was if name.startswith(f"{b}.")), "")
            rest = name[len(block) :]
            origin = before[(was[block] if block else "") + rest]
            if block and was[block] in row["students"]:
                assert torch.equal(tensor, cut[place[was[block]] + rest])
                changed += not torch.equal(tensor, origin)
            else:
                assert torch.equal(tensor, origin)
        assert changed and len(mixed["changed"]) >= changed
        assert same(Path(plug(original, out, [], tmp_path / f"{number}-back").path or ""), original)


def test_blocks_that_only_go_together_are_switched_together() -> None:
    pairs = Depth(tuple(Unit((f"a.{n}", f"a.{9 - n}")) for n in range(4)), {}, {}, {"a": 10})
    (one,) = taken(pairs, ["a.2", "a.7"])
    assert one.gone == ("a.2", "a.7") and set(one.students) == {"a.1", "a.6"}
    alone = Depth(tuple(Unit((f"{o}.{n}",)) for o in "ab" for n in range(6)), {}, {}, {"a": 6, "b": 6})
    found = taken(alone, ["a.2", "a.4", "a.5", "b.1"])
    assert [(each.students, each.gone) for each in found] == [
        (("a.1",), ("a.2",)), (("a.3",), ("a.4", "a.5")), (("b.0",), ("b.1",)),
    ]  # fmt: skip
    assert taken(alone, []) == []


def spoiled(original: Path, pruned: Path, how: str, tmp_path: Path) -> tuple[Path, Path]:
    """A pair that does not fit."""
    other, bad = tmp_path / "other", tmp_path / "bad"
    shutil.copytree(original, other)
    shutil.copytree(pruned, bad)
    if how == "other weights":
        state = tensors(other)
        save_file({n: t + 1 if n.endswith("pos_embed.proj.bias") else t for n, t in state.items()}, other / WEIGHTS)
    elif how == "other depth":
        deep("sd3").save_pretrained(other)  # type: ignore[operator]
    elif how == "trained since":
        save_file({name: 2 * tensor for name, tensor in tensors(bad).items()}, bad / WEIGHTS)
    elif how == "no note":
        (bad / "prune.json").unlink()
    elif how == "torn note":
        (bad / "prune.json").write_text("{")
    elif how == "method":
        shutil.rmtree(bad)
        prune(original, 0.4, bad, method="magnitude")
    elif how == "width":
        shutil.rmtree(bad)
        prune(original, 0.4, bad, method="ppcl", overrides=few("ppcl"), width_ratio=0.25, width_method="magnitude")
    return other, bad


@pytest.mark.parametrize(
    ("how", "code"),
    [("other weights", "E340"), ("other depth", "E340"), ("trained since", "E340"), ("no note", "E205"),
     ("torn note", "E205"), ("method", "E205"), ("width", "E205"), ("swapped", "E205"), ("number", "E203")],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(
    pair: tuple[str, Path, Path], how: str, code: str, tmp_path: Path
) -> None:
    family, original, pruned = pair
    if family != "dit":
        return
    first, second = spoiled(original, pruned, how, tmp_path)
    first, second = (second, first) if how == "swapped" else (first, second)
    with pytest.raises(DitcompressError) as caught:
        plug(first, second, [7] if how == "number" else [0], tmp_path / "out")
    assert caught.value.code == code, caught.value
    assert not (tmp_path / "out").exists()


def test_the_command_lists_and_writes(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    family, original, pruned = pair
    if family != "dit":
        return
    done = command("plug", original, pruned, "--keep", "1", "--out", tmp_path / "out", "--json")
    facts = json.loads(done.stdout)
    assert facts.pop("path") == str(tmp_path / "out") and [row["kept"] for row in facts["intervals"]] == [False, True]
    assert same(tmp_path / "out", Path(plug(original, pruned, [1], tmp_path / "again").path or ""))
    assert "--keep 1,x" in fails(2, "E203", "plug", original, pruned, "--keep", "1,x", "--out", tmp_path / "bad")

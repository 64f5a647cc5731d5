"""Sample folders are what the evaluators of others read."""

from __future__ import annotations

import json
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ditcompress.errors import DitcompressError
from ditcompress.evaluation import layouts
from ditcompress.evaluation.pixels import batches, to_bytes


class Memory:
    """An image set in memory, in chunks that do not fit any batch; counts how many of its images are out at once."""

    def __init__(self, tensor: torch.Tensor, size: int = 3) -> None:
        self.tensor, self.size = tensor, size

    def __len__(self) -> int:
        return len(self.tensor)

    def chunks(self) -> Iterator[torch.Tensor]:
        return iter(self.tensor.split(self.size))


def images(n: int = 8, channels: int = 3, height: int = 6, width: int = 4) -> torch.Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(n)) * 2 - 1


def expected(tensor: torch.Tensor) -> np.ndarray:
    grey = tensor.double().numpy().repeat(3 // tensor.shape[1], 1)
    return np.rint((grey.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        return np.asarray(picture)


PROMPTS = ["a cat", "a bed\u2028and “two” dogs"]


@pytest.mark.parametrize("name", [n for n in layouts.registry.names() if n != "vbench"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_layout_writes_the_same_bytes_twice_and_plain_facts(name: str, channels: int, tmp_path: Path) -> None:
    found = []
    for number, size in enumerate((3, 5)):
        folder = tmp_path / str(number)
        folder.mkdir()
        facts = layouts.registry.get(name).write(folder, Memory(images(8, channels), size), PROMPTS, list(range(8)), 4)
        assert json.loads(json.dumps(facts)) == facts and facts["images"] == 8
        found.append({p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})
    assert found[0] == found[1] and found[0]


@pytest.mark.parametrize("name", layouts.registry.names())
@pytest.mark.parametrize(
    "tensor, code",
    [(images(4, 4), "E205"), (torch.full((4, 3, 4, 4), float("nan")), "E701")],
    ids=["latents", "not finite"],
)
def test_latents_and_nan_are_refused(name: str, tensor: torch.Tensor, code: str, tmp_path: Path) -> None:
    with pytest.raises(DitcompressError) as caught:
        layouts.registry.get(name).write(tmp_path, Memory(tensor), ["x"] * 4, None, 1)
    assert caught.value.code == ("E203" if name == "vbench" else code)


def test_a_set_that_ends_early_is_an_error(tmp_path: Path) -> None:
    short = Memory(images(4))
    short.__class__ = type("Short", (Memory,), {"__len__": lambda self: 5})
    with pytest.raises(DitcompressError) as caught:
        layouts.registry.get("images").write(tmp_path, short, None, None, 1)
    assert caught.value.code == "E323"


def test_adm_batch_reads_back_and_streams_as_the_evaluator_does(tmp_path: Path) -> None:
    x = images(7)
    facts = layouts.registry.get("adm").write(tmp_path, Memory(x), None, [3, 1, 4, 1, 5, 9, 2], 1)
    path = tmp_path / "samples.npz"
    with np.load(path) as found:
        assert sorted(found) == ["arr_0", "arr_1"]
        assert (found["arr_0"] == expected(x)).all() and found["arr_0"].dtype == np.uint8
        assert found["arr_1"].tolist() == [3, 1, 4, 1, 5, 9, 2] and found["arr_1"].dtype == np.int64
    assert facts["shape"] == [7, 6, 4, 3]
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as entry:  # StreamingNpzArrayReader
        assert np.lib.format.read_magic(entry) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(entry)
        assert shape == (7, 6, 4, 3) and not fortran and dtype == np.uint8
        first = np.frombuffer(entry.read(2 * 72), np.uint8).reshape(2, 6, 4, 3)
        assert (first == expected(x[:2])).all()


def test_adm_without_labels_and_with_wrong_ones(tmp_path: Path) -> None:
    adm = layouts.registry.get("adm")
    adm.write(tmp_path, Memory(images(3)), None, None, 1)
    with np.load(tmp_path / "samples.npz") as found:
        assert list(found) == ["arr_0"]
    for labels, n in (([1, 2], 3), (None, 0)):
        with pytest.raises(DitcompressError) as caught:
            adm.write(tmp_path, Memory(images(n)), None, labels, 1)
        assert caught.value.code == "E203"


def test_adm_holds_one_chunk_at_a_time(tmp_path: Path) -> None:
    class Lazy(Memory):
        """Makes each chunk when it is asked for, and fails when earlier ones are still alive."""

        def chunks(self) -> Iterator[torch.Tensor]:
            import weakref

            alive: list[Any] = []
            for part in self.tensor.split(self.size):
                chunk = part.clone()
                alive.append(weakref.ref(chunk))
                yield chunk
                del chunk
                assert sum(r() is not None for r in alive) <= 2

    layouts.registry.get("adm").write(tmp_path, Lazy(images(96), 16), None, None, 1)


@pytest.mark.parametrize("each", [False, True], ids=["one text a prompt", "one text an image"])
def test_geneval_folder(each: bool, tmp_path: Path) -> None:
    x = images(8)
    prompts = [text for text in PROMPTS for _ in range(4)] if each else PROMPTS
    details = [{"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": text} for text in prompts]
    facts = layouts.registry.get("geneval").write(tmp_path, Memory(x), prompts, None, 4, details=details)
    assert "incomplete" not in facts and facts["per_prompt"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000", "00001"]
    for number, text in enumerate(PROMPTS):
        folder = tmp_path / f"{number:05d}"
        with open(folder / "metadata.jsonl", encoding="utf-8") as file:
            assert json.load(file) == {**details[0], "prompt": text}  # as its evaluate_images.py reads it
        assert len((folder / "metadata.jsonl").read_text("utf-8").splitlines()) == 1
        assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"{i:04d}.png" for i in range(4)]
        for place in range(4):
            assert (pixels(folder / "samples" / f"{place:04d}.png") == expected(x)[4 * number + place]).all()


def test_geneval_says_what_prompts_alone_leave_open_and_refuses_a_mismatch(tmp_path: Path) -> None:
    geneval = layouts.registry.get("geneval")
    facts = geneval.write(tmp_path, Memory(images(2)), PROMPTS, None, 1)
    assert facts["incomplete"].startswith("2 prompts have no tag")
    for prompts, n, each, details in (
        (None, 2, 1, None),
        (PROMPTS, 5, 3, None),
        (["a", "a", "b"], 3, 1, None),
        (PROMPTS, 2, 1, [{"prompt": "a cat"}]),
        (PROMPTS, 2, 1, [{"prompt": "a cat"}, {"prompt": "another"}]),
    ):
        with pytest.raises(DitcompressError) as caught:
            geneval.write(tmp_path / "x", Memory(images(n)), prompts, None, each, details=details)
        assert caught.value.code == "E203"


def test_images_and_manifest(tmp_path: Path) -> None:
    x = images(5, 1)
    layouts.registry.get("images").write(tmp_path, Memory(x), None, [4, 3, 2, 1, 0], 1, seed=7)
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text("utf-8").splitlines()]
    assert lines[1] == {"file": "images/000001.png", "index": 1, "seed": 7, "label": 3}
    for line in lines:
        assert (pixels(tmp_path / line["file"]) == expected(x)[line["index"]]).all()
    other = tmp_path / "other"
    other.mkdir()
    layouts.registry.get("images").write(other, Memory(images(4)), PROMPTS, None, 2)
    lines = [json.loads(line) for line in (other / "manifest.jsonl").read_text("utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]


def test_vbench_wants_videos_and_imageio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vbench = layouts.registry.get("vbench")
    with pytest.raises(DitcompressError, match="needs videos") as caught:
        vbench.write(tmp_path, Memory(images(2)), PROMPTS, None, 1)
    assert caught.value.code == "E203"
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(DitcompressError) as caught:
        vbench.write(tmp_path, Memory(torch.zeros(1, 2, 3, 8, 8)), ["a cat"], None, 1)
    assert caught.value.code == "E204"


def test_vbench_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
    fake = types.ModuleType("imageio")
    fake.mimwrite = lambda path, frames, **how: written.update({path.name: (np.stack(frames), how)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "imageio", fake)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", types.ModuleType("imageio_ffmpeg"))
    videos = images(4 * 5).reshape(4, 5, 3, 6, 4)
    vbench = layouts.registry.get("vbench")
    facts = vbench.write(tmp_path, Memory(videos), ["A cat.", "a dog"], None, 2)
    assert list(written) == ["A cat.-0.mp4", "A cat.-1.mp4", "a dog-0.mp4", "a dog-1.mp4"]
    frames, how = written["a dog-0.mp4"]
    assert (frames == expected(videos[2])).all() and how["fps"] == 8 and facts["frames"] == 5
    for prompts in (["a/b"], ["x" * 300], ["two\nlines"]):
        with pytest.raises(DitcompressError) as caught:
            vbench.write(tmp_path, Memory(videos), prompts, None, 4)
        assert caught.value.code == "E203"
    with pytest.raises(DitcompressError, match="one name"):
        vbench.write(tmp_path, Memory(videos), ["twice", "twice"], None, 2)


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_batches_are_the_same_however_chunks_are_cut(size: int) -> None:
    x = images(11)
    for cut in (1, 3, 11):
        parts = list(batches(Memory(x, cut), size))
        assert torch.equal(torch.cat(parts), x) and all(len(p) == size for p in parts[:-1])
    assert to_bytes(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]

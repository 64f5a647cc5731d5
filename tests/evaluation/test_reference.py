"""Reference images, extractors and classifiers: what is read, and one line with its code for everything that is bad."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ditcompress.console import Silent
from ditcompress.errors import CODES, DitcompressError
from ditcompress.evaluation import accuracy
from ditcompress.evaluation.digits import digits_folder, load_digit_classifier
from ditcompress.evaluation.extractors import Request, choose, extract, trained
from ditcompress.evaluation.images import CHUNK, ImageSet
from ditcompress.evaluation.quality import Sources, find_tools
from ditcompress.evaluation.reference import open_reference, read_image
from ditcompress.evaluation.settings import EvaluateSettings
from ditcompress.evaluation.subject import Subject, open_subject
from ditcompress.report.runs import Run, check_alike


def refused(code: str, word: str, call: Callable[[], object]) -> None:
    """`call` raises one line of `code` that says `word` and what to do."""
    with pytest.raises(DitcompressError) as caught:
        call()
    line = caught.value.line()
    assert caught.value.code == code and line.startswith(f"error[{code} {CODES[code]}]") and word in line, line
    assert "\n" not in line and len(line) <= 400 and caught.value.remedy


def bytes_of(n: int, channels: int = 3, size: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def pictures(folder: Path, images: torch.Tensor, names: list[str]) -> Path:
    for image, name in zip(images, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(folder / name)
    return folder


def read(path: Path) -> torch.Tensor:
    return torch.cat(list(open_reference(path).chunks()))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_source_gives_the_same_images_and_labels(channels: int, tmp_path: Path) -> None:
    n = CHUNK + 5
    images, labels = bytes_of(n, channels), torch.arange(n) // 23
    expected = torch.from_numpy(images.double().numpy() / 127.5 - 1).float()
    save_file({"images": images, "labels": labels}, tmp_path / "bytes.safetensors")
    save_file({"images": expected, "labels": labels.int()}, tmp_path / "floats.safetensors")
    last = images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", last, labels.numpy())
    np.savez_compressed(tmp_path / "named.npz", images=last, labels=labels.numpy()[:, None])
    pictures(tmp_path / "classes", images, [f"{int(k)}/{i:04d}.png" for i, k in enumerate(labels)])
    for name in ("bytes.safetensors", "floats.safetensors", "adm.npz", "named.npz", "classes"):
        found = open_reference(tmp_path / name, (channels, 6, 6))
        assert torch.allclose(torch.cat(list(found.chunks())), expected, atol=1e-6), name
        assert [len(c) for c in found.chunks()] == [CHUNK, 5] and len(found) == n
        assert found.labels is not None and torch.equal(found.labels, labels)
    if channels == 1:
        np.savez(tmp_path / "grey.npz", last[..., 0])
        assert torch.allclose(read(tmp_path / "grey.npz"), expected, atol=1e-6)


def test_classes_are_numbered_in_order_and_one_folder_is_no_class(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "numbers", bytes_of(3), ["10/a.png", "9/a.png", "2/deep/a.png"])
    found = open_reference(folder)
    assert found.classes == ("2", "9", "10")
    assert found.labels is not None and found.labels.tolist() == [2, 0, 1]  # files in the order of their paths
    assert open_reference(pictures(tmp_path / "flat", bytes_of(2), ["a.png", "b.png"])).labels is None
    assert open_reference(pictures(tmp_path / "mixed", bytes_of(3), ["a.png", "x/b.png", "y/c.png"])).labels is None
    # labels of one class would train a classifier that is always right and sees nothing
    assert open_reference(pictures(tmp_path / "one", bytes_of(2), ["images/a.png", "images/b.png"])).labels is None
    save_file({"images": bytes_of(4), "labels": torch.full((4,), 7)}, tmp_path / "one.safetensors")
    assert open_reference(tmp_path / "one.safetensors").labels is None


TABLES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "no images": ({"labels": torch.zeros(3)}, "no tensor `images`"),
    "none at all": ({"images": torch.zeros(0, 3, 6, 6)}, "holds no images"),
    "a scalar": ({"images": torch.tensor(1.0)}, "holds no images"),
    "latents": ({"images": torch.zeros(2, 4, 6, 6)}, "shape (4, 6, 6)"),
    "flat": ({"images": torch.zeros(2, 108)}, "holds no images"),
    "another size": ({"images": torch.zeros(2, 3, 8, 6)}, "3x8x6"),
    "labels missing": ({"images": torch.zeros(3, 3, 6, 6), "labels": torch.zeros(2)}, "2 labels for 3 images"),
    "negative labels": ({"images": torch.zeros(2, 3, 6, 6), "labels": torch.tensor([0, -1])}, "labels"),
    "endless labels": ({"images": torch.zeros(2, 3, 6, 6), "labels": torch.tensor([0, 2**40])}, "labels"),
}


@pytest.mark.parametrize("name", TABLES)
def test_bad_tables_are_refused_when_they_are_opened(name: str, tmp_path: Path) -> None:
    tensors, word = TABLES[name]
    save_file(tensors, tmp_path / "x.safetensors")
    refused("E333", word, lambda: open_reference(tmp_path / "x.safetensors", (3, 6, 6)))


def test_bad_values_are_refused_when_they_are_read(tmp_path: Path) -> None:
    for value in (float("nan"), 255.0):
        images = torch.zeros(CHUNK + 1, 1, 4, 4)
        images[-1, 0, 2, 2] = value
        save_file({"images": images}, tmp_path / "x.safetensors")
        refused("E333", "within [-1, 1]", lambda: read(tmp_path / "x.safetensors"))


def test_bad_archives_and_files(tmp_path: Path) -> None:
    good = bytes_of(40).permute(0, 2, 3, 1).numpy()
    for arrays, word in (
        ({"x": good}, "no array arr_0"),
        ({"arr_0": good.astype(np.int64)}, "int64"),
        ({"arr_0": np.asfortranarray(good)}, "Fortran"),
        ({"arr_0": np.array([{}], dtype=object)}, "object"),
        ({"arr_0": good[:0]}, "holds no images"),
        ({"arr_0": good[0, 0, 0]}, "holds no images"),
        ({"arr_0": good, "arr_1": np.array([{}], dtype=object)}, "cannot be read"),
        ({"arr_0": good, "arr_1": np.zeros(7, int)}, "7 labels"),
    ):
        np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
        refused("E333", word, lambda: open_reference(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", good)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF  # one flipped byte: the archive's own checksum notices
    (tmp_path / "flipped.npz").write_bytes(data)
    refused("E333", "cannot be read", lambda: read(tmp_path / "flipped.npz"))
    for name, content, word in (
        ("cut.npz", bytes(data[:500]), "cannot be read"),
        ("cut.safetensors", b"\x10", "cannot be read"),
        ("text.txt", b"hello", "is no reference"),
    ):
        (tmp_path / name).write_bytes(content)
        refused("E333", word, lambda name=name: open_reference(tmp_path / name))  # type: ignore[misc]
    refused("E333", "does not exist", lambda: open_reference(tmp_path / "none"))


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused("E333", "holds no images", lambda: open_reference(tmp_path / "empty"))
    folder = pictures(tmp_path / "x", bytes_of(2), ["a.png", "c.png"])
    Image.new("RGB", (9, 6)).save(folder / "d.png")
    refused("E333", "6x9, the others are 6x6", lambda: read(folder))
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    refused("E333", "b.png", lambda: read(folder))
    (folder / "a.png").write_bytes(b"")
    refused("E333", "a.png", lambda: open_reference(folder))
    assert read_image(folder / "c.png", 1).shape == (1, 6, 6)


def request(argument: str = "", shape: tuple[int, int, int] = (1, 8, 8), **others: Any) -> Request:
    return Request(argument, shape, **others)


def linear(images: torch.Tensor) -> torch.Tensor:
    """An extractor of a user."""
    return images.flatten(1)[:, :5]


def broken(images: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("first line\nsecond line")


def test_weak_and_bad_extractors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(asked: str, **others: Any) -> Callable[[], object]:
        return lambda: choose(asked, lambda argument: request(argument, **others), False)

    refused("E335", "0.9999", chosen("digits", floor=0.9999))
    refused("E337", "8x8", chosen("digits", shape=(3, 16, 16)))
    refused("E337", "no labels", chosen("trained"))
    refused("E337", "ModuleNotFoundError", chosen("python:no.such:thing"))
    refused("E337", "first line", chosen(f"python:{__name__}:broken"))
    (tmp_path / "x.pt").write_bytes(b"no network")
    refused("E337", "x.pt", chosen(f"torchscript:{tmp_path / 'x.pt'}"))
    monkeypatch.setattr(trained, "STEPS", 3)
    save_file({"images": bytes_of(40, 1, 8), "labels": torch.arange(40) % 10}, tmp_path / "noise.safetensors")
    noise = open_reference(tmp_path / "noise.safetensors")
    refused("E335", "held-out accuracy", chosen("auto", reference=noise, cache=tmp_path / "cache"))
    refused("E335", "held-out accuracy", chosen("auto", reference=noise, cache=tmp_path / "cache"))  # the kept one too
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    assert chosen("none")() is None and chosen("auto")() is None


def test_features_are_checked_and_double(tmp_path: Path) -> None:
    found = choose(f"python:{__name__}:linear", request, False)
    assert found is not None
    images = bytes_of(5, 1, 8).float() / 60 - 1  # beyond 1: clamped, as when they are saved
    features = extract(found, [images[:3], images[3:]])
    assert features.dtype == np.float64 and np.allclose(features, linear(images.clamp(-1, 1)).double().numpy())
    for wrong in (lambda x: x.mean(), lambda x: linear(x)[:1], lambda x: None):
        bad = type(found)("mine", "", wrong)  # type: ignore[arg-type]
        refused("E337", "for 5 images", lambda bad=bad: extract(bad, [images]))  # type: ignore[misc]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The embedded model against a copy whose scheduler was changed."""
    other = tmp_path_factory.mktemp("other") / "digits"
    shutil.copytree(digits_folder(), other)
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.03}))
    settings = EvaluateSettings(pairs=8, images=20, inputs=8, steps=2)
    return open_subject(digits_folder(), other, settings, reporter=Silent())


def test_another_scheduler_and_a_bad_reference_are_skipped_with_their_codes(subject: Subject, tmp_path: Path) -> None:
    tools = find_tools(subject, Sources(reference=tmp_path / "none"), Silent())
    codes = {s.code: s for s in tools.findings.skipped}
    assert set(codes) == {"E333", "E341"} and "beta_end" in codes["E341"].reason
    assert tools.reference is None and tools.extractor is not None  # the original is still a reference
    tools = find_tools(subject, Sources(), Silent())
    assert [s.code for s in tools.findings.skipped] == ["E341"] and tools.reference is not None


def test_a_classifier_of_fewer_classes_is_refused(subject: Subject, tmp_path: Path) -> None:
    images = load_file(digits_folder() / "reference.safetensors")["images"][:20].float()
    made = ImageSet(tmp_path, "x", 20).fill(lambda indices: images[indices], lambda units: None)
    sets, model = {"original": made, "compressed": made}, load_digit_classifier()
    refused("E336", "10 classes", lambda: accuracy.judge(subject, sets, lambda x: model(x)[:, :9]))
    refused("E336", "(20,)", lambda: accuracy.judge(subject, sets, lambda x: model(x)[:, 0]))
    assert accuracy.judge(subject, sets, model).identical


@pytest.mark.parametrize("key", ["original.fingerprint", "guidance", "settings.seed", "scheduler", "images"])
def test_runs_that_differ_are_not_compared(key: str) -> None:
    def provenance(value: object) -> dict[str, Any]:
        made: dict[str, Any] = {"original": {"fingerprint": "a"}, "guidance": 1, "settings": {"seed": 0}, "images": 9}
        first, _, second = key.partition(".")
        made[first] = {second: value} if second else value
        return made

    first, second = (Run(n, {"provenance": provenance(n)}) for n in ("one", "two"))
    refused("E342", key, lambda: check_alike([first, first, second]))
    check_alike([first, first])

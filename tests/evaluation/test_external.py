"""External metrics: a number or a reason, pinned weights, no network, and values that direct computations confirm."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditcompress.errors import DitcompressError
from ditcompress.evaluation import external
from ditcompress.evaluation.external import Samples, Unavailable, run_external
from ditcompress.evaluation.local_weights import pinned, read_sums
from ditcompress.evaluation.pixels import to_pil

from .external_samples import (
    CLIP_METRICS,
    COMPRESSED,
    ORIGINAL,
    PROMPTS,
    Memory,
    N,
    noise,
    pin,
    put,
    samples,
    write_clips,
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", external.registry.names())
@pytest.mark.parametrize("weights", ["none", "missing", "empty", "unpinned"])
def test_without_weights_every_metric_is_skipped_with_one_line(name: str, weights: str, tmp_path: Path) -> None:
    if weights == "unpinned":
        put(tmp_path, external.registry.get(name).WEIGHTS)
        (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  something else\n")
    folder = {"none": None, "missing": tmp_path / "no"}.get(weights, tmp_path)
    rows, skipped = run_external([name], samples(folder))
    assert rows == [] and [s.name for s in skipped] == [name]
    reason = skipped[0].reason
    assert reason and "\n" not in reason and len(reason) <= 400
    expected = {"none": "--weights-dir", "unpinned": "SHA256SUMS"}.get(weights, "not in the weights folder")
    assert expected in reason


def test_an_unknown_metric_is_an_error_before_anything_is_measured() -> None:
    with pytest.raises(DitcompressError, match="lpips") as caught:
        run_external(["clip_score", "lpip"], samples())
    assert caught.value.code == "E201"


@pytest.mark.parametrize("name", external.registry.names())
def test_metrics_state_their_contract(name: str) -> None:
    module = external.registry.get(name)
    assert module.LABEL and module.__doc__ and module.WEIGHTS and isinstance(module.WEIGHTS, tuple)
    extras = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert not module.EXTRA or f"\n{module.EXTRA} = [" in extras


def test_pins(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"one")
    given = samples(tmp_path)
    with pytest.raises(Unavailable, match="not pinned: run `sha256sum"):
        pinned(given, "a.pth")
    (tmp_path / "SHA256SUMS").write_text("")
    with pytest.raises(Unavailable, match=r"a.pth is not pinned in SHA256SUMS: run `sha256sum a.pth >> SHA256SUMS`"):
        pinned(given, "a.pth")
    pin(tmp_path)
    found = pinned(given, "a.pth")
    assert found.note == f"a.pth sha256 {hashlib.sha256(b'one').hexdigest()[:12]}"
    (tmp_path / "a.pth").write_bytes(b"two")
    with pytest.raises(Unavailable, match="does not have the sha256 pinned"):
        pinned(given, "a.pth")
    digest = "AB" * 32
    (tmp_path / "SHA256SUMS").write_text(f"# comment\n\n{digest} *x y.bin\n{digest}  ./z\n")
    assert read_sums(tmp_path) == {"x y.bin": digest.lower(), "z": digest.lower()}
    (tmp_path / "SHA256SUMS").write_text(f"{digest}\n")
    with pytest.raises(Unavailable, match="line 1 is not in the format"):
        read_sums(tmp_path)


def test_one_changed_file_of_a_model_folder_is_noticed(clips: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(clips, root)
    (root / "clip" / "config.json").write_text((root / "clip" / "config.json").read_text() + " ")
    assert "clip/config.json does not have the sha256" in run_external(["clip_score"], samples(root))[1][0].reason
    pin(root)
    assert run_external(["clip_score"], samples(root))[1] == []
    (root / "clip" / "added_tokens.json").write_text("{}")
    assert "clip/added_tokens.json is not pinned" in run_external(["clip_score"], samples(root))[1][0].reason


def direct_features(root: Path, folder: str) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit features of originals, compressed and texts by transformers' own forward pass, all at once."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(root / folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(root / folder)
    tokens = CLIPTokenizer.from_pretrained(root / folder)(
        list(PROMPTS), padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    found = []
    for images in (ORIGINAL, COMPRESSED):
        with torch.no_grad():
            out = model(**tokens, pixel_values=processor(to_pil(images), return_tensors="pt")["pixel_values"])
        found.append(out.image_embeds.double())
    return model, found[0], found[1], out.text_embeds.double()


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["clip_score", "pick_score"])
def test_clip_scores_equal_a_direct_computation(name: str, clips: Path) -> None:
    rows, skipped = run_external([name], samples(clips))
    assert skipped == []
    model, first, second, texts = direct_features(clips, "clip")
    scale = 100 if name == "clip_score" else model.logit_scale.exp().item()
    a, b = (scale * torch.nn.functional.cosine_similarity(x, texts) for x in (first, second))
    row, delta = rows[0], (b - a).numpy()
    assert row.name == name and row.tier == "T5" and row.n == N and not row.identical and row.higher_is_better
    assert delta.std() > 1e-3
    assert row.original == pytest.approx(a.mean().item(), abs=1e-4)
    assert row.value == pytest.approx(delta.mean(), abs=1e-4)
    half = 2.0166921992278248 * delta.std(ddof=1) / np.sqrt(N)  # t with 43 degrees of freedom
    assert row.low == pytest.approx(row.value - half, abs=1e-4) and row.high == pytest.approx(
        row.value + half, abs=1e-4
    )
    assert "model.safetensors sha256 " in row.note


def test_clip_mmd_equals_a_double_loop(clips: Path) -> None:
    rows, _ = run_external(["clip_mmd"], samples(clips))
    _, first, second, _ = direct_features(clips, "clip")
    k = [[np.exp(-((x - y) ** 2).sum().item() / 200) for x in (*first, *second)] for y in (*first, *second)]
    total = sum(k[i][j] + k[N + i][N + j] - 2 * k[i][N + j] for i in range(N) for j in range(N) if i != j)
    named = {row.name: row for row in rows}
    assert named["clip_mmd_original"].value == pytest.approx(1000 * total / (N * (N - 1)), rel=1e-3)
    assert named["clip_mmd"].low < named["clip_mmd"].value < named["clip_mmd"].high
    assert named["clip_mmd"].value == pytest.approx(named["clip_mmd"].compressed - named["clip_mmd"].original)
    assert [r.name for r in run_external(["clip_mmd"], samples(clips, reference=None))[0]] == ["clip_mmd_original"]


def test_identical_images_give_exactly_nothing(clips: Path) -> None:
    same = samples(clips, compressed=Memory(ORIGINAL.clone(), 3))
    rows, skipped = run_external(CLIP_METRICS, same)
    assert skipped == [] and len(rows) == 4
    assert all(row.identical and row.value == 0 for row in rows)
    assert all(row.low == row.high == 0 for row in rows if row.low is not None)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"prompts": None}, "no prompts"),
        ({"prompts": PROMPTS[:3]}, "3 prompts for 44 images"),
        ({"compressed": Memory(COMPRESSED[:5])}, "are not pairs"),
        ({"compressed": Memory(noise(1, channels=4))}, "4|decode latents"),
        ({"compressed": Memory(COMPRESSED * float("inf"))}, "not finite"),
        ({"compressed": Memory(noise(1, size=10))}, "differ in shape"),
        ({"original": Memory(ORIGINAL[:1]), "compressed": Memory(ORIGINAL[:1]), "prompts": ("x",)}, "too few"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_samples_that_cannot_be_scored(change: dict[str, Any], reason: str, clips: Path) -> None:
    rows, skipped = run_external(["clip_score"], samples(clips, **change))
    assert rows == [] and re.search(reason, skipped[0].reason)


def test_incomplete_weights_are_not_filled_with_random_ones(clips: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(clips, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "clip" / "model.safetensors"
    tensors = load_file(path)
    del tensors["visual_projection.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    reason = run_external(["clip_score"], samples(pin(tmp_path)))[1][0].reason
    assert "lacks 1 tensors" in reason and "visual_projection.weight" in reason


def test_pickles_without_safetensors_are_not_loaded(clips: Path, tmp_path: Path) -> None:
    shutil.copytree(clips, tmp_path, dirs_exist_ok=True)
    (tmp_path / "clip" / "model.safetensors").unlink()
    rows, skipped = run_external(["clip_score"], samples(pin(tmp_path)))
    assert rows == [] and "safetensors" in skipped[0].reason


class Fake:
    """A module that measures as told."""

    def __init__(self, act: Any) -> None:
        self.measure = act


def run_fake(act: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(type(external.registry), "get", lambda self, name: Fake(act))
    rows, skipped = run_external(["fake"], samples())
    assert rows == [] and len(skipped) == 1
    return skipped[0].reason


@pytest.mark.parametrize(
    "error, reason",
    [
        (ValueError("first\nsecond"), "ValueError: first"),
        (KeyError(), "KeyError"),
        (SystemExit(3), "SystemExit: 3"),
        (MemoryError("no\x1b[31m"), r"MemoryError: no\x1b[31m"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_whatever_a_library_raises_is_a_reason(
    error: BaseException, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(_: Samples) -> None:
        raise error

    assert run_fake(act, monkeypatch) == reason


def test_the_network_is_refused_and_switches_are_put_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = server.getsockname()

        def act(_: Samples) -> None:
            assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
            assert constants.HF_HUB_OFFLINE is True
            print("chatter of a library")
            socket.create_connection(address)

        assert "tried to reach the network" in run_fake(act, monkeypatch)
        socket.create_connection(address).close()
    assert os.environ["HF_HUB_OFFLINE"] == "0" and "TRANSFORMERS_OFFLINE" not in os.environ
    assert constants.HF_HUB_OFFLINE is before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name, module", [("lpips", "lpips"), ("inception_fid", "torch_fidelity.feature_extractor_inceptionv3")]
)
def test_a_broken_library_is_a_reason(name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision beside another build of torch: the import raises RuntimeError."""
    put(tmp_path, external.registry.get(name).WEIGHTS)
    top = module.partition(".")[0]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / f"{top}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    for loaded in [m for m in sys.modules if m.partition(".")[0] == top]:
        monkeypatch.delitem(sys.modules, loaded)
    reason = run_external([name], samples(pin(tmp_path)))[1][0].reason
    assert "RuntimeError: operator torchvision::nms does not exist" in reason
    assert f"ditcompress[{external.registry.get(name).EXTRA}]" in reason


def test_a_pickle_with_code_is_refused_before_any_library_reads_it(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in ("lpips", "inception_fid", "image_reward", "hpsv2"):
        put(tmp_path, external.registry.get(name).WEIGHTS)
        torch.save({"state_dict": Code()}, tmp_path / external.registry.get(name).WEIGHTS[0])
    _, skipped = run_external(["inception_fid", "image_reward"], samples(pin(tmp_path)))
    assert all("not a plain pickle" in s.reason for s in skipped) and len(skipped) == 2
    assert not (tmp_path / "ran").exists()

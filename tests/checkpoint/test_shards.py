"""What is written: the library reads it, the bytes are the same every time, a manifest notices every change."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ditcompress.checkpoint import _shards
from ditcompress.checkpoint.header import read_header
from ditcompress.checkpoint.manifest import read_manifest, verify_manifest, write_manifest
from ditcompress.checkpoint.writer import ShardWriter, save_atomic
from ditcompress.errors import DitcompressError

from .faults import failure

TENSORS = {
    "b": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "odd": torch.arange(3, dtype=torch.uint8),  # everything after it is unaligned
    "a": torch.linspace(-1, 1, 5),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "flag": torch.tensor([True, False]),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
    "eight": torch.arange(4.0).to(torch.float8_e4m3fn),
}
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def write(folder: Path, **options: object) -> list[Path]:
    writer = ShardWriter(folder, **options)  # type: ignore[arg-type]
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    return writer.finish()


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        found[n].dtype == t.dtype and found[n].shape == t.shape and found[n].tolist() == t.tolist()
        for n, t in TENSORS.items()
    )


def test_the_library_reads_what_the_writer_streams(tmp_path: Path) -> None:
    (file,) = write(tmp_path, metadata={"k": [1]})
    assert file.name == "diffusion_pytorch_model.safetensors" and os.listdir(tmp_path) == [file.name]
    assert same(load_file(file))
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "ditcompress": '{"k": [1]}'}
    assert list(read_header(file)[0]) == list(TENSORS)  # in the order added


def test_shards_get_an_index_that_diffusers_expects(tmp_path: Path) -> None:
    files = write(tmp_path, max_shard_bytes=40)
    index = json.loads((tmp_path / INDEX).read_text())
    assert [f.name for f in files] == [f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    found = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert same(found)
    assert sorted(os.listdir(tmp_path)) == sorted([*(f.name for f in files), INDEX])


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=8)
    for number in range(3):
        writer.add(str(number), torch.full((10,), float(number)))
    assert [list(load_file(f)) for f in writer.finish()] == [["0"], ["1"], ["2"]]


@pytest.mark.parametrize("part", [1, 7, 64, 1000])
def test_moving_the_data_behind_the_header_keeps_every_byte(
    tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shards, "_PART", part)
    assert same(load_file(write(tmp_path)[0]))


def test_memory_holds_one_tensor_and_the_disk_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shards, "_PART", 1 << 20)
    one = torch.ones(1 << 20)  # 4 MB
    writer = ShardWriter(tmp_path)
    tracemalloc.start()
    for number in range(12):
        writer.add(str(number), one)
    assert [p.stat().st_size for p in tmp_path.iterdir()] == [pytest.approx(12 * 4 << 20, rel=0.01)]
    (file,) = writer.finish()
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert file.stat().st_size == pytest.approx(12 * (4 << 20), abs=2000)


def test_a_name_twice_is_our_mistake_and_an_odd_dtype_the_callers(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("x", torch.ones(1))
    with pytest.raises(ValueError, match="x was added twice"):
        writer.add("x", torch.ones(1))
    failure(lambda: writer.add("y", torch.zeros(2, dtype=torch.complex64)), "E318", "y", "complex64")


def test_bytes_do_not_depend_on_hash_seed_place_or_time(tmp_path: Path) -> None:
    code = """
    import sys, torch
    from pathlib import Path
    from ditcompress.checkpoint.writer import ShardWriter, output_folder, save_atomic
    with output_folder(Path(sys.argv[1]), manifest={"b": {"y": 1, "x": 2}, "a": 3}) as folder:
        w = ShardWriter(folder, metadata={"b": 1, "a": {"z": 2, "y": 3}}, max_shard_bytes=20)
        for name in ("one", "two", "three"): w.add(name, torch.arange(4.))
        w.finish()
        save_atomic(folder / "s.safetensors", {"q": torch.ones(3), "p": torch.ones(1)}, {"n": 1, "m": 2})
    """
    digests = set()
    for seed in ("0", "77"):
        folder = tmp_path / seed / "out"
        command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        files = sorted(folder.iterdir())
        assert len(files) == 6
        digests.add(tuple((p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files))
    assert len(digests) == 1


# --- one file --------------------------------------------------------------------------------------------------------


def test_one_file_is_saved_whole_and_replaces_the_earlier_one(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    save_atomic(file, {"old": torch.ones(2)})
    save_atomic(file, TENSORS, {"step": 3})
    assert same(load_file(file)) and os.listdir(tmp_path) == [file.name]
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["ditcompress"]) == {"step": 3}


def test_a_failed_save_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.safetensors"
    save_atomic(file, {"x": torch.ones(2)})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_shards, "_write", full)
    failure(lambda: save_atomic(file, {"x": torch.zeros(2)}), "E601", "state.safetensors", "space")
    assert load_file(file)["x"].tolist() == [1, 1] and os.listdir(tmp_path) == [file.name]


# --- manifest --------------------------------------------------------------------------------------------------------


def result(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("hello")
    write(folder)
    write_manifest(folder, {"recipe": {"name": "r"}})
    return folder


def test_a_manifest_notices_every_change(tmp_path: Path) -> None:
    folder = result(tmp_path / "out")
    manifest = read_manifest(folder)
    assert manifest["recipe"] == {"name": "r"} and manifest["tool"] == "ditcompress"
    text = hashlib.sha256(b"hello").hexdigest()
    assert manifest["files"]["sub/a.txt"] == {"bytes": 5, "sha256": text}
    verify_manifest(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    for place in (0, 8, len(whole) // 2, -1):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        failure(lambda: verify_manifest(folder), "E323", path.name, "sha256")
    path.write_bytes(whole[:-1])
    failure(lambda: verify_manifest(folder), "E323", path.name, str(len(whole)), "copy")
    path.unlink()
    failure(lambda: verify_manifest(folder), "E323", path.name, "missing")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"tool": "other", "files": {}}', '{"tool": "ditcompress"}', "[" * 90000, "\0"]
)
def test_a_manifest_of_something_else_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    failure(lambda: read_manifest(tmp_path), "E302", "finished result")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\0b"])
def test_a_manifest_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    text = json.dumps({"tool": "ditcompress", "files": {name: {"bytes": 1, "sha256": ""}}})
    (tmp_path / "manifest.json").write_text(text)
    failure(lambda: verify_manifest(tmp_path), "E402", "manifest.json")


def test_a_manifest_with_odd_facts_is_a_mismatch(tmp_path: Path) -> None:
    folder = result(tmp_path / "out")
    for facts in (None, 3, {}, {"bytes": 5}):
        manifest = read_manifest(folder)
        manifest["files"] = {"sub/a.txt": facts}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DitcompressError, match=r"E323.*a\.txt"):
            verify_manifest(folder)

"""Output appears whole or not at all, in the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ditcompress.checkpoint.manifest import read_manifest, verify_manifest
from ditcompress.checkpoint.writer import ShardWriter, output_folder, work_folder
from ditcompress.errors import DitcompressError

TENSORS = {"b": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4), "a": torch.ones(5), "empty": torch.zeros(0, 3)}


def write(target: Path, value: float = 1.0, **options: object) -> None:
    with output_folder(target, **options) as folder:  # type: ignore[arg-type]
        writer = ShardWriter(folder)
        writer.add("x", torch.full((100,), value))
        writer.finish()


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_the_library_reads_what_the_writer_streams(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, metadata={"k": 1})
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    (file,) = writer.finish()
    again = load_file(file)
    assert again.keys() == TENSORS.keys() and all(torch.equal(again[n], t) for n, t in TENSORS.items())
    assert hidden(tmp_path) == []


def test_shards_get_an_index_that_diffusers_expects(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=30)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    files = writer.finish()
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(files) == 2 and index["metadata"]["total_size"] == 24 + 20
    assert {n: load_file(tmp_path / f)[n].shape for n, f in index["weight_map"].items()} == {
        n: t.shape for n, t in TENSORS.items()
    }


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    code = """
    import sys, torch
    from pathlib import Path
    from ditcompress.checkpoint.writer import ShardWriter, save_atomic
    w = ShardWriter(Path(sys.argv[1]), metadata={"b": 1, "a": {"z": 2, "y": 3}})
    w.add("one", torch.arange(4.)); w.add("two", torch.zeros(2)); w.finish()
    save_atomic(Path(sys.argv[1]) / "s.safetensors", {"q": torch.ones(3), "p": torch.ones(1)}, {"n": 1, "m": 2})
    """
    digests = set()
    for seed in ("0", "1", "77"):
        folder = tmp_path / seed
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(folder)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        digests.add(tuple(hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())))
    assert len(digests) == 1


def test_a_result_has_a_manifest_that_notices_any_change(tmp_path: Path) -> None:
    write(tmp_path / "out", manifest={"recipe": "r"})
    assert read_manifest(tmp_path / "out")["recipe"] == "r"
    verify_manifest(tmp_path / "out")
    path = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DitcompressError, match=r"E323.*sha256"):
        verify_manifest(tmp_path / "out")


def test_a_failure_leaves_the_earlier_result_and_no_rubbish(tmp_path: Path) -> None:
    write(tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    for failure in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(failure), output_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "half").write_text("x")
            raise failure
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert hidden(tmp_path) == []


def test_overwriting_is_asked_for_and_only_of_our_own_results(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(DitcompressError, match=r"E501.*--overwrite"):
        write(tmp_path / "out")
    write(tmp_path / "out", 2.0, overwrite=True)
    assert load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")["x"][0] == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DitcompressError, match=r"E501.*no result of ditcompress"):
        write(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_the_output_is_neither_the_input_nor_around_nor_inside_it(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for target in (tmp_path / "in", tmp_path / "in" / "out", tmp_path):
        with pytest.raises(DitcompressError, match=r"E501"):
            write(target, overwrite=True, inputs=[tmp_path / "in"])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(DitcompressError, match=r"E402"):
        write(tmp_path / "link")


def test_a_second_writer_is_turned_away(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out"), pytest.raises(DitcompressError, match=r"E502"):
        write(tmp_path / "out")


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DitcompressError, match=r"E601"):
        write(tmp_path / "out", planned_bytes=2**60)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [100, 5000, 60_000])
def test_a_full_disk_gives_e601_and_keeps_the_earlier_result(tmp_path: Path, limit: int) -> None:
    write(tmp_path / "out")
    code = f"""
    import resource, signal, sys, torch
    from pathlib import Path
    from ditcompress.checkpoint.writer import ShardWriter, output_folder
    from ditcompress.errors import DitcompressError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    try:
        with output_folder(Path(sys.argv[1]), overwrite=True) as folder:
            w = ShardWriter(folder); w.add("x", torch.zeros(40_000)); w.finish()
    except DitcompressError as error:
        sys.exit(int(error.code[1:]) % 256)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out")], timeout=120)
    assert done.returncode == 601 % 256
    verify_manifest(tmp_path / "out")
    assert hidden(tmp_path) == []


def test_a_killed_writer_leaves_the_earlier_result_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    write(tmp_path / "out")
    code = """
    import sys, time
    from pathlib import Path
    from ditcompress.checkpoint.writer import output_folder
    with output_folder(Path(sys.argv[1]), overwrite=True) as folder:
        (folder / "half").write_text("x"); print("ready", flush=True); time.sleep(60)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline().strip() == "ready"
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(0.05)
    verify_manifest(tmp_path / "out")
    assert any("partial" in name for name in hidden(tmp_path))
    write(tmp_path / "out", 3.0, overwrite=True)
    assert not any("partial" in name for name in hidden(tmp_path))


def test_files_get_the_rights_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").stat().st_mode & 0o777 == 0o644


def test_work_of_another_run_is_refused_by_the_name_of_what_changed(tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "out", {"recipe": "a", "seed": 0})
    (folder / "part").write_text("x")
    assert (work_folder(tmp_path / "out", {"recipe": "a", "seed": 0}) / "part").exists()
    with pytest.raises(DitcompressError, match=r"E503.*seed.*--restart"):
        work_folder(tmp_path / "out", {"recipe": "a", "seed": 1})
    assert not (work_folder(tmp_path / "out", {"recipe": "a", "seed": 1}, restart=True) / "part").exists()

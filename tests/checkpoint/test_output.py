"""Output is whole or not there, and what was there before survives: full disks, kills, races, links, wrong places."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ditcompress.checkpoint import _shards, writer
from ditcompress.checkpoint.manifest import verify_manifest
from ditcompress.checkpoint.writer import ShardWriter, copy_pipeline, output_folder, remove_work, work_folder

from .faults import WEIGHTS, failure, in_child


def write(target: Path, value: float = 1.0, **options: object) -> None:
    with output_folder(target, **options) as folder:  # type: ignore[arg-type]
        shards = ShardWriter(folder)
        shards.add("x", torch.full((20_000,), value))
        shards.finish()
        (folder / "config.json").write_text("{}")


def value(target: Path) -> float:
    """The number in a result, which must be whole."""
    verify_manifest(target)
    return float(load_file(target / WEIGHTS)["x"][0])


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
def test_a_failure_leaves_the_earlier_result_and_no_rubbish(tmp_path: Path, kind: type[BaseException]) -> None:
    write(tmp_path / "out")
    with pytest.raises(kind), output_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "half").write_text("x")
        raise kind
    assert value(tmp_path / "out") == 1 and hidden(tmp_path) == []


def test_a_full_disk_of_any_size_gives_e601_and_keeps_the_earlier_result(tmp_path: Path) -> None:
    """Files limited to thirty sizes from nothing to one byte less than the largest needs."""
    out = tmp_path / "out"
    write(out)
    largest = (out / WEIGHTS).stat().st_size
    for limit in [0, 1, 8, 100, *range(2000, largest, largest // 25), largest - 1]:

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            write(out, 2.0, overwrite=True)

        assert in_child(limited) == 61, limit
        assert value(out) == 1 and hidden(tmp_path) == []
    write(out, 2.0, overwrite=True)
    assert value(out) == 2


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "E601"),
        (errno.EFBIG, "E601"),
        (errno.EDQUOT, "E601"),
        (errno.EROFS, "E603"),
        (errno.EACCES, "E603"),
    ],
)
def test_errors_of_the_disk_are_named(tmp_path: Path, number: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    write(tmp_path / "out")
    for place, name in ((_shards, "_write"), (writer, "write_manifest"), (writer, "_sync")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, broken)
            failure(lambda: write(tmp_path / "out", 2.0, overwrite=True), code, "out")
        assert value(tmp_path / "out") == 1 and hidden(tmp_path) == []


def test_a_failed_rename_puts_the_earlier_result_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if ".partial-" in Path(source).name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    failure(lambda: write(tmp_path / "out", 2.0, overwrite=True), "E603", "out")
    assert value(tmp_path / "out") == 1 and hidden(tmp_path) == []


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    failure(lambda: write(tmp_path / "a" / "out", planned_bytes=2**60), "E601", "out", str(int(2**60 * 1.05)))
    assert list(tmp_path.iterdir()) == []
    free = shutil.disk_usage(tmp_path).free
    failure(lambda: write(tmp_path / "out", planned_bytes=int(free * 0.97)), "E601", "free")


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    failure(lambda: write(tmp_path / "file" / "out"), "E603", "out")
    failure(lambda: write(tmp_path / "file" / "deep" / "out"), "E603", "out")
    failure(lambda: write(tmp_path / ("x" * 250)), "E603", "xxx")


# --- kills -----------------------------------------------------------------------------------------------------------


def die_at(name: str, occasion: int) -> Callable[[], None]:
    """Make the given function of `os` end the process by SIGKILL when it is called for the `occasion`th time."""
    original, count = getattr(os, name), 0

    def deadly(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == occasion:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    return lambda: setattr(os, name, deadly)


MOMENTS = [("rename", 1), ("rename", 2), ("rename", 3), *(("fsync", i) for i in range(1, 6)), ("unlink", 1)]


@pytest.mark.parametrize(("name", "occasion"), MOMENTS, ids=lambda v: str(v))
def test_a_kill_at_any_boundary_leaves_a_whole_result(tmp_path: Path, name: str, occasion: int) -> None:
    """Renames: shard, old result aside, new one in. Syncs: three files, the folder, the parent folder."""
    out = tmp_path / "out"
    write(out, 1.0)

    def killed() -> None:
        die_at(name, occasion)()
        write(out, 2.0, overwrite=True)

    assert in_child(killed) == -signal.SIGKILL
    if (name, occasion) != ("rename", 3):  # between the two renames the result has its hidden name
        assert value(out) in (1, 2)
    failure(lambda: write(out, 3.0), "E501", "--overwrite")  # the next run finds a result, that of before or after
    assert value(out) in (1, 2)
    write(out, 3.0, overwrite=True)
    assert value(out) == 3 and hidden(tmp_path) == []


def test_kills_at_random_moments_never_show_half_a_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, 1.0)
    for number in range(12):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    write(out, 2.0, overwrite=True)
            finally:
                os._exit(1)
        time.sleep(0.003 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():  # else it is aside, and the next run brings it back
            assert value(out) in (1, 2)
    write(out, 3.0, overwrite=True)
    assert value(out) == 3 and hidden(tmp_path) == []


def test_names_of_other_results_are_left_alone(tmp_path: Path) -> None:
    for name in (".outer.partial-1", ".out.work", ".out2.old-1"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.partial-dead").mkdir()
    write(tmp_path / "out")
    assert hidden(tmp_path) == [".out.work", ".out2.old-1", ".outer.partial-1"]


def test_names_with_pattern_characters_spaces_and_newlines_work(tmp_path: Path) -> None:
    for name in ("a [b]*?", "line\nbreak", "-rf", "ünï"):
        write(tmp_path / name)
        (tmp_path / f".{name}.partial-x").mkdir()
        write(tmp_path / name, 2.0, overwrite=True)
        assert value(tmp_path / name) == 2
    assert hidden(tmp_path) == []


# --- two writers -----------------------------------------------------------------------------------------------------


def test_a_second_writer_is_turned_away_at_once(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("first")
        start = time.monotonic()
        failure(lambda: write(tmp_path / "out", overwrite=True), "E502", "out", "another run")
        assert time.monotonic() - start < 1
    assert (tmp_path / "out" / "x").read_text() == "first"


def test_of_many_writers_exactly_one_wins(tmp_path: Path) -> None:
    for race in range(8):
        out, gate = tmp_path / f"out{race}", time.monotonic() + 0.05
        children = []
        for number in range(4):
            if (child := os.fork()) == 0:
                status = 99
                try:
                    time.sleep(max(0.0, gate - time.monotonic()))
                    status = 0 if _try(out, float(number)) else 5
                finally:
                    os._exit(status)
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(statuses) == [0, 5, 5, 5]
        assert value(out) == statuses.index(0)
    assert hidden(tmp_path) == []


def _try(out: Path, number: float) -> bool:
    from ditcompress.errors import DitcompressError

    try:
        write(out, number)
    except DitcompressError as error:
        assert error.code in ("E501", "E502")
        return False
    return True


def test_a_killed_writer_frees_its_lock(tmp_path: Path) -> None:
    def killed() -> None:
        with output_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    assert any(name.endswith(".lock") for name in hidden(tmp_path))
    write(tmp_path / "out")
    assert value(tmp_path / "out") == 1 and hidden(tmp_path) == []


# --- what may be overwritten -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["nothing", "empty", "ours", "foreign", "damaged", "file"])
def test_the_matrix_of_existing_targets(tmp_path: Path, kind: str, overwrite: bool) -> None:
    out = tmp_path / "out"
    if kind == "ours" or kind == "damaged":
        write(out)
    if kind == "damaged":
        (out / "manifest.json").write_text("{")
    if kind in ("empty", "foreign"):
        out.mkdir()
    if kind == "foreign":
        (out / "thesis.txt").write_text("precious")
    if kind == "file":
        out.write_text("precious")
    before = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    if kind in ("nothing", "empty") or (kind == "ours" and overwrite):
        write(out, 2.0, overwrite=overwrite)
        assert value(out) == 2
    else:
        remedy = "--overwrite" if kind == "ours" else "another --out"
        failure(lambda: write(out, 2.0, overwrite=overwrite), "E501", "out", remedy)
        assert (sorted(p.name for p in out.iterdir()) if out.is_dir() else []) == before
    assert hidden(tmp_path) == []


def test_the_output_is_neither_the_input_nor_around_nor_inside_it(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    for target in (source, source / "out", source / "sub" / "x" / "out", tmp_path, tmp_path / "in" / ".." / "in"):
        failure(lambda t=target: write(t, overwrite=True, inputs=[source]), "E501", "input", "--out")
    (tmp_path / "door").symlink_to(source)
    failure(lambda: write(tmp_path / "door" / "out", inputs=[source]), "E501", "inside the input")
    failure(lambda: write(source / "out", inputs=[tmp_path / "door"]), "E501", "inside the input")
    (source / "w.safetensors").write_text("x")
    failure(lambda: write(source, overwrite=True, inputs=[source / "w.safetensors"]), "E501", "contains the input")
    assert sorted(p.name for p in source.iterdir()) == ["sub", "w.safetensors"]


def test_links_and_the_root_are_no_targets(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling"):
        failure(lambda n=name: write(tmp_path / n), "E402", name)
    (tmp_path / ".out.lock").symlink_to(tmp_path / "nowhere")
    failure(lambda: write(tmp_path / "out"), "E402", ".out.lock")
    failure(lambda: write(Path("/")), "E501", "root")


# --- rights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_files_get_the_rights_of_the_umask(tmp_path: Path, mask: int, file_mode: int, folder_mode: int) -> None:
    source = tmp_path / "pipeline"
    (source / "vae").mkdir(parents=True)
    (source / "vae" / "x.json").write_text("{}")
    (source / "model_index.json").write_text("{}")
    (source / "vae").chmod(0o711)
    (source / "vae" / "x.json").chmod(0o777)
    before = os.umask(mask)
    try:
        with output_folder(tmp_path / "out") as folder:
            writer_ = ShardWriter(folder, max_shard_bytes=8)
            writer_.add("x", torch.ones(2))
            writer_.add("y", torch.ones(2))
            writer_.finish()
            copy_pipeline(source, folder, "transformer")
    finally:
        os.umask(before)
    found = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {p.stat().st_mode & 0o777 for p in found if p.is_file()} == {file_mode}
    assert {p.stat().st_mode & 0o777 for p in found if p.is_dir()} == {folder_mode}


# --- pipelines -------------------------------------------------------------------------------------------------------


def test_a_pipeline_is_copied_without_the_replaced_component(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    for name in ("transformer/w", "vae/config.json", "text_encoder/deep/x", ".git/x", "README.md", "model_index.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    target.mkdir()
    copy_pipeline(source, target, "transformer")
    copied = sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())
    assert copied == ["model_index.json", "text_encoder/deep/x", "vae/config.json"]
    assert (target / "text_encoder/deep/x").read_text() == "text_encoder/deep/x"


@pytest.mark.parametrize("kind", ["file link", "folder link", "pipe"])
def test_what_is_no_file_of_the_pipeline_is_not_copied(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "in"
    (source / "vae").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    if kind == "pipe":
        os.mkfifo(source / "vae" / "odd")
    else:
        (source / "vae" / "odd").symlink_to(tmp_path / "secret" / ("key" if kind == "file link" else ""))
    failure(lambda: copy_pipeline(source, tmp_path / "out", "transformer"), "E402", "odd")
    shutil.rmtree(source / "vae")
    (source / "vae").symlink_to(tmp_path / "secret")
    failure(lambda: copy_pipeline(source, tmp_path / "out", "transformer"), "E402", "key")


# --- work of an interrupted run --------------------------------------------------------------------------------------


def test_work_is_found_again_by_the_same_run_only(tmp_path: Path) -> None:
    marks = {"recipe": "a", "seed": 0, "versions": {"torch": "2"}}
    folder = work_folder(tmp_path / "out", marks)
    assert folder == tmp_path / ".out.work"
    (folder / "part").write_text("x")
    assert (work_folder(tmp_path / "out", dict(reversed(marks.items()))) / "part").exists()
    changes = ({"recipe": "b"}, {"seed": 1}, {"seed": None}, {"versions": {"torch": "3"}}, {"added": 1})
    for change in changes:
        failure(lambda c=change: work_folder(tmp_path / "out", {**marks, **c}), "E503", next(iter(change)), "--restart")
    assert (folder / "part").exists()
    assert not (work_folder(tmp_path / "out", {**marks, "seed": 1}, restart=True) / "part").exists()
    remove_work(folder)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 90000])
def test_work_with_an_unreadable_fingerprint_is_not_trusted(tmp_path: Path, text: str) -> None:
    folder = work_folder(tmp_path / "out", {"seed": 0})
    (folder / "fingerprint.json").write_text(text)
    failure(lambda: work_folder(tmp_path / "out", {"seed": 0}), "E503", "fingerprint.json")
    work_folder(tmp_path / "out", {"seed": 0}, restart=True)


def test_work_of_a_run_killed_at_its_start_begins_anew(tmp_path: Path) -> None:
    def killed() -> None:
        die_at("replace", 1)()
        work_folder(tmp_path / "out", {"seed": 0})

    assert in_child(killed) == -signal.SIGKILL
    assert os.listdir(work_folder(tmp_path / "out", {"seed": 1})) == ["fingerprint.json"]


def test_a_link_is_no_work_folder(tmp_path: Path) -> None:
    (tmp_path / ".out.work").symlink_to(tmp_path)
    failure(lambda: work_folder(tmp_path / "out", {}, restart=True), "E402", ".out.work")

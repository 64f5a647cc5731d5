"""Faults of folders: shards, index, links, configuration, values. Each gives its code, file, tensor and remedy."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditcompress.checkpoint.reader import check_finite, open_checkpoint
from ditcompress.loading import open_model

from .faults import WEIGHTS, change, change_config, change_index, failure, shard

NAME = "transformer_blocks.1.attn1.to_q.weight"


def test_a_whole_folder_and_a_sharded_one_open_with_the_same_tensors(copied: Path, tiny_dit: Path) -> None:
    shard(copied, 3)
    one, many = open_checkpoint(tiny_dit), open_checkpoint(copied)
    assert list(one.tensors) == list(many.tensors) == sorted(one.tensors)
    assert all(torch.equal(one.read(n), many.read(n)) for n in one.tensors)
    assert all(torch.equal(one.read(n), t) for n, t in load_file(tiny_dit / WEIGHTS).items())
    assert one.total_bytes == many.total_bytes == sum(t.nbytes for t in load_file(tiny_dit / WEIGHTS).values())


def test_the_fingerprint_follows_every_byte_and_the_configuration(copied: Path, tiny_dit: Path) -> None:
    whole = open_checkpoint(tiny_dit).fingerprint
    assert open_checkpoint(copied).fingerprint == whole
    change_config(copied, norm_eps=0.5)
    configured = open_checkpoint(copied).fingerprint
    change(copied, lambda t: t[NAME].view(-1).__setitem__(0, 0.125))
    assert len({whole, configured, open_checkpoint(copied).fingerprint}) == 3


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [*range(0, 64, 3), 63])
def test_a_file_cut_anywhere_is_said_to_be_cut(copied: Path, part: int) -> None:
    file = shard(copied)[1]
    whole = file.stat().st_size
    os.truncate(file, whole * part // 64)
    error = failure(lambda: open_checkpoint(copied), "E312", file.name, str(whole * part // 64), "copy")
    header_end = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    if file.stat().st_size > header_end:
        assert f"needs {whole}" in error.line()


def test_one_lost_byte_is_a_cut_file(copied: Path) -> None:
    size = (copied / WEIGHTS).stat().st_size
    os.truncate(copied / WEIGHTS, size - 1)
    failure(lambda: open_checkpoint(copied), "E312", WEIGHTS, f"file has {size - 1} bytes, header needs {size}")


def test_a_missing_shard_is_named(copied: Path) -> None:
    files = shard(copied)
    files[1].unlink()
    failure(lambda: open_checkpoint(copied), "E311", files[1].name, "copy")


def test_swapped_shards_are_noticed(copied: Path) -> None:
    first, second = shard(copied)
    first.rename(copied / "x")
    second.rename(first)
    (copied / "x").rename(second)
    failure(lambda: open_checkpoint(copied), "E314", first.name, "the index says")


def test_a_stale_shard_is_refused(copied: Path) -> None:
    shard(copied)
    save_file({"x": torch.zeros(1)}, copied / "diffusion_pytorch_model-00001-of-00009.safetensors")
    failure(lambda: open_checkpoint(copied), "E313", "00001-of-00009", "index")


def test_the_whole_file_beside_its_shards_is_stale(copied: Path, tiny_dit: Path) -> None:
    shard(copied)
    shutil.copy(tiny_dit / WEIGHTS, copied)
    failure(lambda: open_checkpoint(copied), "E313", WEIGHTS, "remove")


def test_a_second_weight_file_without_an_index_is_stale(copied: Path) -> None:
    save_file({"x": torch.zeros(1)}, copied / "old.safetensors")
    failure(lambda: open_checkpoint(copied), "E313", "old.safetensors")


def test_index_and_shards_must_agree_both_ways(copied: Path) -> None:
    first, second = shard(copied)
    assert NAME in load_file(first)
    change_index(copied, lambda i: i["weight_map"].update({NAME: second.name}))
    failure(lambda: open_checkpoint(copied), "E314", NAME, first.name, second.name)
    change_index(copied, lambda i: i["weight_map"].pop(NAME))
    failure(lambda: open_checkpoint(copied), "E314", NAME, first.name, "no file")
    change_index(copied, lambda i: i["weight_map"].update({NAME: first.name, "ghost.weight": first.name}))
    failure(lambda: open_checkpoint(copied), "E315", "ghost.weight", first.name)


def test_one_tensor_in_two_shards_is_refused(copied: Path) -> None:
    first, second = shard(copied)
    save_file({**load_file(second), NAME: torch.zeros(1)}, second)
    failure(lambda: open_checkpoint(copied), "E314", NAME, first.name, second.name)


@pytest.mark.parametrize("total", [0, -1, "many", None, [], True])
def test_the_total_size_of_an_index_is_checked(copied: Path, total: object) -> None:
    shard(copied)
    change_index(copied, lambda i: i["metadata"].update({"total_size": total}))
    if total is None:  # an index need not have one
        open_checkpoint(copied)
    else:
        failure(lambda: open_checkpoint(copied), "E314", "total_size")


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{" * 2000, "\xff"]
)
def test_an_index_that_is_none_is_refused(copied: Path, text: str) -> None:
    shard(copied)
    (copied / f"{WEIGHTS}.index.json").write_text(text, encoding="latin-1")
    failure(lambda: open_checkpoint(copied), "E314", "index.json")


def test_shards_without_an_index_are_refused(copied: Path) -> None:
    shard(copied)
    (copied / f"{WEIGHTS}.index.json").unlink()
    failure(lambda: open_checkpoint(copied), "E314", "index.json")


def test_a_folder_without_weights_or_with_pickles_only(copied: Path) -> None:
    (copied / WEIGHTS).unlink()
    failure(lambda: open_checkpoint(copied), "E311", WEIGHTS)
    (copied / "diffusion_pytorch_model.bin").write_bytes(b"x")
    failure(lambda: open_checkpoint(copied), "E311", "diffusion_pytorch_model.bin", "safetensors version")


def test_files_without_tensors_are_no_model(copied: Path) -> None:
    save_file({}, copied / WEIGHTS)
    failure(lambda: open_checkpoint(copied), "E315", WEIGHTS)
    failure(lambda: open_checkpoint(copied / WEIGHTS), "E315", WEIGHTS)


def test_variant_names_are_read_alone_and_give_way_to_plain_ones(copied: Path, tiny_dit: Path) -> None:
    half = copied / "diffusion_pytorch_model.fp16.safetensors"
    save_file({n: t.half() for n, t in load_file(copied / WEIGHTS).items()}, half)
    assert open_checkpoint(copied).read(NAME).dtype == torch.float32
    (copied / WEIGHTS).unlink()
    assert open_checkpoint(copied).read(NAME).dtype == torch.float16
    shutil.copy(half, copied / "diffusion_pytorch_model.ema.safetensors")
    failure(lambda: open_checkpoint(copied), "E313", "ema", "one weight file")


def test_a_sharded_variant_is_read_by_its_index(copied: Path) -> None:
    files = shard(copied)
    for file in files:
        file.rename(copied / file.name.replace("model-", "model.fp16-"))
    text = (copied / f"{WEIGHTS}.index.json").read_text().replace("model-", "model.fp16-")
    (copied / f"{WEIGHTS}.index.json").unlink()
    (copied / f"{WEIGHTS}.index.fp16.json").write_text(text)
    assert NAME in open_checkpoint(copied).tensors


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a/../b.safetensors",
        "x\n.safetensors",
        "x\0.safetensors",
        "..",
        "",
        "C:\\x.safetensors",
        "passwd",
        ".hidden.safetensors",
        "\u202ex.safetensors",
    ],
    ids=ascii,
)
def test_a_shard_name_that_leads_away_is_refused(copied: Path, name: str) -> None:
    shard(copied)
    change_index(copied, lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], name)))
    failure(lambda: open_checkpoint(copied), "E402", "index.json")


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "modеl.safetensors"], ids=["long", "look-alike"])
def test_a_shard_of_an_odd_name_is_merely_missing(copied: Path, name: str) -> None:
    for file in shard(copied):
        file.unlink()
    change_index(copied, lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], name)))
    failure(lambda: open_checkpoint(copied), "E311", name[:20])


@pytest.mark.parametrize("which", [WEIGHTS, "config.json"])
def test_a_file_that_links_outside_is_refused(copied: Path, tmp_path: Path, which: str) -> None:
    shutil.move(copied / which, tmp_path / "elsewhere")
    (copied / which).symlink_to(tmp_path / "elsewhere")
    failure(lambda: open_checkpoint(copied), "E402", which, "cp -rL")


def test_a_link_inside_the_folder_is_followed_and_a_dangling_one_is_missing(copied: Path) -> None:
    (copied / WEIGHTS).rename(copied / "real.bin")
    (copied / WEIGHTS).symlink_to("real.bin")
    assert NAME in open_checkpoint(copied).tensors
    (copied / "real.bin").unlink()
    failure(lambda: open_checkpoint(copied), "E311", WEIGHTS)
    (copied / WEIGHTS).unlink()
    (copied / WEIGHTS).symlink_to(WEIGHTS)
    failure(lambda: open_checkpoint(copied), "E311", WEIGHTS)


def test_the_links_of_a_hub_cache_lead_to_its_blobs(tiny_dit: Path, tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    folder = model / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, name in enumerate(("config.json", WEIGHTS)):
        shutil.copy(tiny_dit / name, model / "blobs" / str(number))
        (folder / name).symlink_to(f"../../blobs/{number}")
    assert NAME in open_checkpoint(folder).tensors
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tiny_dit / WEIGHTS)
    failure(lambda: open_checkpoint(folder), "E402", WEIGHTS)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_pipes_folders_and_devices_are_not_read(copied: Path, kind: str) -> None:
    (copied / WEIGHTS).unlink()
    if kind == "fifo":
        os.mkfifo(copied / WEIGHTS)
    elif kind == "folder":
        (copied / WEIGHTS).mkdir()
    else:
        (copied / WEIGHTS).symlink_to("/dev/zero")
    failure(lambda: open_checkpoint(copied), "E402", WEIGHTS)


def test_nothing_here_and_nothing_known(tmp_path: Path) -> None:
    failure(lambda: open_checkpoint(tmp_path / "no"), "E301", "no")
    failure(lambda: open_checkpoint(tmp_path / ("x" * 400)), "E301", "xxx")
    failure(lambda: open_checkpoint(tmp_path), "E302", "config.json")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    failure(lambda: open_checkpoint(tmp_path / "x.gguf"), "E302", "x.gguf")


# --- pipelines and single files --------------------------------------------------------------------------------------


def pipeline(copied: Path, entry: object) -> Path:
    root = copied.parent / "pipeline"
    root.mkdir(exist_ok=True)
    shutil.copytree(copied, root / "transformer", dirs_exist_ok=True)
    (root / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "transformer": entry}))
    return root


def test_a_pipeline_opens_as_its_transformer(copied: Path) -> None:
    root = pipeline(copied, ["diffusers", "DiTTransformer2DModel"])
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text("{}")
    found = open_checkpoint(root)
    assert (found.pipeline, found.component, found.folder) == (root, "transformer", root / "transformer")
    assert found.scheduler_folder == root / "scheduler" == open_checkpoint(root / "transformer").scheduler_folder


def test_a_pipeline_without_a_transformer_or_with_code_is_refused(copied: Path, tmp_path: Path) -> None:
    for entry in (None, [None, None], "diffusers", ["diffusers"], [["a"], "b"]):
        failure(lambda e=entry: open_checkpoint(pipeline(copied, e)), "E302", "model_index.json", "transformer")
    root = pipeline(copied, ["my_transformer", "Mine"])
    canary = tmp_path / "canary"
    (root / "transformer" / "my_transformer.py").write_text(f"open({str(canary)!r}, 'w')")
    failure(lambda: open_checkpoint(root), "E403", "model_index.json", "my_transformer")
    assert not canary.exists()


def test_a_component_that_links_outside_is_refused(copied: Path) -> None:
    root = pipeline(copied, ["diffusers", "DiTTransformer2DModel"])
    shutil.rmtree(root / "transformer")
    (root / "transformer").symlink_to(copied)
    failure(lambda: open_checkpoint(root), "E402", "config.json")


def test_a_single_file_takes_the_config_beside_it(copied: Path) -> None:
    assert open_checkpoint(copied / WEIGHTS).class_name == "DiTTransformer2DModel"
    (copied / "config.json").unlink()
    failure(lambda: open_checkpoint(copied / WEIGHTS), "E302", WEIGHTS, "config.json")


@pytest.mark.parametrize("text", ["x", "{}", '{"config": []}', '{"config": {}}'])
def test_a_single_file_with_a_damaged_description_is_refused(copied: Path, text: str) -> None:
    save_file(load_file(copied / WEIGHTS), copied / WEIGHTS, {"ditcompress": text})
    failure(lambda: open_checkpoint(copied / WEIGHTS), "E320", WEIGHTS, "metadata")


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "code", "mention"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "E321", "UNet2DConditionModel"),
        ({"_class_name": "DiTTransformer3DModel"}, "E321", "DiTTransformer2DModel"),
        ({"_class_name": ["a", "b"]}, "E403", "config.json"),
        ({"_class_name": None}, "E320", "_class_name"),
        ({"_class_name": {}}, "E320", "_class_name"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "E403", "config.json"),
        ({"num_layers": 3}, "E315", "transformer_blocks.2"),
        ({"num_layers": 1}, "E316", "transformer_blocks.1"),
        ({"num_layers": 20000}, "E320", "num_layers"),
        ({"num_layers": -1}, "E320", "num_layers"),
        ({"num_layers": "two"}, "E320", "num_layers"),
        ({"attention_head_dim": 4}, "E317", "config.json says"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "E322", "bitsandbytes"),
        ({"quantization_config": {}}, "E322", "already quantized"),
        ({"quantization_config": []}, "E322", "already quantized"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_does_not_fit_is_refused(copied: Path, values: dict, code: str, mention: str) -> None:
    change_config(copied, **values)
    failure(lambda: open_model(copied), code, mention)


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', '{"x": ' + "[" * 60 + "]" * 60 + "}", "{}", "[" * 90000, "\xff"],
    ids=lambda text: ascii(text)[:20],
)
def test_a_config_that_is_no_strict_json_object_is_refused(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text, encoding="latin-1")
    failure(lambda: open_checkpoint(copied), "E320", "config.json")


def test_a_huge_config_is_not_read(copied: Path) -> None:
    os.truncate(copied / "config.json", 1 << 40)  # sparse
    failure(lambda: open_checkpoint(copied), "E320", "config.json", str(1 << 40))


# --- tensors against the model ---------------------------------------------------------------------------------------


def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(copied: Path) -> None:
    change(copied, lambda t: t.pop(NAME))
    failure(lambda: open_model(copied), "E315", NAME)
    change(copied, lambda t: t.update({NAME: torch.zeros(3, 3)}))
    failure(lambda: open_model(copied), "E317", NAME, WEIGHTS, "(3, 3)")
    change(copied, lambda t: t.update({"surplus.weight": torch.zeros(2)}))
    failure(lambda: open_model(copied), "E316", "surplus.weight", WEIGHTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_found_in_every_tensor(copied: Path, tiny_dit: Path, value: float) -> None:
    names = sorted(load_file(tiny_dit / WEIGHTS))
    for name in names[:: max(1, len(names) // 6)]:
        shutil.copy(tiny_dit / WEIGHTS, copied)
        change(copied, lambda t, n=name: t[n].view(-1).__setitem__(-1, value))
        failure(lambda: check_finite(open_checkpoint(copied)), "E319", name, WEIGHTS, "1 of ")


@pytest.mark.parametrize(
    ("dtype", "code"),
    [
        (torch.float64, ""),
        (torch.float16, ""),
        (torch.bfloat16, ""),
        (torch.int8, "E322"),
        (torch.uint8, "E322"),
        (torch.float8_e4m3fn, "E322"),
        (torch.float8_e5m2, "E322"),
        (torch.int16, "E318"),
        (torch.int32, "E318"),
        (torch.int64, "E318"),
        (torch.bool, "E318"),
        (torch.complex64, "E318"),
    ],
    ids=str,
)
def test_dtypes_are_taken_or_refused_by_name(copied: Path, dtype: torch.dtype, code: str) -> None:
    change(copied, lambda t: t.update({NAME: t[NAME].to(dtype)}))
    if code:
        failure(lambda: open_checkpoint(copied), code, NAME, WEIGHTS)
    else:
        assert open_checkpoint(copied).read(NAME).dtype == dtype


def test_our_own_result_is_not_compressed_again(w4a8: Path) -> None:
    open_checkpoint(w4a8)
    failure(lambda: open_checkpoint(w4a8, allow_compressed=False), "E322", "ditcompress", "original")


# --- changes while in use --------------------------------------------------------------------------------------------


def test_a_file_that_shrinks_while_in_use_is_an_error_and_no_signal(copied: Path) -> None:
    checkpoint = open_checkpoint(copied)
    checkpoint.verify_unchanged()
    os.truncate(copied / WEIGHTS, 5000)
    failure(lambda: checkpoint.read(NAME), "E324", NAME, WEIGHTS)
    failure(checkpoint.verify_unchanged, "E324", WEIGHTS)


def test_a_replaced_file_and_a_rewritten_one_with_its_old_date_are_noticed(copied: Path) -> None:
    checkpoint = open_checkpoint(copied)
    assert checkpoint.fingerprint
    before = (copied / WEIGHTS).stat()
    os.chmod(copied / WEIGHTS, 0o600)
    checkpoint.verify_unchanged()  # another mode is no other content
    with open(copied / WEIGHTS, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(copied / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    failure(checkpoint.verify_unchanged, "E324", copied.name)
    checkpoint = open_checkpoint(copied)
    change(copied, lambda t: None)
    failure(checkpoint.verify_unchanged, "E324", WEIGHTS)

"""Every fault of an input: the documented code, and one line that names file, tensor and remedy."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditcompress.checkpoint.reader import check_finite, open_checkpoint
from ditcompress.errors import DitcompressError
from ditcompress.loading import load_model, open_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


def failure(run: Callable[[], object]) -> DitcompressError:
    with pytest.raises(DitcompressError) as caught:
        run()
    line = caught.value.line()
    assert "\n" not in line and len(line) <= 400 and line.startswith("error[E")
    return caught.value


def shard(folder: Path, count: int = 2) -> list[Path]:
    """Split the weights of a folder into an indexed checkpoint."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, files, weight_map = sorted(tensors), [], {}
    for number in range(count):
        part = names[number::count]
        file = folder / f"diffusion_pytorch_model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, file)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return files


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_whole_folder_and_a_sharded_one_open_with_the_same_tensors(copied: Path, tiny_dit: Path) -> None:
    shard(copied, 3)
    one, many = open_checkpoint(tiny_dit), open_checkpoint(copied)
    assert list(one.tensors) == list(many.tensors)
    assert all(torch.equal(one.read(n), many.read(n)) for n in one.tensors)
    assert all(torch.equal(one.read(n), t) for n, t in load_file(tiny_dit / WEIGHTS).items())


@pytest.mark.parametrize("part", [0, 4, 8, 100, 0.5, 0.99, -1])
def test_a_cut_file_is_said_to_be_cut(copied: Path, part: float) -> None:
    data = (copied / WEIGHTS).read_bytes()
    keep = len(data) - 1 if part == -1 else int(part if part > 1 or part == 0 else part * len(data))
    (copied / WEIGHTS).write_bytes(data[:keep])
    error = failure(lambda: open_checkpoint(copied))
    assert error.code == "E312" and WEIGHTS in error.line() and "copy" in error.remedy


def test_a_missing_shard_is_named(copied: Path) -> None:
    files = shard(copied)
    files[1].unlink()
    error = failure(lambda: open_checkpoint(copied))
    assert error.code == "E311" and files[1].name in error.line()


def test_a_stale_shard_is_refused(copied: Path) -> None:
    shard(copied)
    save_file({"x": torch.zeros(1)}, copied / "old.safetensors")
    assert failure(lambda: open_checkpoint(copied)).code == "E313"


def test_index_and_shards_must_agree(copied: Path) -> None:
    shard(copied)
    path = copied / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    first = sorted(index["weight_map"])[0]
    other = next(v for v in index["weight_map"].values() if v != index["weight_map"][first])
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], first: other}}))
    error = failure(lambda: open_checkpoint(copied))
    assert error.code == "E314" and first in error.line()
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "ghost": other}}))
    assert failure(lambda: open_checkpoint(copied)).code == "E315"


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x\n.safetensors", ".."])
def test_shards_outside_the_folder_are_refused(copied: Path, name: str) -> None:
    shard(copied)
    path = copied / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    path.write_text(json.dumps(index))
    assert failure(lambda: open_checkpoint(copied)).code in ("E402", "E313")


def test_a_linked_weight_file_is_refused(copied: Path, tmp_path: Path) -> None:
    shutil.move(copied / WEIGHTS, tmp_path / "elsewhere.safetensors")
    (copied / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    assert failure(lambda: open_checkpoint(copied)).code == "E402"


def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(copied: Path) -> None:
    name = "transformer_blocks.1.attn1.to_q.weight"
    change(copied, lambda t: t.pop(name))
    error = failure(lambda: open_model(copied))
    assert error.code == "E315" and name in error.line()
    change(copied, lambda t: t.update({name: torch.zeros(3, 3)}))
    error = failure(lambda: open_model(copied))
    assert error.code == "E317" and name in error.line() and WEIGHTS in error.line()
    change(copied, lambda t: t.update({"surplus.weight": torch.zeros(2)}))
    error = failure(lambda: open_model(copied))
    assert error.code == "E316" and "surplus.weight" in error.line()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_is_found_in_any_tensor(copied: Path, value: float) -> None:
    name = "transformer_blocks.0.ff.net.2.bias"
    change(copied, lambda t: t[name].__setitem__(0, value))
    error = failure(lambda: check_finite(open_checkpoint(copied)))
    assert error.code == "E319" and name in error.line() and WEIGHTS in error.line()


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "E321"),
        ({"_class_name": "DiTTransformer3DModel"}, "E321"),
        ({"_class_name": ["a", "b"]}, "E403"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "E403"),
        ({"num_layers": 3}, "E315"),
        ({"num_layers": 1}, "E316"),
        ({"num_layers": 20000}, "E320"),
        ({"num_layers": -1}, "E320"),
        ({"num_layers": "two"}, "E320"),
        ({"attention_head_dim": 4}, "E317"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "E322"),
        ({"quantization_config": []}, "E322"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_does_not_fit_is_refused(copied: Path, values: dict[str, object], code: str) -> None:
    config(copied, **values)
    assert failure(lambda: open_model(copied)).code == code


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": NaN}', '{"x": ' + "[" * 60 + "]" * 60 + "}", "{}"])
def test_a_config_that_is_no_json_object_is_refused(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    assert failure(lambda: open_checkpoint(copied)).code == "E320"


def test_eight_bit_weights_without_a_description_are_taken_for_a_packed_model(copied: Path) -> None:
    name = "transformer_blocks.0.attn1.to_q.weight"
    change(copied, lambda t: t.update({name: t[name].to(torch.int8)}))
    assert failure(lambda: open_checkpoint(copied)).code == "E322"


def test_our_own_result_is_not_compressed_again(w4a8: Path) -> None:
    open_checkpoint(w4a8)
    assert failure(lambda: open_checkpoint(w4a8, allow_compressed=False)).code == "E322"


def header(entries: dict[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (struct.pack("<Q", 2**40) + b"{}", "E310"),
        (struct.pack("<Q", 8) + b"not json", "E310"),
        (header({"a": tensor(0, 8, [1])}, bytes(8)), "E310"),
        (header({"a": tensor(4, 8, [1])}, bytes(8)), "E310"),
        (header({"a": tensor(0, 4, [1]), "b": tensor(0, 4, [1])}, bytes(4)), "E310"),
        (header({"a": tensor(0, 4, [1])}, bytes(9)), "E310"),
        (header({"a": tensor(0, 4, [2**40, 2**40])}, bytes(4)), "E310"),
        (header({"a": tensor(0, 4, [-1])}, bytes(4)), "E310"),
        (header({"a\x1b[31m": tensor(0, 4, [1])}, bytes(4)), "E310"),
        (header({"a": tensor(0, 8, [1], "C64")}, bytes(8)), "E318"),
        (header({"a": tensor(0, 400, [100])}, bytes(4)), "E312"),
    ],
    ids=["huge", "no json", "length", "hole", "overlap", "tail", "overflow", "negative", "escape", "complex", "short"],
)
def test_a_header_that_lies_is_caught(copied: Path, content: bytes, code: str) -> None:
    (copied / WEIGHTS).write_bytes(content)
    error = failure(lambda: open_checkpoint(copied))
    assert error.code == code and "\x1b" not in error.line()


def test_a_change_during_the_run_is_noticed(copied: Path) -> None:
    checkpoint = open_checkpoint(copied)
    checkpoint.verify_unchanged()
    change(copied, lambda t: None)
    assert failure(checkpoint.verify_unchanged).code == "E324"


def test_nothing_here_and_nothing_known(tmp_path: Path) -> None:
    assert failure(lambda: open_checkpoint(tmp_path / "no")).code == "E301"
    assert failure(lambda: open_checkpoint(tmp_path)).code == "E302"
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert failure(lambda: open_checkpoint(tmp_path / "x.gguf")).code == "E302"


# --- .pt files -------------------------------------------------------------------------------------------------------


class _Runs:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.canary}",)


def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"model": _Runs(canary)}, tmp_path / "evil.pt")
    error = failure(lambda: open_checkpoint(tmp_path / "evil.pt"))
    assert error.code == "E401" and "evil.pt" in error.line() and not canary.exists()
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(_Runs(canary)))
    assert failure(lambda: open_checkpoint(tmp_path / "raw.pt")).code in ("E323", "E401") and not canary.exists()


def test_a_deflated_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    assert failure(lambda: open_checkpoint(tmp_path / "bomb.pt")).code == "E401"


def original_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a diffusers DiT under the names of the original code (the inverse of the conversion)."""
    state, result = model.state_dict(), {}
    table = {
        "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
        "norm1.linear": "adaLN_modulation.1",
    }  # fmt: skip
    for i in range(len(model.transformer_blocks)):
        for leaf in ("weight", "bias"):
            for new, old in table.items():
                result[f"blocks.{i}.{old}.{leaf}"] = state[f"transformer_blocks.{i}.{new}.{leaf}"]
            qkv = [state[f"transformer_blocks.{i}.attn1.to_{x}.{leaf}"] for x in "qkv"]
            result[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(qkv)
    for leaf in ("weight", "bias"):
        result[f"x_embedder.proj.{leaf}"] = state[f"pos_embed.proj.{leaf}"]
        result[f"final_layer.adaLN_modulation.1.{leaf}"] = state[f"proj_out_1.{leaf}"]
        result[f"final_layer.linear.{leaf}"] = state[f"proj_out_2.{leaf}"]
        for old, new in (("0", "linear_1"), ("2", "linear_2")):
            key = f"transformer_blocks.0.norm1.emb.timestep_embedder.{new}.{leaf}"
            result[f"t_embedder.mlp.{old}.{leaf}"] = state[key]
    result["y_embedder.embedding_table.weight"] = state[
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    ]
    result["pos_embed"] = torch.zeros(1, 16, 128)
    return result


def test_an_original_dit_checkpoint_loads_as_the_diffusers_model(tmp_path: Path) -> None:
    import argparse

    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=7, norm_elementwise_affine=False, norm_type="ada_norm_zero", norm_eps=1e-6,
    ).eval()  # fmt: skip
    shared = dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.transformer_blocks[1].norm1.emb.load_state_dict(shared)  # the original has one embedder for all blocks
    torch.save({"ema": original_names(model), "args": argparse.Namespace(lr=1.0)}, tmp_path / "dit.pt")
    loaded, checkpoint = load_model(tmp_path / "dit.pt")
    assert checkpoint.config["num_layers"] == 2
    args = (torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.tensor([1, 6]))
    with torch.no_grad():
        assert torch.equal(loaded(*args).sample, model(*args).sample)


def test_an_unknown_pt_layout_is_no_dit(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    assert failure(lambda: open_checkpoint(tmp_path / "other.pt")).code == "E302"

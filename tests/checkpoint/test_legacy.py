""".pt files: none runs code, none claims more than it holds, and an original DiT becomes the diffusers model."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

from ditcompress.checkpoint import _unpickle, legacy
from ditcompress.checkpoint.reader import open_checkpoint
from ditcompress.loading import load_model

from .faults import failure

# --- code ------------------------------------------------------------------------------------------------------------

# Callables that public advisories against pickle scanners and torch.load have used, and a few of the same kind.
CALLS = (
    """
posix system|nt system|os system|os popen|os execv|subprocess Popen|subprocess check_output|builtins eval|builtins exec
builtins getattr|builtins open|builtins __import__|builtins compile|__builtin__ eval|runpy run_path|runpy _run_code
importlib import_module|pydoc locate|pydoc pipepager|operator attrgetter|operator methodcaller|functools partial
ctypes CDLL|code InteractiveInterpreter|timeit timeit|cProfile run|profile run|trace Trace|bdb Bdb|pdb run|doctest debug
asyncio.unix_events _UnixSubprocessTransport|multiprocessing.util spawnv_passfds|pty spawn|shutil rmtree|shutil move
webbrowser open|urllib.request urlopen|socket socket|http.server test|smtplib SMTP|ftplib FTP|tempfile mktemp|_io open
io FileIO|codecs decode|marshal loads|types FunctionType|types CodeType|pickle loads|pip main|ensurepip _run_pip
idlelib.run Executive|idlelib.pyshell ModifiedInterpreter.runcode|lib2to3.pgen2.grammar Grammar.loads
logging.config listen|torch load|torch.jit.unsupported_tensor_ops execWrapper
torch.utils.bottleneck.__main__ run_cprofile|torch.hub load
torch.utils._config_module load_config|torch.utils.data.datapipes.utils.decoder basichandlers
torch.distributed.rpc remote|torch.serialization load|torch.storage _load_from_bytes
torch._dynamo.guards GuardBuilder.get|torch.fx GraphModule
torch.utils.collect_env run|torch._inductor.codecache compile_file|numpy.testing._private.utils runstring|numpy load
numpy.f2py.crackfortran getlincoef|distutils.file_util write_file|site addpackage|venv main|zipimport zipimporter
""".replace("\n", "|")
    .strip("|")
    .split("|")
)


def archive(path: Path, pickled: bytes, name: str = "archive/data.pkl", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(name, pickled)
        file.writestr("archive/version", "3\n")
    return path


def call(name: str, canary: Path) -> bytes:
    """A pickle of protocol 2 that calls `name` with a shell command."""
    module, _, attribute = name.partition(" ")
    command = f"touch {canary}".encode()
    argument = b"X" + len(command).to_bytes(4, "little") + command
    return b"\x80\x02}X\x05\x00\x00\x00modelc" + f"{module}\n{attribute}\n".encode() + argument + b"\x85Rs."


@pytest.mark.parametrize("start", range(0, len(CALLS), 8))
def test_a_pickle_that_could_run_code_is_refused_and_does_not_run(tmp_path: Path, start: int) -> None:
    for number, name in enumerate(CALLS[start : start + 8]):
        file = archive(tmp_path / f"evil{number}.pt", call(name, tmp_path / "canary"))
        failure(lambda f=file: open_checkpoint(f), "E401", file.name, name.replace(" ", ".", 1)[:30], "safetensors")
    assert not (tmp_path / "canary").exists()


class Runs:
    """An object whose pickle runs a shell command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("ending", [".pt", ".pth", ".ckpt", ".bin"])
def test_code_is_refused_wherever_it_hides_and_whatever_the_ending(tmp_path: Path, ending: str) -> None:
    canary, file = tmp_path / "canary", tmp_path / f"evil{ending}"
    for value in (
        Runs(canary),
        {"ema": {"w": torch.zeros(1)}, "opt": [({"x": Runs(canary)},)]},
        {"args": Runs(canary)},
    ):
        torch.save(value, file)
        failure(lambda: open_checkpoint(file), "E401", file.name, "system", "safetensors")
    assert not canary.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_refused(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Runs(tmp_path / "canary"), protocol))
    failure(lambda: open_checkpoint(tmp_path / "raw.pt"), "E401", "raw.pt", "bare pickle")
    archive(tmp_path / "zip.pt", pickle.dumps(Runs(tmp_path / "canary"), protocol))
    failure(lambda: open_checkpoint(tmp_path / "zip.pt"), "E401", "zip.pt")
    assert not (tmp_path / "canary").exists()


def test_the_opcodes_that_name_classes_in_other_ways_are_refused(tmp_path: Path) -> None:
    canary = f"touch {tmp_path / 'canary'}".encode()
    inst = b"(V" + canary + b"\nios\nsystem\n."
    extension = b"\x80\x02\x82\x01."
    for number, pickled in enumerate((inst, extension, b"\x80\x02(cos\nsystem\nV" + canary + b"\no.")):
        file = archive(tmp_path / f"{number}.pt", pickled)
        failure(lambda f=file: open_checkpoint(f), "E401", file.name)
    assert not (tmp_path / "canary").exists()


def test_old_formats_and_programs_are_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"w": Runs(canary)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    failure(lambda: open_checkpoint(tmp_path / "old.pt"), "E401", "old.pt")
    with tarfile.open(tmp_path / "tar.pt", "w") as tar:
        info = tarfile.TarInfo("pickle")
        info.size = len(data := pickle.dumps(Runs(canary)))
        tar.addfile(info, io.BytesIO(data))
    failure(lambda: open_checkpoint(tmp_path / "tar.pt"), "E401", "tar.pt")
    archive(tmp_path / "script.pt", b"\x80\x02}.", "archive/constants.pkl")
    failure(lambda: open_checkpoint(tmp_path / "script.pt"), "E401", "script.pt", "TorchScript")
    assert not canary.exists()


def test_the_tricks_of_zip_files_do_not_hide_a_second_pickle(tmp_path: Path) -> None:
    evil = archive(tmp_path / "evil.pt", call("os system", tmp_path / "canary")).read_bytes()
    good = archive(tmp_path / "good.pt", b"\x80\x02}.").read_bytes()
    tricks = {
        "prefix": pickle.dumps(Runs(tmp_path / "canary")) + good,
        "tail": good + evil[:-22],
        "comment": good[:-2] + len(evil).to_bytes(2, "little") + evil + b"xx",
        "both": evil + good,
    }
    for name, data in tricks.items():
        (tmp_path / f"{name}.pt").write_bytes(data)
        with pytest.raises(Exception, match=r"E401|E323"):
            open_checkpoint(tmp_path / f"{name}.pt")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.pt", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        file.writestr("archive/data.pkl", call("os system", tmp_path / "canary"))
    failure(lambda: open_checkpoint(tmp_path / "twice.pt"), "E323", "twice.pt")
    archive(tmp_path / "else.pt", call("os system", tmp_path / "canary"), "other/data.pkl")
    failure(lambda: open_checkpoint(tmp_path / "else.pt"), "E323", "else.pt")
    assert not (tmp_path / "canary").exists()


def test_an_encrypted_or_deflated_archive_is_refused(tmp_path: Path) -> None:
    bomb = archive(tmp_path / "bomb.pt", bytes(50_000_000), method=zipfile.ZIP_DEFLATED)
    failure(lambda: open_checkpoint(bomb), "E323", "bomb.pt", "compressed")
    data = bytearray(archive(tmp_path / "secret.pt", b"\x80\x02}.").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "secret.pt").write_bytes(data)
    failure(lambda: open_checkpoint(tmp_path / "secret.pt"), "E323", "secret.pt", "encrypted")


def test_an_old_torch_does_not_read_pt_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(tmp_path / "x.pt", b"\x80\x02}.")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    failure(lambda: open_checkpoint(tmp_path / "x.pt"), "E205", "2.9.1", "2.10")


# --- bombs and damage ------------------------------------------------------------------------------------------------


def refusal(run: object, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What the child process would answer."""
    with pytest.raises(SystemExit):
        run()  # type: ignore[operator]
    answer = json.loads(capsys.readouterr().out)
    return answer["code"], answer["what"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**12),
        torch.zeros(10).as_strided((9, 2), (1, 1)),
        torch.zeros(10).as_strided((3, 3), (0, 1)),
        torch.zeros(9).as_strided((2, 2), (4, 2)),
    ],
    ids=["expanded", "overlapping", "repeated", "holes"],
)
def test_a_tensor_that_claims_more_than_it_holds_is_refused(tensor: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    code, what = refusal(lambda: _unpickle.check_tensors({"bomb": tensor}, 10**6), capsys)
    assert code == "E323" and "bomb" in what


def test_transposed_tensors_are_legal(capsys: pytest.CaptureFixture[str]) -> None:
    _unpickle.check_tensors({"w": torch.zeros(3, 5).t(), "x": torch.zeros(2, 3, 4, 5).permute(0, 3, 1, 2)}, 10**6)
    _unpickle.check_tensors({"y": torch.zeros(0, 3), "z": torch.tensor(1.0), "one": torch.zeros(4, 1, 3)}, 10**6)
    shared = torch.zeros(10**6)
    code, what = refusal(lambda: _unpickle.check_tensors({"a": shared, "b": shared}, 4 * 10**6), capsys)
    assert code == "E323" and "8000000" in what


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_in_a_pt_file_are_floating_point(kind: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    code, what = refusal(lambda: _unpickle.check_tensors({"w": torch.zeros(2).to(kind)}, 10**6), capsys)
    assert code == "E318" and "w" in what and str(kind)[6:] in what
    code, what = refusal(lambda: _unpickle.check_tensors({"w": torch.eye(2).to_sparse()}, 10**6), capsys)
    assert code == "E318"


def test_deep_and_endless_objects_are_refused_without_recursion(capsys: pytest.CaptureFixture[str]) -> None:
    deep: object = 1
    for _ in range(100_000):
        deep = (deep,)
    assert refusal(lambda: _unpickle.check_objects({"opt": deep}), capsys)[0] == "E323"
    assert refusal(lambda: _unpickle.check_objects([[]] * (_unpickle.MOST_OBJECTS + 1)), capsys)[0] == "E323"
    assert refusal(lambda: _unpickle.check_objects(argparse.Namespace(x=deep)), capsys)[0] == "E323"
    endless = b"\x80\x02" + b"]0" * _unpickle.MOST_OPCODES + b"}."
    assert refusal(lambda: _unpickle.scan(endless), capsys)[0] == "E323"


def test_a_storage_that_lies_about_its_length_is_refused(tmp_path: Path) -> None:
    """The pickle says 2^40 numbers, the archive holds four."""
    torch.save({"w": torch.zeros(4)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(tmp_path / "lie.pt", "w") as target:
        for name, data in members.items():
            huge = data.replace(b"K\x04", b"\x8a\x06" + (2**40).to_bytes(6, "little"))
            target.writestr(name, huge if name.endswith("data.pkl") else data)
    failure(lambda: open_checkpoint(tmp_path / "lie.pt"), "E323", "lie.pt")


def test_a_cut_or_damaged_file_is_said_to_be_damaged(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    for part in range(0, 64, 9):
        (tmp_path / "cut.pt").write_bytes(whole[: len(whole) * part // 64])
        failure(lambda: open_checkpoint(tmp_path / "cut.pt"), "E323", "cut.pt", "copy")
    flipped = bytearray(whole)
    flipped[whole.index(torch.arange(1000.0).numpy().tobytes()) + 402] ^= 64
    (tmp_path / "flip.pt").write_bytes(flipped)
    failure(lambda: open_checkpoint(tmp_path / "flip.pt"), "E323", "flip.pt", "checksum")
    (tmp_path / "text.pt").write_bytes(b"hello, this is no checkpoint at all")
    failure(lambda: open_checkpoint(tmp_path / "text.pt"), "E323", "text.pt")


def test_a_child_that_dies_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(tmp_path / "x.pt", b"\x80\x02}.")
    monkeypatch.setattr(legacy.sys, "executable", "/bin/false")
    failure(lambda: open_checkpoint(tmp_path / "x.pt"), "E323", "x.pt", "status 1")


# --- the original layout ---------------------------------------------------------------------------------------------


def original_state(width: int, depth: int, side: int, classes: int, channels: int = 4, patch: int = 2) -> dict:
    """Random weights under the original names, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x_embedder.proj": (width, channels, patch, patch), "t_embedder.mlp.0": (width, 256)}
    shapes |= {"t_embedder.mlp.2": (width, width), "final_layer.linear": (patch * patch * 2 * channels, width)}
    shapes["final_layer.adaLN_modulation.1"] = (2 * width, width)
    for i in range(depth):
        shapes |= {f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width)}
        shapes |= {f"blocks.{i}.mlp.fc1": (4 * width, width), f"blocks.{i}.mlp.fc2": (width, 4 * width)}
        shapes[f"blocks.{i}.adaLN_modulation.1"] = (6 * width, width)
    state = OrderedDict()
    for name, shape in shapes.items():
        fan_in = torch.Size(shape[1:]).numel()
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / fan_in**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    state["y_embedder.embedding_table.weight"] = 0.5 * torch.randn(classes + 1, width, generator=generator)
    state["pos_embed"] = grid(side, width)[None]
    return state


def grid(side: int, width: int) -> Tensor:
    """Position embedding, number by number: sines and cosines of the column, then of the row."""
    table = torch.zeros(side * side, width)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                frequency = 1 / 10000 ** (i / quarter)
                cell = table[row * side + column]
                for offset, place in ((0, column), (2 * quarter, row)):
                    angle = torch.tensor(place * frequency, dtype=torch.float64)
                    cell[offset + i], cell[offset + quarter + i] = angle.sin(), angle.cos()
    return table


def forward(state: dict, heads: int, x: Tensor, t: Tensor, y: Tensor, steps: int) -> Tensor:
    """The DiT of section 3 of Peebles and Xie (2023) with adaLN-Zero; time frequencies 10000^(-i/steps)."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer_norm(value, (value.shape[-1],), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    patch = state["x_embedder.proj.weight"].shape[-1]
    tokens = torch.nn.functional.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], patch)
    rows = tokens.shape[-1]
    h = tokens.flatten(2).transpose(1, 2) + state["pos_embed"]
    angles = t[:, None].float() * 10000.0 ** (-torch.arange(128) / steps)
    time = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", time)))
    c = silu(c + state["y_embedder.embedding_table.weight"][y])
    depth = sum(name.endswith("attn.proj.weight") for name in state)
    for i in range(depth):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=1)
        qkv = linear(f"blocks.{i}.attn.qkv", modulated(h, shift1, scale1))
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + gate1[:, None] * linear(f"blocks.{i}.attn.proj", mixed)
        inner = gelu(linear(f"blocks.{i}.mlp.fc1", modulated(h, shift2, scale2)), approximate="tanh")
        h = h + gate2[:, None] * linear(f"blocks.{i}.mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    out = linear("final_layer.linear", modulated(h, shift, scale))
    out = out.reshape(-1, rows, rows, patch, patch, out.shape[-1] // patch**2)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, rows * patch, rows * patch)


def test_an_original_checkpoint_computes_what_the_paper_says(tmp_path: Path) -> None:
    state = original_state(384, 2, 4, 7)
    args = argparse.Namespace(model="DiT-S/2", lr=1e-4)
    stale = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": stale, "ema": state, "opt": {"state": {}}, "args": args}, tmp_path / "dit.pt")
    model, checkpoint = load_model(tmp_path / "dit.pt")
    assert checkpoint.config["num_attention_heads"] == 6 and checkpoint.config["sample_size"] == 8
    assert checkpoint.config["num_embeds_ada_norm"] == 7 and checkpoint.config["out_channels"] == 8
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 3, 7])
    with torch.no_grad():
        for t, steps in (([0, 0, 0], 128), ([1, 500, 999], 127)):  # diffusers spaces its frequencies by 1/127
            t = torch.tensor(t)
            found, expected = model(x, t, y).sample, forward(state, 6, x, t, y, steps)
            assert expected.std() > 0.1
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_plain_state_dicts_convert_and_share_one_embedder(tmp_path: Path) -> None:
    state = original_state(768, 1, 2, 3)
    torch.save(state, tmp_path / "sit.pt")
    checkpoint = open_checkpoint(tmp_path / "sit.pt")
    assert checkpoint.class_name == "DiTTransformer2DModel" and checkpoint.config["num_attention_heads"] == 12
    q = checkpoint.read("transformer_blocks.0.attn1.to_q.weight")
    assert torch.equal(q, state["blocks.0.attn.qkv.weight"][:768])
    q.zero_()  # what was read belongs to the reader
    assert checkpoint.read("transformer_blocks.0.attn1.to_q.weight").abs().sum() > 0
    names = sorted({name.split(".")[2] for name in checkpoint.tensors if name.startswith("transformer_blocks")})
    assert names == ["attn1", "ff", "norm1"]


def test_heads_are_asked_for_where_the_width_does_not_tell(tmp_path: Path) -> None:
    torch.save(original_state(64, 1, 2, 3), tmp_path / "small.pt")
    failure(lambda: open_checkpoint(tmp_path / "small.pt"), "E320", "small.pt", "width 64", "num_attention_heads")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    config = open_checkpoint(tmp_path / "small.pt").config
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (4, 16)


def changed(**tensors: Tensor | None) -> dict:
    state = original_state(384, 1, 2, 3)
    state.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    "state",
    [
        {"weight": torch.zeros(3)},
        changed(pos_embed=torch.zeros(1, 4, 384)),
        changed(pos_embed=torch.zeros(1, 5, 384)),
        changed(y_embedder__embedding_table__weight=None),
        changed(blocks__0__attn__extra__weight=torch.zeros(2)),
        changed(blocks__1000000000__attn__proj__weight=torch.zeros(2)),
        changed(blocks__00__attn__proj__weight=torch.zeros(2)),
        changed(x_embedder__proj__weight=torch.zeros(384)),
        changed(surprise=torch.zeros(2)),
    ],
    ids=["other", "positions", "not square", "no labels", "extra", "bomb", "twice", "flat", "unknown"],
)
def test_another_layout_is_no_dit(state: dict, tmp_path: Path) -> None:
    failure(lambda: legacy.convert(state, tmp_path / "x.pt"), "E302", "x.pt", "diffusers folder")


def test_a_module_of_the_working_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(original_state(384, 1, 2, 3), tmp_path / "x.pt")
    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("x.pt").tensors
    assert not (tmp_path / "canary").exists()

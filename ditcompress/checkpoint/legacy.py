"""The original DiT and SiT .pt checkpoints: restricted reading, then the names of diffusers.

Reading happens in a child process with limits on memory and time (`_unpickle.py`). There is no option to relax it.

Names follow the published architecture (Peebles and Xie 2023). diffusers repeats the time and label embedder in
every block, splits the fused qkv, and computes the position embedding. Its frequencies of the time embedding are
10000^(-i/127), those of the original 10000^(-i/128): loaded models behave as facebook/DiT-XL-2-256 does in diffusers.
A SiT has the same layout; that it predicts a velocity is a matter of its scheduler.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DitcompressError, printable
from ._files import COPY_AGAIN, MOST_CONFIG_BYTES, json_object, label, read_bounded, regular_file
from .header import read_header, read_tensor

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: DiT-S, B, L, XL (table 1 of the paper)
_REMEDIES = {
    "E302": "give the model's state dict",
    "E318": "give a floating-point checkpoint",
    "E323": COPY_AGAIN,
    "E401": "do not use this file; ask its author for safetensors",
}


def load_legacy(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a .pt checkpoint in diffusers' names.

    E401 for a file that could run code, E323 for a damaged one or a bomb, E302 for one that is no DiT.
    """
    regular_file(path)
    _check_torch()
    with tempfile.TemporaryDirectory(prefix="ditcompress-") as scratch:
        out = Path(scratch) / "state.safetensors"
        _read_in_child(path, out)
        state = {name: read_tensor(entry) for name, entry in read_header(out)[0].items()}
    return convert(state, path)


def _check_torch() -> None:
    """Older releases can be made to run code in spite of weights_only (CVE-2025-32434, CVE-2026-24747)."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        what = f"torch {torch.__version__} does not read .pt files safely"
        raise DitcompressError("E205", "torch", what, "install torch 2.10 or later")


def _read_in_child(path: Path, out: Path) -> None:
    script = Path(__file__).with_name("_unpickle.py")
    command = [
        sys.executable,
        "-P",
        str(script),
        str(path.resolve()),
        str(out),
    ]  # -P: no module of the folder we are in
    seconds = 120 + path.stat().st_size // (10 << 20)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        raise DitcompressError("E323", label(path), f"took longer than {seconds} s to read", COPY_AGAIN) from None
    answer = done.stdout.decode("utf-8", "replace").strip()
    if done.returncode == 0 and not answer:
        return
    try:
        refusal = json.loads(answer.splitlines()[-1])
        code, what = refusal["code"], refusal["what"]
    except (ValueError, IndexError, KeyError, TypeError):
        code, what = "E323", f"reading it ended with {_ending(done.returncode)}"
    raise DitcompressError(code, label(path), printable(what, 160), _REMEDIES[code])


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


_BLOCK = {
    "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}  # fmt: skip
_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_EMBEDDER = {
    "t_embedder.mlp.0.": "timestep_embedder.linear_1.", "t_embedder.mlp.2.": "timestep_embedder.linear_2.",
    "y_embedder.": "class_embedder.",
}  # fmt: skip


def convert(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """diffusers' configuration and names for the original layout; E302 when it is another one.

    The results share memory with `state`.
    """
    try:
        config = _config(state, path)
        result: dict[str, Tensor] = {}
        for name, tensor in state.items():
            renamed = _renamed(name, tensor, config["num_layers"])
            if result.keys() & renamed.keys():
                raise ValueError(f"{name} stands twice")
            result |= renamed
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise DitcompressError(
            "E302", label(path), f"its tensors are not those of DiT or SiT ({error})", "give a diffusers folder"
        ) from None
    return config, result


def _config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    tokens = state["pos_embed"].shape[-2]
    side = math.isqrt(tokens)
    if not torch.allclose(state["pos_embed"].float().reshape(tokens, -1), positions(side, width), atol=5e-3):
        raise ValueError("pos_embed is not the fixed sine and cosine grid")
    heads = _heads(width, path)
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    if blocks != set(range(len(blocks))):  # also keeps a lone "blocks.1000000000" from filling the memory
        raise ValueError("a block is missing")
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_layers": len(blocks),
        "num_attention_heads": heads, "attention_head_dim": width // heads, "in_channels": channels,
        "out_channels": state["final_layer.linear.weight"].shape[0] // patch**2, "patch_size": patch,
        "sample_size": side * patch, "num_embeds_ada_norm": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False, "norm_eps": 1e-6,
    }  # fmt: skip


def _heads(width: int, path: Path) -> int:
    """Heads leave no trace in the shapes: those of the published models, else what a config.json beside says."""
    if width in _HEADS:
        return _HEADS[width]
    beside = path.with_name("config.json")
    said = json_object(read_bounded(beside, MOST_CONFIG_BYTES), label(beside)) if beside.exists() else {}
    heads = said.get("num_attention_heads")
    if type(heads) is not int or heads < 1 or width % heads:
        what = f"width {width} is none of the published models, so the number of heads is not known"
        raise DitcompressError("E320", label(path), what, 'put {"num_attention_heads": N} into a config.json beside it')
    return heads


def positions(side: int, width: int) -> Tensor:
    """The fixed position embedding of a square grid, row by row: (side * side, width) float32.

    First half for the column, second half for the row; in each sines, then cosines, of 10000^(-i / (width / 4)).
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    column, row = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1).float()


def _renamed(name: str, tensor: Tensor, layers: int) -> dict[str, Tensor]:
    """The diffusers tensors that one original tensor becomes."""
    if name == "pos_embed":  # diffusers computes it
        return {}
    for old, new in _EMBEDDER.items():
        if name.startswith(old):
            rest = name[len(old) :]
            return {f"transformer_blocks.{i}.norm1.emb.{new}{rest}": tensor for i in range(layers)}
    stem, _, leaf = name.rpartition(".")
    if not name.startswith("blocks."):
        return {f"{_TOP[stem]}.{leaf}": tensor}
    number, _, inner = stem[len("blocks.") :].partition(".")
    prefix = f"transformer_blocks.{int(number)}."
    if inner == "attn.qkv":
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}attn1.to_{letter}.{leaf}": part for letter, part in parts}
    return {f"{prefix}{_BLOCK[inner]}.{leaf}": tensor}

"""The original DiT and SiT .pt checkpoints: restricted reading, then the diffusers names.

Reading happens in a child process with limits on memory and time, with `weights_only` and one harmless class allowed
(argparse.Namespace, which the training checkpoints hold). There is no option to relax this.

Names follow the published architecture (Peebles and Xie 2023). diffusers repeats the time and label embedder in
every block and splits the fused qkv.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..errors import DitcompressError
from .header import COPY_AGAIN, regular_file

MOST_SECONDS = 600
_CHILD = """
import argparse, resource, sys
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_CPU, (600, 600))
import torch
from safetensors.torch import save_file
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    with torch.serialization.safe_globals([argparse.Namespace]):
        value = torch.load(sys.argv[1], map_location="cpu", weights_only=True, mmap=False)
except MemoryError:
    sys.exit(12)
except Exception as error:
    text = str(error)
    refused = any(word in text for word in ("Unsupported", "weights_only", "GLOBAL", "nsafe"))
    sys.exit(10 if refused else 11)
if isinstance(value, dict):
    for key in ("ema", "model", "state_dict"):
        if isinstance(value.get(key), dict):
            value = value[key]
            break
if not isinstance(value, dict) or not value or not all(isinstance(t, torch.Tensor) for t in value.values()):
    sys.exit(13)
total = 0
for tensor in value.values():
    storage = tensor.untyped_storage()
    if tensor.numel() * tensor.element_size() > storage.nbytes():
        sys.exit(14)
    total += tensor.numel() * tensor.element_size()
if total > limit:
    sys.exit(12)
save_file({str(name): tensor.contiguous().clone() for name, tensor in value.items()}, sys.argv[2])
"""


def load_legacy(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a .pt checkpoint in diffusers' names.

    E401 for a file that wants to run code, E323 for a damaged one, E302 for one that is no DiT.
    """
    regular_file(path)
    _check_archive(path)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "state.safetensors"
        limit = 3 * path.stat().st_size + (6 << 30)
        command = [sys.executable, "-c", _CHILD, str(path.resolve()), str(out), str(limit)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=MOST_SECONDS)
        except subprocess.TimeoutExpired:
            raise DitcompressError("E323", path.name, "took too long to read", COPY_AGAIN) from None
        if done.returncode == 10:
            raise DitcompressError(
                "E401",
                path.name,
                "wants to run code while it is loaded",
                "do not use this file; ask its author for safetensors",
            )
        if done.returncode == 12:
            raise DitcompressError("E602", path.name, "needs more memory than its size allows", "do not use this file")
        if done.returncode in (13, 14):
            raise DitcompressError(
                "E302", path.name, "holds no plain mapping of tensors", "give the model's state dict"
            )
        if done.returncode:
            raise DitcompressError("E323", path.name, "is no readable torch checkpoint", COPY_AGAIN)
        return convert(load_file(out), path.name)


def _check_archive(path: Path) -> None:
    """Only the zip form is read, and only stored members: torch never deflates, a bomb does."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError):
        raise DitcompressError(
            "E323", path.name, "is not a torch zip archive", "save it again with a current torch"
        ) from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise DitcompressError("E401", path.name, "holds compressed members", "do not use this file")
    if sum(member.file_size for member in members) > path.stat().st_size * 1.1 + 4096:
        raise DitcompressError("E401", path.name, "unpacks to more than its own size", "do not use this file")


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


def convert(state: Mapping[str, Tensor], where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """diffusers' configuration and names for the original layout; E302 when it is another one."""
    try:
        config = _config(state)
        result: dict[str, Tensor] = {}
        for name, tensor in state.items():
            result |= _renamed(name, tensor, config["num_layers"])
    except (KeyError, ValueError, IndexError, AssertionError):
        raise DitcompressError(
            "E302", where, "its tensor names are not those of DiT or SiT", "give a diffusers folder"
        ) from None
    return config, result


def _config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width = state["x_embedder.proj.weight"].shape[0]
    channels, patch = state["x_embedder.proj.weight"].shape[1:3]
    tokens = state["pos_embed"].shape[-2]
    side = round(tokens**0.5)
    out = state["final_layer.linear.weight"].shape[0] // patch**2
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    head = next(h for h in (72, 64, 32, 16) if width % h == 0)  # DiT-XL has 16 heads of 72, S, B and L heads of 64
    return {
        "_class_name": "DiTTransformer2DModel", "num_layers": layers, "num_attention_heads": width // head,
        "attention_head_dim": head, "in_channels": int(channels), "out_channels": int(out), "patch_size": int(patch),
        "sample_size": side * int(patch),
        "num_embeds_ada_norm": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False, "norm_eps": 1e-6,
    }  # fmt: skip


def _renamed(name: str, tensor: Tensor, layers: int) -> dict[str, Tensor]:
    """The diffusers tensors that one original tensor becomes."""
    if name == "pos_embed":  # computed from the size
        return {}
    for old, new in _EMBEDDER.items():
        if name.startswith(old):
            rest = name[len(old) :]
            return {f"transformer_blocks.{i}.norm1.emb.{new}{rest}": tensor for i in range(layers)}
    stem, _, leaf = name.rpartition(".")
    if name.startswith("blocks."):
        number, _, inner = stem[len("blocks.") :].partition(".")
        prefix = f"transformer_blocks.{int(number)}."
        if inner == "attn.qkv":
            parts = tensor.chunk(3)
            return {
                f"{prefix}attn1.to_{letter}.{leaf}": part.clone() for letter, part in zip("qkv", parts, strict=True)
            }
        return {f"{prefix}{_BLOCK[inner]}.{leaf}": tensor}
    return {f"{_TOP[stem]}.{leaf}": tensor}

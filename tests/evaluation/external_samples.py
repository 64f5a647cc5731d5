"""Samples and stand-in weights for the tests of external metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ditcompress.evaluation import external
from ditcompress.evaluation.external import Samples

N = 44
CLIP_METRICS = ("clip_score", "pick_score", "clip_mmd")


class Memory:
    def __init__(self, tensor: torch.Tensor, size: int = 7) -> None:
        self.tensor, self.size = tensor, size

    def __len__(self) -> int:
        return len(self.tensor)

    def chunks(self) -> Iterator[torch.Tensor]:
        return iter(self.tensor.split(self.size))


def noise(seed: int, n: int = N, channels: int = 3, size: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=generator) * 2 - 1


ORIGINAL = noise(0)
COMPRESSED = (ORIGINAL + 0.2 * noise(1)).clamp(-1, 1)
REFERENCE = noise(2, 30) * 0.7
PROMPTS = tuple(f"cat {i} dog" for i in range(N))


def samples(weights: Path | None = None, **changed: Any) -> Samples:
    given: dict[str, Any] = {
        "original": Memory(ORIGINAL), "compressed": Memory(COMPRESSED, 5), "reference": Memory(REFERENCE),
        "prompts": PROMPTS, "weights": weights,
    }  # fmt: skip
    return Samples(**{**given, **changed})


def pin(root: Path) -> Path:
    """SHA256SUMS of every file below."""
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  ./{p.relative_to(root).as_posix()}\n" for p in files]
    (root / "SHA256SUMS").write_text("".join(lines))
    return root


def put(root: Path, names: tuple[str, ...]) -> None:
    """Stand-ins for weights: a plain pickle, a JSON file or a folder with one."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".pt", ".pth"):
            torch.save({"state_dict": {}}, path)
        elif path.suffix == ".json":
            path.write_text("{}")
        else:
            path.mkdir()
            (path / "vocab.txt").write_text("[PAD]\n")


def write_clips(root: Path) -> Path:
    """A tiny random CLIP with tokenizer and preprocessor, pinned, in the folders of every CLIP metric."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 12, "projection_dim": 8,
            "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8, "projection_dim": 8}  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for parameter in model.parameters():  # the usual initialisation barely looks at its input
        torch.nn.init.normal_(parameter, std=0.3)
    for folder in {external.registry.get(name).WEIGHTS[0] for name in CLIP_METRICS}:
        model.save_pretrained(root / folder)
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(root / folder)
        (root / folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (root / folder / "merges.txt").write_text("#version: 0.2\n")
        (root / folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
        (root / folder / "pytorch_model.bin").write_bytes(b"never opened")
    return pin(root)

"""Training images to cached latents: each is encoded once by the pipeline's own VAE and kept between runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType

import torch

from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import output_folder, save_atomic
from ..console import Reporter
from ..errors import DitcompressError
from ..evaluation.reference import SUFFIXES, open_reference
from ..evaluation.vae import encode, load_vae
from .calibration import cache_folder

SHARD = 4096  # images of one shard
CACHE = "give a folder of cached latents"


def is_images(path: Path) -> bool:
    """Whether `path` is a set of images: an .npz, or a folder without shards and with image files."""
    if path.suffix == ".npz" or not path.is_dir():
        return path.suffix == ".npz"
    return not any(path.glob("*.safetensors")) and any(p.suffix.lower() in SUFFIXES for p in path.rglob("*"))


def listing(path: Path) -> str:
    """sha256 over names, sizes and times of the files at `path`."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.exists():
            status = file.stat()
            digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def encoded(path: Path, source: Checkpoint, adapter: ModuleType, device: torch.device, reporter: Reporter) -> Path:
    """The folder of cached latents and labels of the images at `path`, made where it is not there yet.

    E205 for a model that needs more than class labels, E333 for images that do not fit, E338 for missing labels.
    """
    like = adapter.random_conditions(source.config, 1, torch.Generator().manual_seed(0))
    if set(like) - {"class_labels"}:
        raise DitcompressError("E205", path, "this model needs more than class labels", f"{CACHE} with embeddings")
    vae_files = listing(source.pipeline / "vae") if source.pipeline and (source.pipeline / "vae").is_dir() else ""
    asked = [str(path.resolve()), listing(path), vae_files, list(adapter.latent_shape(source.config))]
    folder = cache_folder("latents") / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    if folder.is_dir():
        reporter.note(f"latents of an earlier run are used ({folder})")
        return folder
    vae = load_vae(source, str(device))
    shape = tuple(adapter.latent_shape(source.config))
    images = open_reference(path, None if vae is not None else shape)
    if like and images.labels is None:
        raise DitcompressError("E338", path, "images without class labels", "put each class into a folder of its own")
    with output_folder(folder, overwrite=True) as partial, reporter.task("encode images", len(images)) as advance:
        held: list[torch.Tensor] = []
        start = 0
        for chunk in images.chunks():
            held.append(chunk if vae is None else encode(vae, chunk))
            advance(len(chunk))
            count = sum(len(part) for part in held)
            if count >= SHARD or start + count == len(images):
                tensors = {"latents": torch.cat(held).contiguous()}
                if like and images.labels is not None:
                    tensors["class_labels"] = images.labels[start : start + count].clone()
                save_atomic(partial / f"{start:09d}.safetensors", tensors)
                held, start = [], start + count
    return folder

"""Train the embedded model: a class-conditional DiT on scikit-learn's 8x8 digits, and the classifier that judges it.

    python benchmarks/train_reference.py --out ditcompress/assets/digits

Writes a diffusers pipeline folder (model_index.json, transformer/, scheduler/), classifier.safetensors,
reference.safetensors (the digits themselves) and training.json. Needs the extra `train` (scikit-learn, which bundles
the images). The same seed on the same machine, torch version and thread count gives the same files; elsewhere the
figures agree, the bytes need not.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ditcompress.evaluation.digits import DigitClassifier

NULL = 10  # label of the unconditional branch
CONFIG = {
    "num_layers": 12, "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 1, "out_channels": 1,
    "patch_size": 2, "sample_size": 8, "num_embeds_ada_norm": 10, "activation_fn": "gelu-approximate",
    "attention_bias": True, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
}  # fmt: skip
MODEL_INDEX = {
    "_class_name": "DiTPipeline", "_diffusers_version": "0.42.1",
    "transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"],
    "vae": [None, None],
}  # fmt: skip


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [-1, 1] and labels."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel, for the classifier only."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    dy, dx = torch.randint(0, 3, (2, len(images)), generator=generator)
    index = torch.arange(8)
    rows, columns = dy[:, None] + index, dx[:, None] + index
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def train_classifier(seed: int) -> tuple[DigitClassifier, float]:
    """The classifier and its accuracy on 497 digits it has not seen."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, held_out = order[:1300], order[1300:]
    model = DigitClassifier()
    steps = 60 * 11
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        pick = train[torch.randint(len(train), (128,), generator=generator)]
        loss = F.cross_entropy(model(shifted(images[pick], generator)), labels[pick], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    return model, accuracy


def new_model(seed: int) -> DiTTransformer2DModel:
    """A DiT with zero-initialised adaLN and output. It stays in eval mode: in train mode every block would drop
    labels independently of the others."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**CONFIG).eval()
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)
    return model


def train(
    model: DiTTransformer2DModel, steps: int, batch: int, rate: float, seed: int
) -> tuple[nn.Module, list[float]]:
    """The EMA of the weights and the mean loss of each tenth of the run."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed + 1)
    alphas = DDIMScheduler(beta_schedule="linear").alphas_cumprod
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    ema, losses, started = copy.deepcopy(model), [], time.time()
    for step in range(steps):
        pick = torch.randint(len(images), (batch,), generator=generator)
        # stratified timesteps: every batch covers the whole range
        time_step = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * (1000 / batch)).long()
        noise = torch.randn(batch, 1, 8, 8, generator=generator)
        a = alphas[time_step].view(-1, 1, 1, 1)
        label = torch.where(torch.rand(batch, generator=generator) < 0.1, NULL, labels[pick])
        output = model(a.sqrt() * images[pick] + (1 - a).sqrt() * noise, time_step, label).sample
        loss = F.mse_loss(output, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % max(steps // 20, 1) == 0:
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {step + 1}/{steps}  loss {recent:.4f}  {time.time() - started:.0f} s", flush=True)
    tenth = max(steps // 10, 1)
    return ema, [sum(losses[i : i + tenth]) / tenth for i in range(0, steps - tenth + 1, tenth)]


@torch.no_grad()
def sample_accuracy(folder: Path, classifier: DigitClassifier, count: int, seed: int) -> float:
    """Share of samples that carry the asked-for digit (25 DDIM steps, guidance 1.5), from the files as shipped."""
    model = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 10
    x = torch.randn(count, 1, 8, 8, generator=generator)
    scheduler.set_timesteps(25)
    for t in scheduler.timesteps:
        both = model(torch.cat([x, x]), t.expand(2 * count), torch.cat([label, torch.full_like(label, NULL)])).sample
        cond, null = both.chunk(2)
        x = scheduler.step(null + 1.5 * (cond - null), t, x).prev_sample
    return (classifier(x.clamp(-1, 1)).argmax(1) == label).float().mean().item()


def save(folder: Path, model: nn.Module, classifier: DigitClassifier) -> None:
    """The diffusers layout, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder / "transformer")
    DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    save_file({k: v.contiguous() for k, v in classifier.state_dict().items()}, folder / "classifier.safetensors")
    images, labels = digits()  # the reference of the distribution metrics: sixteenths are exact in float16
    save_file({"images": images.half(), "labels": labels.to(torch.uint8)}, folder / "reference.safetensors")
    write_json(folder / "model_index.json", MODEL_INDEX)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ditcompress/assets/digits"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    started = time.time()
    classifier, classifier_accuracy = train_classifier(options.seed)
    print(f"classifier: {classifier_accuracy:.4f} on held-out digits", flush=True)
    model, losses = train(new_model(options.seed), options.steps, options.batch, options.rate, options.seed)
    save(options.out, model, classifier)
    accuracy = sample_accuracy(options.out, classifier, options.samples, options.seed + 2)
    summary = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": options.steps, "batch": options.batch, "rate": options.rate, "seed": options.seed,
        "loss_by_tenth": [round(value, 5) for value in losses],
        "classifier_accuracy": round(classifier_accuracy, 4),
        "sample_accuracy": round(accuracy, 4), "samples": options.samples,
        "seconds": round(time.time() - started), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    write_json(options.out / "training.json", summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()

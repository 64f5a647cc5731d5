"""How close does the compressed denoiser stay to the original? Ours beside the public quantizers, in one run.

    python benchmarks/quality.py --model CKPT --scenes FOLDER      a scenes checkpoint; FOLDER holds scenes.py
    python benchmarks/quality.py                                   the embedded digits model

Every number is the output SQNR in dB, -10 log10(mean over held-out inputs of |y' - y|^2 / |y|^2), in float32, on the
same inputs for all: noised images at evenly spread timesteps, every fourth with the null label, with seeds that
calibration never uses. Beside it the stored bits per quantized weight, scales and zeros included (peers that keep a
4-bit code in a byte are counted at 4 bits). All linears of the blocks are quantized, modulation (adaLN) included; ours
also those of the block-local time embedders. Peers come with the extra `bench`; a missing one is named, not hidden.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ditcompress import api
from ditcompress.calibration.conditions import get_conditions
from ditcompress.calibration.trajectory import Sampling, sample
from ditcompress.console import Silent, print_table
from ditcompress.evaluation.digits import digits_folder
from ditcompress.loading import load_model
from ditcompress.measures import output_sqnr_db
from ditcompress.models import adapter_for
from ditcompress.runtime.kernels import set_decode

Batch = tuple[Tensor, Tensor, Tensor]  # noised images, timesteps, labels
Peer = tuple[str, float, Callable[[nn.Module], nn.Module]]  # name, stored bits, quantizer
OURS = (
    "w8a8", "w8a8-token", "w4a8", "w4a8-token", "w4a4", "w4a16", "w3a16", "w2a16", "w2a16-vq", "fp8", "nvfp4", "mxfp4",
    "w8a16", "w4a16-rtn", "w4a8-ditas", "ptq4dm-w8a8", "vidit-q-w8a8", "vidit-q-w4a8", "vidit-q-mp", "hq-dit-w4a4",
    "svdquant-w4a4", "svdquant-nvfp4", "q-dit",
)  # fmt: skip


def noised(images: Tensor, labels: Tensor, null: int, scheduler: object, seed: int) -> Batch:
    """Images at evenly spread timesteps, every fourth with the null label."""
    count = len(images)
    times = ((torch.arange(count) + 0.5) * 1000 / count).long()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator)
    labels = torch.where(torch.arange(count) % 4 == 3, torch.full_like(labels, null), labels)
    return scheduler.add_noise(images, noise, times), times, labels  # type: ignore[attr-defined]


def scenes_inputs(folder: Path, count: int, scheduler: object, seed: int) -> Batch:
    sys.path.insert(0, str(folder))
    import scenes  # type: ignore[import-not-found]

    generator = torch.Generator().manual_seed(seed)
    attributes = scenes.sample_attributes(count, "cpu", generator)
    images = scenes.render(attributes, gen=generator)
    return noised(images, attributes["shape"] * 8 + attributes["color"], 80, scheduler, seed)


def digits_inputs(count: int, scheduler: object, seed: int) -> Batch:
    from sklearn.datasets import load_digits

    data = load_digits()
    pick = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))[:count]
    images = torch.tensor(data.images, dtype=torch.float32)[:, None][pick] / 8 - 1
    return noised(images, torch.tensor(data.target)[pick], 10, scheduler, seed)


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> Tensor:
    parts = zip(*(tensor.split(16) for tensor in batch), strict=True)
    return torch.cat([model(x, t, label).sample.float() for x, t, label in parts])


def block_linears(model: nn.Module) -> Iterator[str]:
    """Linears of the blocks, adaLN included, embedders not."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("transformer_blocks.") and "_embedder" not in name:
            yield name


def torchao_peers(width: int) -> Iterator[Peer]:
    import torchao.quantization as q
    from torchao.quantization.granularity import PerGroup

    def run(config: object) -> Callable[[nn.Module], nn.Module]:
        def quantize(model: nn.Module) -> nn.Module:
            names = set(block_linears(model))
            q.quantize_(model, config, filter_fn=lambda module, name: name in names)
            return model

        return quantize

    yield "W8A8 torchao int8 dynamic", 8 + 32 / width, run(q.Int8DynamicActivationInt8WeightConfig())
    grouped = q.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    yield "W4A8 torchao int8 dynamic, int4 g32", 4 + (32 + 8) / 32, run(grouped)
    yield (
        "W4A16 torchao int4 g32",
        4 + (32 + 8) / 32,
        run(q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    )


def quanto_peers(width: int) -> Iterator[Peer]:
    from optimum.quanto import Calibration, freeze, qint4, qint8
    from optimum.quanto import quantize as quanto

    def run(weights: object, activations: object, calibration: Batch | None = None) -> Callable[[nn.Module], nn.Module]:
        def quantize(model: nn.Module) -> nn.Module:
            quanto(model, weights=weights, activations=activations, include=list(block_linears(model)))
            if calibration is not None:
                with Calibration():
                    outputs(model, calibration)
            freeze(model)
            return model

        return quantize

    group = 128 if width % 128 == 0 else 32
    yield f"W4A16 quanto qint4 g{group}", 4 + (32 + 8) / group, run(qint4, None)
    yield "W8A16 quanto qint8", 8 + 32 / width, run(qint8, None)
    quanto_peers.static = lambda batch: run(qint4, qint8, batch)  # type: ignore[attr-defined]
    quanto_peers.static8 = lambda batch: run(qint8, qint8, batch)  # type: ignore[attr-defined]
    quanto_peers.bits = 4 + (32 + 8) / group  # type: ignore[attr-defined]


def sdnq_peers(width: int) -> Iterator[Peer]:
    from sdnq.quantizer import sdnq_post_load_quant

    def run(**options: object) -> Callable[[nn.Module], nn.Module]:
        def quantize(model: nn.Module) -> nn.Module:
            named = dict(model.named_modules())
            skip = [n for n, m in named.items() if isinstance(m, nn.Linear) and n not in set(block_linears(model))]
            return sdnq_post_load_quant(model, modules_to_not_convert=skip, dequantize_fp32=True, **options)

        return quantize

    yield "W4A16 sdnq uint4", 4.0 + 64 / 32, run(weights_dtype="uint4", group_size=32)
    yield (
        "W4A16 sdnq uint4 + SVD 16",
        4.0 + 64 / 32 + 16 * 16 * 2 / width,
        run(weights_dtype="uint4", use_svd=True, svd_rank=16),
    )
    yield "W8A8 sdnq int8 matmul", 8 + 32 / width, run(weights_dtype="int8", use_quantized_matmul=True)


def bnb_peers(width: int) -> Iterator[Peer]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def run(model: nn.Module) -> nn.Module:
        for name in block_linears(model):
            linear = model.get_submodule(name)
            codes, state = quantize_4bit(linear.weight.data.flatten(), blocksize=64, quant_type="nf4")
            linear.weight.data = dequantize_4bit(codes, state).reshape(linear.weight.shape).to(linear.weight.dtype)
        return model

    yield "W4A16 bitsandbytes nf4", 4 + 32 / 64, run


def peers(width: int, calibration: Batch) -> Iterator[Peer | str]:
    """Every peer that is installed; the name and reason of one that is not."""
    for source in (torchao_peers, quanto_peers, sdnq_peers, bnb_peers):
        try:
            yield from source(width)
            if source is quanto_peers:
                yield "W4A8 quanto qint4, qint8", quanto_peers.bits, quanto_peers.static(calibration)  # type: ignore[attr-defined]
                yield "W8A8 quanto qint8, qint8", 8 + 32 / width, quanto_peers.static8(calibration)  # type: ignore[attr-defined]
        except Exception as error:
            yield f"{source.__name__.removesuffix('_peers')}: skipped ({type(error).__name__}: {error})"


class Pairs:
    """Images of the original with fixed noise and labels, and the PSNR of another model's to them."""

    def __init__(self, model: nn.Module, config: dict[str, object], scheduler: object, count: int, steps: int) -> None:
        self.adapter, self.config, self.scheduler = adapter_for(config), config, scheduler
        self.sampling = Sampling(steps, self.adapter.default_guidance(config), 777, batch=32)
        source = SimpleNamespace(config=config, pipeline=None)
        self.conditions = get_conditions(source, self.adapter, max(count, 1), 777)
        self.images = self._images(model) if count else None

    def _images(self, model: nn.Module) -> Tensor:
        return sample(model, self.adapter, self.config, self.scheduler, self.conditions, self.sampling)

    def psnr(self, model: nn.Module) -> str:
        """Mean PSNR in dB of the pairs, for values from -1 to 1."""
        if self.images is None:
            return ""
        error = (self._images(model).clamp(-1, 1) - self.images.clamp(-1, 1)).flatten(1).square().mean(1)
        return f"{(10 * torch.log10(4 / error.clamp_min(1e-12))).mean():.2f}"


def peer_rows(model: nn.Module, test: Batch, reference: Tensor, calibration: Batch, pairs: Pairs) -> list[list[str]]:
    width = next(model.get_submodule(name).in_features for name in block_linears(model))
    rows = []
    for peer in peers(width, calibration):
        if isinstance(peer, str):
            rows.append([peer, "", "", "", ""])
            continue
        name, bits, quantize = peer
        started = time.time()
        try:
            quantized = quantize(copy.deepcopy(model))
            seconds = time.time() - started
            value = f"{output_sqnr_db(reference, outputs(quantized, test)):.2f}"
            psnr = pairs.psnr(quantized)
        except Exception as error:
            value, psnr, seconds = f"failed: {type(error).__name__}", "", time.time() - started
        rows.append([name, f"{bits:.3f}", value, psnr, f"{seconds:.1f}"])
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def our_rows(
    path: Path, recipes: list[str], test: Batch, reference: Tensor, options: argparse.Namespace, pairs: Pairs
) -> list[list[str]]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in recipes:
            started = time.time()
            result = api.quantize(
                path,
                recipe,
                Path(scratch) / Path(recipe).stem,
                overrides=options.set,
                dtype=options.dtype,
                reporter=Silent(),
            )
            seconds = time.time() - started
            assert result.path is not None
            compressed = set_decode(load_model(result.path)[0], "load")  # the same values, less time
            value = output_sqnr_db(reference, outputs(compressed, test))
            name = f"ditcompress {Path(recipe).stem}"
            rows.append([name, f"{result.bits:.3f}", f"{value:.2f}", pairs.psnr(compressed), f"{seconds:.1f}"])
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder; the embedded digits model by default")
    parser.add_argument("--scenes", type=Path, help="folder with scenes.py, for a scenes checkpoint")
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=64, help="images sampled with the original's noise; 0 for none")
    parser.add_argument("--steps", type=int, default=25, help="of their sampler")
    parser.add_argument("--seed", type=int, default=999)
    parser.add_argument("--recipes", nargs="*", default=list(OURS))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--dtype", default="float32", help="of the calibration pass")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    path = options.model or digits_folder()
    model, checkpoint = load_model(path)
    scheduler = adapter_for(checkpoint.config).default_scheduler(checkpoint.config)
    make = (
        (lambda n, s: scenes_inputs(options.scenes, n, scheduler, s))
        if options.scenes
        else (lambda n, s: digits_inputs(n, scheduler, s))
    )
    test, calibration = make(options.inputs, options.seed), make(32, options.seed + 1)
    reference = outputs(model, test)
    pairs = Pairs(model, checkpoint.config, scheduler, options.pairs, options.steps)
    rows = our_rows(path, options.recipes, test, reference, options, pairs)
    if not options.no_peers:
        rows += peer_rows(model, test, reference, calibration, pairs)
    title = f"output SQNR on {options.inputs} held-out inputs, PSNR of {options.pairs} pairs ({path.name})"
    print_table(title, ["method", "bits", "dB", "PSNR", "s"], rows)
    if options.json:
        options.json.write_text(
            json.dumps({"model": path.name, "inputs": options.inputs, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()

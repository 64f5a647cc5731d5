"""Time of expert feed-forwards against the dense one they were cut from.

    python benchmarks/moe.py [--width 1152] [--tokens 1024] [--experts 8] [--repeats 15] [--device cuda]
    python benchmarks/moe.py --convert 2        seconds of moe-local's conversion of a layer with 2 experts instead

One thread in float32, or a GPU in bfloat16; GELU, hidden width 4 x. Dense and expert layers take turns, so that other
work on the machine meets both; the median of every layer's times is shown with its share of the dense one, for
routing by random tokens. Experts of moe-local each hold half of the neurons (random ones here), one runs for a token.
A conversion takes 4096 random tokens for each expert; its seconds are those of the process, and the memory is the
peak while it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import time

import torch
from diffusers.models.attention import FeedForward
from torch import nn
from torch.nn.functional import gelu

from ditcompress import mixture
from ditcompress.experts import ExpertLayer, build, convertible
from ditcompress.mixture import moe_local
from ditcompress.models._derive import derive


def layers(width: int, experts: int, shared: int) -> dict[str, nn.Module]:
    """The dense feed-forward, and expert layers of it with a half and about three eighths of the neurons active."""
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    model.blocks[0].ff = FeedForward(width, activation_fn="gelu-approximate").eval().requires_grad_(False)
    layout = derive(model)
    (axis,) = convertible(model, layout).values()
    found: dict[str, nn.Module] = {"dense": model.blocks[0].ff}
    each = 4 * width // experts
    for active in sorted({experts // 2 - shared, 3 * experts // 8 - shared}, reverse=True):
        spec = ExpertLayer(shared * each, experts - shared, each, active)
        moe = build(model, layout, axis, spec)
        moe.router.weight.normal_()
        found[f"{spec.active_neurons / spec.neurons:.1%} active ({shared} shared, {active} of {spec.experts})"] = moe
    spec = ExpertLayer(0, experts, 2 * width, 1, offset=True, of=4 * width)
    moe = build(
        model, layout, axis, spec, groups=[torch.randperm(spec.of)[: spec.width].tolist() for _ in range(experts)]
    )
    moe.router.weight.normal_()
    found[f"50.0% active (moe-local, 1 of {experts})"] = moe
    return found


def convert(width: int, experts: int) -> None:
    """Print what the conversion of one layer by moe-local takes."""
    generator, neurons, tokens = torch.Generator().manual_seed(0), 4 * width, 4096 * experts
    x = torch.randn(tokens, width, generator=generator)
    down = torch.randn(width, neurons, generator=generator) * neurons**-0.5
    hidden = gelu(x @ torch.randn(width, neurons, generator=generator) * width**-0.5)
    spec = ExpertLayer(0, experts, neurons // 2, 1, offset=True, of=neurons)
    layer = mixture.FeedForward(
        "ff", spec, down, x, hidden, None, generator, torch.rand(tokens, generator=generator) + 0.1
    )
    params, before = moe_local.Params(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    found = moe_local.prepare(layer, params)
    middle = time.process_time()
    moe_local.split(dataclasses.replace(layer, prepared=found), params)
    seconds = [middle - started, time.process_time() - middle]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"width {width}, {neurons} neurons, {experts} experts, {tokens} tokens: {seconds[0]:.1f} s to choose, "
          f"{seconds[1]:.1f} s to fit, {seconds[0] / experts:.1f} + {seconds[1] / experts:.1f} s an expert; "
          f"peak {peak / 1e6:.2f} GB, {before / 1e6:.2f} GB before")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[1152])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shared", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--convert", type=int, help="experts of a conversion to time")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.convert:
        for width in given.width:
            convert(width, given.convert)
        return
    print("| width | tokens | layer | ms | of dense |\n|---|---|---|---|---|")
    for width in given.width:
        dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
        made = {n: layer.to(given.device, dtype) for n, layer in layers(width, given.experts, given.shared).items()}
        for tokens in given.tokens:
            x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(1)).to(given.device, dtype)
            times: dict[str, list[float]] = {name: [] for name in made}
            with torch.inference_mode():
                for turn in range(given.repeats + 2):
                    for name, layer in made.items():
                        started = time.perf_counter()
                        layer(x)
                        if given.device == "cuda":
                            torch.cuda.synchronize()
                        if turn > 1:  # the first ones warm up
                            times[name].append(time.perf_counter() - started)
            middle = {name: statistics.median(values) for name, values in times.items()}
            for name, value in middle.items():
                print(f"| {width} | {tokens} | {name} | {1000 * value:.1f} | {value / middle['dense']:.2f} |")


if __name__ == "__main__":
    main()

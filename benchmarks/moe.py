"""CPU time of expert feed-forwards against the dense one they were cut from.

    python benchmarks/moe.py [--width 1152] [--tokens 1024] [--experts 8] [--repeats 15]

One thread, float32, GELU, hidden width 4 x. Dense and expert layers take turns, so that other work on the machine meets
both; the median of every layer's times is shown with its share of the dense one, for routing by random tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from diffusers.models.attention import FeedForward
from torch import nn

from ditcompress.experts import ExpertLayer, build, convertible
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
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[1152])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shared", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| width | tokens | layer | ms | of dense |\n|---|---|---|---|---|")
    for width in given.width:
        made = layers(width, given.experts, given.shared)
        for tokens in given.tokens:
            x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(1))
            times: dict[str, list[float]] = {name: [] for name in made}
            with torch.inference_mode():
                for turn in range(given.repeats + 2):
                    for name, layer in made.items():
                        started = time.perf_counter()
                        layer(x)
                        if turn > 1:  # the first ones warm up
                            times[name].append(time.perf_counter() - started)
            middle = {name: statistics.median(values) for name, values in times.items()}
            for name, value in middle.items():
                print(f"| {width} | {tokens} | {name} | {1000 * value:.1f} | {value / middle['dense']:.2f} |")


if __name__ == "__main__":
    main()

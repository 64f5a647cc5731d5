"""Speed of the Triton kernels on a GPU, against a bfloat16 `F.linear` (products) or a copy (what memory bounds).

    python benchmarks/kernel_times.py [--only int8_gemm] [--quick] [--tune]

Prints one table for RESULTS.md; without a GPU one line that says so. Shapes are those of DiT-XL/2 and FLUX.1-dev. Ours
and the baseline are captured in CUDA graphs over several sets of random operands, more than the L2 cache holds, and
replayed in turns: medians of 20 replays each after two seconds of warming up. `rate` is TFLOP/s for products and GB/s
for the rest, `times` is baseline / ours. --tune tries every tile on every shape and prints lines for
`runtime/ops/triton/tiles.py: MEASURED`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Call = Callable[[], Any]
DIT = [
    (m, n, k)
    for m in (256, 2048, 4096, 8192, 16384)
    for n, k in ((3456, 1152), (1152, 1152), (4608, 1152), (1152, 4608))
]
FLUX = [(m, n, k) for m in (512, 4096) for n, k in ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288))]
FLUX += [(4608, 21504, 3072), (4608, 3072, 15360)]
QUICK = [(2048, 1152, 1152), (4608, 21504, 3072)]
LARGEST_SET = 512 << 20  # bytes of operands, well above the L2 cache


@dataclass
class Case:
    """`make` returns new operands bound to (ours, baseline); `flop` or, where it is 0, `size` bytes give the rate."""

    kernel: str
    label: str
    make: Callable[[], tuple[Call, Call]]
    flop: float
    size: float


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def integers(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)


def captured(calls: list[Call]) -> Callable[[], float]:
    """Milliseconds of one call, measured by a replay of all of them."""
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(calls)

    return replay


def measured(case: Case) -> tuple[float, float]:
    """Median milliseconds of ours and of the baseline."""
    copies = int(max(2, min(24, LARGEST_SET // max(case.size, 1))))
    pairs = [case.make() for _ in range(copies)]
    ours, baseline = captured([a for a, _ in pairs]), captured([b for _, b in pairs])
    samples = [(ours(), baseline()) for _ in range(25)][5:]
    return statistics.median(a for a, _ in samples), statistics.median(b for _, b in samples)


def rows_cases(quick: bool) -> Iterator[Case]:
    from ditcompress.runtime.ops.triton.rows import quantize_rows

    def make(m: int, k: int, options: dict[str, Any]) -> Callable[[], tuple[Call, Call]]:
        def operands() -> tuple[Call, Call]:
            x, extra = normal(m, k), {name: normal(1, k) for name in ("shift", "scale") if "norm" in options}
            return lambda: quantize_rows(x, **extra, **options), x.clone

        return operands

    shapes = (
        [(4608, 3072)]
        if quick
        else [(2048, 1152), (16384, 1152), (2048, 4608), (4608, 3072), (4608, 12288), (4608, 15360)]
    )
    kinds: dict[str, dict[str, Any]] = {
        "plain": {}, "e4m3": {"element": "e4m3"}, "norm, modulate": {"norm": "layer"},
        "norm, modulate, H": {"norm": "layer", "rotate": 1}, "gelu, H": {"activation": "gelu_tanh", "rotate": 1},
    }  # fmt: skip
    for m, k in shapes:
        for label, options in kinds.items():
            block = min(256, k & -k)
            given = {**options, "rotate": block} if "rotate" in options else options
            yield Case(
                "rows", f"{m}x{k} {label}{block if 'rotate' in options else ''}", make(m, k, given), 0, 3.0 * m * k
            )


def int8_operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Any]:
    from ditcompress.runtime.ops.triton.int8_gemm import Weight

    scale = torch.rand(m, 1, device="cuda") / 1000
    return integers(m, k), scale, Weight(integers(n, k), torch.rand(n, 1, device="cuda") / 1000, bias=normal(n))


def product_cases(quick: bool, kernel: str) -> Iterator[Case]:
    from ditcompress.runtime.ops.triton import fp8, int8_gemm
    from ditcompress.runtime.ops.triton.rows import quantize_rows

    def make(m: int, n: int, k: int) -> Callable[[], tuple[Call, Call]]:
        def operands() -> tuple[Call, Call]:
            x, w, bias = normal(m, k), normal(n, k), normal(n)
            codes, scale, weight = int8_operands(m, n, k)
            calls: dict[str, Call] = {"int8_gemm": lambda: int8_gemm.product(codes, scale, weight)}
            calls["int8 linear"] = lambda: int8_gemm.product(*pair(quantize_rows(x)), weight)
            if kernel == "fp8":
                a, b = (quantize_rows(t, element="e4m3") for t in (x, w))
                calls["fp8"] = lambda: fp8.product(a.codes, a.scale, b.codes, b.scale, bias)
            return calls[kernel], lambda: F.linear(x, w, bias)

        return operands

    for m, n, k in QUICK if quick else DIT + FLUX:
        yield Case(kernel, f"{m}x{n}x{k}", make(m, n, k), 2.0 * m * n * k, 2.0 * (m * k + n * k + m * n))


def pair(quantized: Any) -> tuple[Tensor, Tensor]:
    return quantized.codes, quantized.scale


def grouped_cases(quick: bool) -> Iterator[Case]:
    from ditcompress.runtime.ops.triton import int8_gemm

    def make(n: int, k: int) -> Callable[[], tuple[Call, Call]]:
        def operands() -> tuple[Call, Call]:
            codes, scale, one = int8_operands(4608, n, k)
            two = int8_operands(1, n, k)[2]
            x, y, v, w = normal(512, k), normal(4096, k), normal(n, k), normal(n, k)
            return lambda: int8_gemm.grouped(codes, scale, (one, two), (512, 4096)), lambda: (
                F.linear(x, v),
                F.linear(y, w),
            )

        return operands

    for n, k in [(3072, 3072)] if quick else [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)]:
        yield Case("int8 grouped", f"(512+4096)x{n}x{k}", make(n, k), 2.0 * 4608 * n * k, 4.0 * n * k)


def formats() -> dict[str, tuple[str, dict[str, Any]]]:
    sys.path.insert(0, str(Path(__file__).parent))
    from kernels_compile import PACKED

    return {**PACKED, "int8": ("int", {})}


def packed(format: str, params: dict[str, Any], n: int, k: int) -> tuple[Any, dict[str, Tensor], tuple[int, int]]:
    """Random bytes as codes, small positive scales: what a stored weight looks like to a kernel."""
    from ditcompress.formats.base import stored_layout
    from ditcompress.plan import WeightSpec

    spec, tensors = WeightSpec(format, params), {}
    for name, (shape, dtype) in stored_layout(spec, (n, k)).items():
        if dtype.is_floating_point:
            tensors[name] = (torch.rand(shape, device="cuda") / 100 + 1e-3).to(dtype)
        else:
            tensors[name] = torch.randint(100, 127, shape, device="cuda").to(dtype) if name == "scale" else \
                torch.randint(0, 127, shape, device="cuda").to(dtype)  # fmt: skip
    return spec, tensors, (n, k)


def stored_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def decode_cases(quick: bool) -> Iterator[Case]:
    from ditcompress.runtime.ops.triton import decode

    def make(call: Callable[..., Any], weight: Any) -> Callable[[], tuple[Call, Call]]:
        def operands() -> tuple[Call, Call]:
            spec, tensors, shape = weight
            own = {name: tensor.clone() for name, tensor in tensors.items()}
            moved = torch.empty((stored_bytes(tensors) + shape[0] * shape[1]) // 2, dtype=torch.uint8, device="cuda")
            return lambda: call(spec, own, shape), moved.clone

        return operands

    targets = {"int8": decode.decode_int8, "e4m3": decode.decode_e4m3}
    for n, k in [(12288, 3072)] if quick else [(4608, 1152), (1152, 4608), (12288, 3072), (3072, 15360)]:
        for label, (format, params) in formats().items():
            for target, call in targets.items():
                if target == "int8" or label in ("mxfp4", "int4 g64"):
                    weight = packed(format, params, n, k)
                    size = float(stored_bytes(weight[1]) + n * k)
                    yield Case("decode", f"{n}x{k} {label} to {target}", make(call, weight), 0, size)


def small_cases(quick: bool) -> Iterator[Case]:
    from ditcompress.runtime.ops.triton import small_m

    def make(m: int, weight: Any) -> Callable[[], tuple[Call, Call]]:
        def operands() -> tuple[Call, Call]:
            spec, tensors, shape = weight
            own = {name: tensor.clone() for name, tensor in tensors.items()}
            x, w = normal(m, shape[1]), normal(*shape)
            return lambda: small_m.product(x, spec, own, shape), lambda: F.linear(x, w)

        return operands

    for m in (1,) if quick else (1, 8, 64):
        for n, k in [(18432, 3072)] if quick else [(6912, 1152), (18432, 3072)]:
            for label in ("int4 g64", "int8", "nf4"):
                format, params = formats()[label]
                weight = packed(format, params, n, k)
                yield Case("small_m", f"{m}x{n}x{k} {label}", make(m, weight), 0, float(stored_bytes(weight[1])))


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "rows": rows_cases,
    "int8_gemm": lambda quick: product_cases(quick, "int8_gemm"),
    "int8 linear": lambda quick: product_cases(quick, "int8 linear"),
    "int8 grouped": grouped_cases,
    "fp8": lambda quick: product_cases(quick, "fp8"),
    "decode": decode_cases,
    "small_m": small_cases,
}


def tune(quick: bool) -> None:
    """The fastest tile of every shape, as lines for `MEASURED`."""
    from ditcompress.runtime.ops.triton import int8_gemm, tiles

    engines = [dataclasses.replace(tile, tma=True) for tile in tiles.TILES]
    for m, n, k in QUICK if quick else DIT + FLUX:
        operands = [int8_operands(m, n, k) for _ in range(4)]

        def timed(tile: Any, operands: list[Any] = operands) -> float:
            replay = captured([lambda o=o: int8_gemm.product(*o, tile=tile) for o in operands])  # type: ignore[misc]
            return statistics.median(replay() for _ in range(15))

        times = {tile: timed(tile) for tile in (*tiles.TILES, *engines)}
        best, chosen = min(times, key=lambda t: times[t]), tiles.choose((m,), n, k, 132)
        note = f"{times[best] * 1e3:.1f} us, chosen {times[chosen] * 1e3:.1f}"
        print(f"    ({tiles.bucket(m)}, {n}, {k}): {best},  # {note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--quick", action="store_true", help="one or two shapes of each kernel")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernel_times.py needs a GPU; this machine has none.")
        return
    if options.tune:
        return tune(options.quick)
    warm, until = normal(4096, 4096), time.time() + 2
    while time.time() < until:
        warm @ warm
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| kernel | shape | us | rate | baseline us | times |\n|---|---|---|---|---|---|")
    for name, cases in CASES.items():
        for case in cases(options.quick) if options.only in (None, name) else ():
            ours, baseline = measured(case)
            rate = f"{case.flop / ours / 1e9:.0f} TFLOP/s" if case.flop else f"{case.size / ours / 1e6:.0f} GB/s"
            print(f"| {case.kernel} | {case.label} | {ours * 1e3:.1f} | {rate} | {baseline * 1e3:.1f} |"
                  f" {baseline / ours:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

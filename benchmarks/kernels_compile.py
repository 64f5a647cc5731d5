"""Compile the Triton kernels for Hopper (sm_90a) on a machine without a GPU and say what the assembler made of them.

    python benchmarks/kernels_compile.py [--only rows] [--quick]

The kernels' own Python wrappers run on tensors without data; each launch is turned into a compilation. Columns: warps,
stages, registers a thread, bytes spilled to local memory, shared memory of a program, programs that fit a
multiprocessor, and the tensor core instructions in the machine code (IGMMA: int8, HGMMA: bfloat16, QGMMA: E4M3; IMMA
and HMMA are the older, slower ones). A spill or an IMMA in a large product is a fault.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

SHARED, REGISTERS = 233472, 65536  # of a multiprocessor
META = torch.device("meta")


def signature(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and divisibility of a launch's arguments, as Triton specializes them."""
    from triton.runtime.jit import mangle_type

    types, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value, place = arguments[parameter.name], (parameter.num,)
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[parameter.name], constants[place] = "constexpr", value
            continue
        types[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
    return types, constants, attributes


def inspect(cubin: bytes) -> tuple[int, int, str]:
    """(registers, spilled bytes, tensor core instructions) of machine code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(*command: str) -> str:
            command = (str(tools / command[0]), *command[1:], file.name)
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = tool("cuobjdump", "--dump-resource-usage"), tool("nvdisasm", "-c")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    found = collections.Counter(re.findall(r"\b([IHQ]G?MMA)\b", code))
    return registers, stack, " ".join(f"{name} {count}" for name, count in sorted(found.items())) or "-"


class Recorder:
    """In place of a launch: compile, print a line."""

    def __init__(self) -> None:
        self.label, self.faults, self.seen = "", 0, set()  # type: str, int, set[Any]

    def __call__(self, kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
        names = [parameter.name for parameter in kernel.params]
        types, constants, attributes = signature(kernel, {**dict(zip(names, args, strict=False)), **kwargs})
        key = (kernel.fn.__name__, str(types), str(constants), str(attributes), str(options))
        if key in self.seen:
            return
        self.seen.add(key)
        source = ASTSource(kernel, types, constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        registers, spilled, cores = inspect(made.asm["cubin"])
        warps, shared = made.metadata.num_warps, made.metadata.shared
        fit = min(SHARED // (shared + 1024), REGISTERS // (registers * 32 * warps), 64 // warps)
        self.faults += spilled > 64  # some words of the epilogue, once a tile, are no fault
        stages = made.metadata.num_stages
        print(
            f"{kernel.fn.__name__:18} {self.label:44} {warps:2} {stages:2} {registers:4} {spilled:6} {shared:7} "
            f"{fit:3}  {cores}",
            flush=True,
        )


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def rows_cases(quick: bool) -> list[tuple[str, dict[str, Any]]]:
    vectors = {name: empty(1, 3072) for name in ("shift", "scale")}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("4608x3072 norm, modulate, H256", {"x": empty(4608, 3072), "norm": "layer", **vectors, "rotate": 256})
    ]
    if quick:
        return cases
    return [
        *cases,
        ("4608x3072", {"x": empty(4608, 3072)}),
        ("4608x3072 asymmetric", {"x": empty(4608, 3072), "symmetric": False}),
        ("4608x3072 e4m3, norm", {"x": empty(4608, 3072), "element": "e4m3", "norm": "layer", **vectors}),
        ("4608x3072 residual, norm, H256, down 32",
         {"x": empty(4608, 3072), "residual": empty(4608, 3072), "gate": empty(1, 3072), "norm": "layer", **vectors,
          "rotate": 256, "down": empty(32, 3072)}),
        ("4608x3072 float down 32", {"x": empty(4608, 3072), "down": empty(32, 3072), "down_of": "float"}),
        ("4608x12288 gelu, H256", {"x": empty(4608, 12288), "activation": "gelu_tanh", "rotate": 256}),
        ("4608x15360 H256", {"x": empty(4608, 15360), "rotate": 256}),
        ("2048x1152 norm, H128", {"x": empty(2048, 1152), "norm": "layer", "rotate": 128}),
        ("2048x1152 norm, H1152", {"x": empty(2048, 1152), "norm": "layer", "rotate": 1152}),
        ("2048x4608 gelu, H512", {"x": empty(2048, 4608), "activation": "gelu_tanh", "rotate": 512}),
    ]  # fmt: skip


def run_rows(quick: bool, record: Recorder) -> None:
    from ditcompress.runtime.ops.triton import rows

    for record.label, arguments in rows_cases(quick):
        rows.quantize_rows(arguments.pop("x"), **arguments)


def int8_operands(m: int, n: int, k: int, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor, Any]:
    from ditcompress.runtime.ops.triton.int8_gemm import Weight

    up = empty(n, rank) if rank else None
    codes, weight = empty(m, k, dtype=torch.int8), empty(n, k, dtype=torch.int8)
    single = torch.float32
    return (
        codes,
        empty(m, 1, dtype=single),
        Weight(weight, empty(n, 1, dtype=single), empty(n, dtype=single), empty(n), up),
    )


def run_int8(quick: bool, record: Recorder) -> None:
    from ditcompress.runtime.ops.triton import int8_gemm, tiles

    shape = (4608, 3072, 3072)
    engines = [dataclasses.replace(tile, tma=True) for tile in tiles.TILES[:4]]
    for tile in tiles.TILES[:1] if quick else (*tiles.TILES, *engines):
        record.label = f"{tile.m}x{tile.n}x{tile.k}{' tma' if tile.tma else ''} bias"
        int8_gemm.product(*int8_operands(*shape), tile=tile)
        record.label = f"{tile.m}x{tile.n}x{tile.k}{' tma' if tile.tma else ''} zero, rank 32, gelu"
        codes, scale, weight = int8_operands(*shape, rank=32)
        down = empty(4608, 32, dtype=torch.float32)
        int8_gemm.product(codes, scale, weight, zero=scale, down=down, activation="gelu_tanh", tile=tile)
        if quick:
            return
    record.label = "two streams, gated residual"
    codes, scale, weight = int8_operands(*shape)
    int8_gemm.grouped(
        codes, scale, (weight, weight), (512, 4096), residual=empty(4608, 3072), gates=(empty(1, 3072), empty(1, 3072)),
        tile=tiles.TILES[1],
    )  # fmt: skip


def packed(format: str, n: int, k: int, **params: Any) -> tuple[Any, dict[str, torch.Tensor], tuple[int, int]]:
    from ditcompress.formats.base import stored_layout
    from ditcompress.plan import WeightSpec

    spec = WeightSpec(format, params)
    layout = stored_layout(spec, (n, k))
    return spec, {name: empty(*shape, dtype=dtype) for name, (shape, dtype) in layout.items()}, (n, k)


GROUPS = {"bits": 4, "layout": "group", "group": 64, "symmetric": False, "scale": "uint8"}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 g64": ("int", GROUPS), "int3 g32": ("int", {**GROUPS, "bits": 3, "group": 32}),
    "int2 g32": ("int", {**GROUPS, "bits": 2, "group": 32}), "nf4": ("nf4", {"block": 64}),
    "fp4 e2m1 g32": ("fp", {"element": "e2m1", "layout": "group"}), "mxfp4": ("mx", {"element": "e2m1"}),
    "ternary base3": ("ternary", {"packing": "base3"}),
    "vq 8 bits of 4": ("vq", {"bits": 8, "dim": 4, "row_scale": True}),
}  # fmt: skip


def run_decode(quick: bool, record: Recorder) -> None:
    from ditcompress.runtime.ops.triton import decode

    for label, (format, params) in list(PACKED.items())[: 1 if quick else None]:
        for width in (3072,) if quick else (1152, 3072, 15360):
            weight = packed(format, 3072, width, **params)
            record.label = f"{label}, K {width}, to int8"
            decode.decode_int8(*weight)
            if width == 3072:
                record.label = f"{label}, K {width}, to e4m3"
                decode.decode_e4m3(*weight)
                record.label = f"{label}, K {width}, to bfloat16"
                decode.decode_float(*weight)


def run_small(quick: bool, record: Recorder) -> None:
    from ditcompress.runtime.ops.triton import small_m

    for rows in (1,) if quick else (1, 64):
        for label, (format, params) in list(PACKED.items())[: 1 if quick else None]:
            record.label = f"{rows}x18432x3072, {label}, silu"
            small_m.product(empty(rows, 3072), *packed(format, 18432, 3072, **params), activation="silu")
        record.label = f"{rows}x18432x3072, int8"
        small_m.product(empty(rows, 3072), *packed("int", 18432, 3072))


RUNS = {"rows": run_rows, "int8_gemm": run_int8, "decode": run_decode, "small_m": run_small}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(RUNS))
    parser.add_argument("--quick", action="store_true", help="one or two compilations of each kernel")
    options = parser.parse_args()
    from triton.runtime.jit import JITFunction

    record = Recorder()
    JITFunction.run = lambda kernel, *args, **kwargs: record(kernel, *args, **kwargs)
    print(f"{'kernel':18} {'launch':44} warps stages registers spilled shared programs tensor cores")
    for name, run in RUNS.items():
        if options.only in (None, name):
            importlib.import_module(f"ditcompress.runtime.ops.triton.{name}")
            run(options.quick, record)
    print(f"{len(record.seen)} compiled, {record.faults} spill")


if __name__ == "__main__":
    main()

"""The INT8 product and what follows it, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.runtime.triton_support import DEVICE, INTERPRETED, kernels, noise

gemm = kernels("int8_gemm")
tiles = kernels("tiles")

EXACT = 1e-5 if INTERPRETED else 2e-3  # tf32 on a GPU
SHAPES = [(1, 1, 1), (1, 33, 64), (17, 32, 65), (40, 70, 200), (16, 64, 128)]


def integers(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    codes[0] = 127
    return codes.to(DEVICE)


def operands(m: int, n: int, k: int, rank: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, gemm.Weight]:
    codes, weight = integers(m, k, seed), integers(n, k, seed + 1)
    scale, step = noise(m, 1, seed=seed + 2).abs() + 0.01, noise(n, 1, seed=seed + 3).abs() + 0.01
    up = noise(n, rank, seed=seed + 5).bfloat16() if rank else None
    return codes, scale, gemm.Weight(weight, step, weight.sum(1).float(), noise(n, seed=seed + 4), up)


def exact(codes: Tensor, scale: Tensor, weight: gemm.Weight, zero: Tensor | None = None) -> Tensor:
    x = (codes.double() - (0 if zero is None else zero.double())) * scale
    return x @ (weight.codes.double() * weight.scale).t() + (0 if weight.bias is None else weight.bias)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=EXACT, atol=EXACT * float(theirs.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_products_of_any_shape(shape: tuple[int, int, int], asymmetric: bool) -> None:
    codes, scale, weight = operands(*shape)
    zero = torch.round(noise(shape[0], 1, seed=9) * 50) if asymmetric else None
    close(gemm.product(codes, scale, weight, zero=zero, dtype=torch.float32), exact(codes, scale, weight, zero))


@pytest.mark.parametrize("shape", [(1, 1, 16), (17, 33, 80), (40, 70, 208)])
def test_loads_by_descriptor_give_the_same(shape: tuple[int, int, int]) -> None:
    codes, scale, weight = operands(*shape)
    by_engine = dataclasses.replace(tiles.SMALL if INTERPRETED else tiles.TILES[3], tma=True)
    plain = gemm.product(codes, scale, weight, dtype=torch.float32)
    assert torch.equal(gemm.product(codes, scale, weight, dtype=torch.float32, tile=by_engine), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_in_half_precision(dtype: torch.dtype) -> None:
    codes, scale, weight = operands(5, 40, 64)
    scale = scale / 1000
    got = gemm.product(codes, scale, weight, dtype=dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact(codes, scale, weight), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu", "silu"])
@pytest.mark.parametrize("rank,gated", [(0, False), (1, True), (20, True)])
def test_everything_that_follows_the_sums(activation: str | None, rank: int, gated: bool) -> None:
    m, n, k = 18, 45, 70
    codes, scale, weight = operands(m, n, k, rank)
    scale = scale / 2000
    zero = torch.round(noise(m, 1, seed=9) * 50)
    down = noise(m, rank, seed=10) if rank else None
    residual, gate = noise(m, n, seed=11), noise(3, n, seed=12) if gated else None
    got = gemm.product(
        codes, scale, weight, zero=zero, down=down, activation=activation, residual=residual, gate=gate,
        dtype=torch.float32,
    )  # fmt: skip
    y = exact(codes, scale, weight, zero)
    if rank:
        y = y + down.double() @ weight.up.double().t()
    if activation:
        y = {"gelu_tanh": lambda v: F.gelu(v, approximate="tanh"), "gelu": F.gelu, "silu": F.silu}[activation](y)
    if gate is not None:
        y = y * gate.double().repeat_interleave(m // 3, 0)
    close(got, residual.double() + y)


@pytest.mark.parametrize("rows", [(20, 33), (1, 16), (35, 2)])
def test_two_streams_in_one_launch_are_two_products(rows: tuple[int, int]) -> None:
    n, k, rank = 40, 70, 4
    first, second = operands(rows[0], n, k, rank), operands(rows[1], n, k, rank, seed=20)
    codes, scale = (torch.cat([a, b]) for a, b in zip(first[:2], second[:2], strict=True))
    zero, down = torch.round(noise(sum(rows), 1, seed=9) * 50), noise(sum(rows), rank, seed=10)
    residual, gates = noise(sum(rows), n, seed=11), (noise(1, n, seed=12), noise(rows[1], n, seed=13))
    got = gemm.grouped(
        codes, scale, (first[2], second[2]), rows, zero=zero, down=down, residual=residual, gates=gates,
        activation="silu", dtype=torch.float32,
    )  # fmt: skip
    for part, weight, gate in ((slice(0, rows[0]), first[2], gates[0]), (slice(rows[0], None), second[2], gates[1])):
        alone = gemm.product(
            codes[part], scale[part], weight, zero=zero[part], down=down[part], residual=residual[part], gate=gate,
            activation="silu", dtype=torch.float32,
        )  # fmt: skip
        torch.testing.assert_close(got[part], alone, rtol=EXACT / 10, atol=EXACT / 10)


def test_sums_beyond_16_bits_are_exact() -> None:
    codes = torch.full((3, 300), -128, dtype=torch.int8, device=DEVICE)
    weight = gemm.Weight(torch.full((5, 300), 127, dtype=torch.int8, device=DEVICE), torch.ones(5, 1, device=DEVICE))
    got = gemm.product(codes, torch.ones(3, 1, device=DEVICE), weight, dtype=torch.float32)
    assert (got == -128 * 127 * 300).all()


def test_what_does_not_fit_is_refused() -> None:
    codes, scale, weight = operands(4, 8, 16)
    with pytest.raises(ValueError, match="shapes"):
        gemm.product(codes[:, :8], scale, weight)
    with pytest.raises(ValueError, match="row sums"):
        gemm.product(codes, scale, gemm.Weight(weight.codes, weight.scale), zero=scale)
    with pytest.raises(ValueError, match="samples"):
        gemm.product(codes, scale, weight, residual=noise(4, 8), gate=noise(3, 8))
    with pytest.raises(ValueError, match="low-rank"):
        gemm.product(codes, scale, weight, down=noise(4, 2))


def test_tiles_follow_the_shape() -> None:
    """Wide products get the large tile; one that fills a third of the machine with it gets a smaller one."""
    assert tiles.choose((4608,), 21504, 3072, 132).n == 256
    assert tiles.choose((512,), 3072, 3072, 132).n <= 128
    small = tiles.choose((1,), 3072, 3072, 132)
    assert small.m == 16
    for rows in (256, 2048, 4096, 8192, 16384):
        for columns in (3456, 1152, 4608):
            best = tiles.choose((rows,), columns, 1152, 132)
            assert all(
                tiles.waves(best, (rows,), columns, 132) <= tiles.waves(other, (rows,), columns, 132)
                for other in tiles.TILES
            )

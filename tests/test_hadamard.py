"""Hadamard transforms: orthonormal at every width in use, fast equals dense, signs survive packing."""

from __future__ import annotations

import pytest
import torch

from ditcompress import hadamard

# hq-dit card: widths of DiT, PixArt, SD3, FLUX, Wan and others; and those of the models here
WIDTHS = (32, 64, 96, 160, 384, 640, 1152, 1536, 2240, 2432, 2880, 3072, 4608, 5120, 5632, 6144)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 44, 60, 76, 84, 108, 140, 148])
def test_matrices_are_hadamard(order: int) -> None:
    h = hadamard.matrix(order)
    assert set(h.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(h @ h.t(), order * torch.eye(order))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_transform_keeps_inner_products_and_inverts(width: int) -> None:
    assert hadamard.block_for(width) == width
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(3, width, generator=generator, dtype=torch.float64) for _ in range(2))
    sign = hadamard.signs(width, 5)
    a, b = hadamard.rotate(x, sign, width), hadamard.rotate(w, sign, width)
    assert torch.allclose(a @ b.t(), x @ w.t(), atol=1e-9)
    assert torch.allclose(hadamard.unrotate(a, sign, width), x, atol=1e-10)


@pytest.mark.parametrize("block", [12, 20, 32, 96, 256])
def test_fast_equals_dense(block: int) -> None:
    x = torch.randn(5, 2 * block, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dense = hadamard.transform(torch.eye(block, dtype=torch.float64), block)
    assert torch.allclose(dense @ dense.t(), torch.eye(block, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(hadamard.transform(x, block).reshape(10, block), x.reshape(10, block) @ dense, atol=1e-12)


def test_a_width_without_a_transform_falls_back_to_a_power_of_two() -> None:
    assert hadamard.block_for(1152) == 1152
    assert hadamard.block_for(2 * 47 * 23) == 2
    assert hadamard.block_for(37) == 1
    assert hadamard.block_for(96, 64) == 32  # 64 does not divide 96
    assert hadamard.block_for(64, 13) == 8  # no transform of 13 is known


def test_a_common_mean_becomes_an_outlier_only_without_signs() -> None:
    x = torch.ones(1, 256)
    assert hadamard.transform(x, 256).abs().max() == 16
    assert hadamard.rotate(x, hadamard.signs(256, 0), 256).abs().max() < 5


@pytest.mark.parametrize("width", [1, 7, 8, 160])
def test_signs_survive_packing(width: int) -> None:
    sign = hadamard.signs(width, 3)
    packed = hadamard.pack_signs(sign)
    assert packed.shape == (-(-width // 8),)
    assert torch.equal(hadamard.unpack_signs(packed, width), sign)

"""Latents through autoencoders of both kinds: one scale for all channels, and Qwen-Image's with one for each."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage

from ditcompress.evaluation.vae import decode, encode


def test_channels_of_qwen_image_have_their_own_scale_and_images_are_single_frames() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[2.0, 1.0, 0.5, 3.0],
    ).eval()  # fmt: skip
    latents = torch.randn(5, 4, 8, 8)
    std, mean = (torch.tensor(vae.config[name]).reshape(1, 4, 1, 1) for name in ("latents_std", "latents_mean"))
    with torch.no_grad():
        wanted = vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
        images = decode(vae, latents)
        seen = vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]
    assert images.shape == (5, 3, 16, 16) and torch.allclose(images, wanted, atol=1e-5)
    assert torch.allclose(encode(vae, images) * std + mean, seen, atol=1e-5)


def test_one_scale_and_shift_for_all_channels() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, shift_factor=0.1
    ).eval()
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert torch.allclose(decode(vae, latents), vae.decode(latents / 0.5 + 0.1).sample, atol=1e-5)
        images = torch.rand(2, 3, 8, 8)
        seen = vae.encode(images).latent_dist.mode()
    assert torch.allclose(encode(vae, images), (seen - 0.1) * 0.5, atol=1e-5)
    assert encode(vae, images[:, :1]).shape == pytest.approx((2, 4, 8, 8))

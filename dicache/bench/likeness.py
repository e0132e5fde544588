"""How close a picture is to its reference: PSNR and SSIM, and LPIPS where its weights are there."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from dicache.demo.metrics import quality

# Name, digits, and whether more is better. The first one chooses who is bold.
METRICS = {"psnr": ("PSNR, dB", 1, True), "ssim": ("SSIM", 4, True), "lpips": ("LPIPS", 4, False)}


def likeness(pictures: Tensor, reference: Tensor) -> dict[str, float]:
    """Every metric of one sample that can be had here.

    Args:
        pictures, reference: [3, H, W] image or [F, 3, H, W] video in [0, 1].
    """
    found = quality(pictures, reference)
    values = {"psnr": found.psnr, "ssim": found.ssim}
    if has_lpips():
        values["lpips"] = _lpips(pictures, reference)
    return values


@functools.cache
def has_lpips() -> bool:
    """Whether the network of LPIPS lies on this machine: nothing is downloaded."""
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    return importlib.util.find_spec("torchvision") is not None and any(
        checkpoints.glob("alexnet-*.pth")
    )


def _lpips(pictures: Tensor, reference: Tensor) -> float:
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    shape = (-1, *pictures.shape[-3:])
    distance = learned_perceptual_image_patch_similarity(
        pictures.reshape(shape), reference.reshape(shape), net_type="alex", normalize=True
    )
    return float(distance)

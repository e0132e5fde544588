"""How close a picture or video is to its reference: PSNR, SSIM, and LPIPS where it can be had.

All take one sample at a time, with pixels in [0, 1]; average over samples afterwards. Videos are
gone through frame by frame: long ones need no more memory beside them than one frame does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from dicache import lpips

# Of a perfect copy, instead of infinity, so that averages stay finite.
PSNR_CAP = 100.0
# Name, digits, and whether more is better. The first one chooses who is bold.
METRICS = {"psnr": ("PSNR, dB", 1, True), "ssim": ("SSIM", 4, True), "lpips": ("LPIPS", 4, False)}


@dataclass(frozen=True)
class Quality:
    """Likeness of one sample to its reference.

    Attributes:
        psnr: 10 log10(1 / mean squared error) over all pixels and frames, in dB, at most 100.
        ssim: Structural similarity (Gaussian window of 11 pixels), averaged over frames; at most 1.
    """

    psnr: float
    ssim: float


def quality(pictures: Tensor, reference: Tensor) -> Quality:
    """Compare one sample with its reference.

    Args:
        pictures, reference: [3, H, W] image or [F, 3, H, W] video in [0, 1], or bytes in [0, 255].

    Raises:
        ValueError: The shapes differ, or are not those of one image or video.
    """
    errors, ssims = [], []
    for frame, target in _frames(pictures, reference):
        errors.append((frame - target).square().mean().item())
        ssim = structural_similarity_index_measure(frame, target, data_range=1.0)
        assert isinstance(ssim, Tensor)  # a tuple only where the full map is asked for
        ssims.append(ssim.item())
    error = sum(errors) / len(errors)
    psnr = min(-10 * math.log10(error), PSNR_CAP) if error else PSNR_CAP
    return Quality(psnr=psnr, ssim=sum(ssims) / len(ssims))


def likeness(pictures: Tensor, reference: Tensor) -> dict[str, float]:
    """Every metric of one sample that can be had here. LPIPS is averaged over frames, too.

    Args:
        pictures, reference: As `quality` takes them.
    """
    found = quality(pictures, reference)
    values = {"psnr": found.psnr, "ssim": found.ssim}
    if lpips.has_weights() and min(pictures.shape[-2:]) >= lpips.SMALLEST:
        each = [lpips.distance(*pair) for pair in _frames(pictures, reference)]
        values["lpips"] = sum(each) / len(each)
    return values


def _frames(pictures: Tensor, reference: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of frames [1, 3, H, W], fp32 in [0, 1]."""
    if pictures.shape != reference.shape or pictures.ndim not in (3, 4):
        raise ValueError(
            f"got pictures of shape {tuple(pictures.shape)} and a reference of shape "
            f"{tuple(reference.shape)}; expected the same [3, H, W] or [F, 3, H, W]"
        )
    shape = (-1, 1, *pictures.shape[-3:])
    for frame, target in zip(pictures.reshape(shape), reference.reshape(shape), strict=True):
        yield _unit(frame), _unit(target)


def _unit(frame: Tensor) -> Tensor:
    return frame.float() / 255 if frame.dtype == torch.uint8 else frame.float()

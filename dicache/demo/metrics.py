"""How close a picture or video made with the cache is to the one made without it.

Both metrics come from torchmetrics and are taken per sample, on pictures in [0, 1]; average over
samples afterwards. A perfect copy has a PSNR of `PSNR_CAP` instead of infinity, so that averages
stay finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

PSNR_CAP = 100.0


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
        pictures, reference: [3, H, W] image or [F, 3, H, W] video in [0, 1].

    Raises:
        ValueError: The shapes differ, or are not those of one image or video.
    """
    if pictures.shape != reference.shape or pictures.ndim not in (3, 4):
        raise ValueError(
            f"got pictures of shape {tuple(pictures.shape)} and a reference of shape "
            f"{tuple(reference.shape)}; expected the same [3, H, W] or [F, 3, H, W]"
        )
    frames = pictures.float().reshape(-1, *pictures.shape[-3:])  # [F, 3, H, W]
    target = reference.float().reshape(-1, *reference.shape[-3:])
    psnr = torch.as_tensor(peak_signal_noise_ratio(frames, target, data_range=1.0))
    ssim = structural_similarity_index_measure(frames, target, data_range=1.0)
    assert isinstance(ssim, Tensor)  # a tuple only where the full map is asked for
    return Quality(psnr=psnr.clamp(max=PSNR_CAP).item(), ssim=ssim.item())

"""Small pictures of samples, for the page: one of an image, a strip of four of a video."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from dicache.demo.pictures import to_image

GAIN = 5  # of differences
_FRAMES = 4
_LARGEST = 256  # pixels, of a frame


def strip(pictures: Tensor) -> Image.Image:
    """[3, H, W] or [F, 3, H, W] in [0, 1] as one picture, not enlarged."""
    frames = pictures if pictures.ndim == 4 else pictures[None]
    chosen = [round(i * (len(frames) - 1) / (_FRAMES - 1)) for i in range(_FRAMES)]
    images = [to_image(frames[index]) for index in dict.fromkeys(chosen)]
    for image in images:
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    width, height = images[0].size
    joined = Image.new("RGB", (width * len(images), height))
    for place, image in enumerate(images):
        joined.paste(image, (place * width, 0))
    return joined


def difference(pictures: Tensor, reference: Tensor) -> Tensor:
    """Absolute difference times `GAIN`, in [0, 1]."""
    return ((pictures - reference).abs() * GAIN).clamp(0.0, 1.0)

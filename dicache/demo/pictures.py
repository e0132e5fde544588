"""Pictures that show a comparison: image sheets, frame sheets and animations, drawn with Pillow.

Pixels are shown as they are: small pictures grow by a whole factor with sharp edges, only pictures
too large for a sheet shrink. Everything is a grid of cells, and a cell is a picture or a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dicache.demo.runner import Sample
from dicache.demo.sparse import RUNS, FourRuns
from dicache.fonts import lettering

_GAINS = (5, 10, 20, 50, 100, 200, 500, 1000)  # of a difference, so that it is seen
SHEET_FRAMES = 8
FRAME_MILLISECONDS = 160
_UNCACHED, _DICACHE = "without\ncache", "DiCache"


def comparison_sheet(title: str, samples: Sequence[Sample]) -> Image.Image:
    """Un-cached and cached pictures of compared samples.

    Images of several samples stand below each other, one column a sample, with their difference
    below; those of one sample stand side by side. Of every video up to `SHEET_FRAMES` frames are
    shown, un-cached above cached.
    """
    is_video = samples[0].cached.pictures.ndim == 4
    body = _frame_sheet(samples) if is_video else _image_sheet(samples)
    return _page(title, body)


def comparison_animation(title: str, samples: Sequence[Sample]) -> list[Image.Image]:
    """Frames of an animation: videos of compared samples, un-cached above cached."""
    pages = []
    for index in range(len(samples[0].cached.pictures)):
        both = [_both_pictures(sample, index) for sample in samples]
        cells = [[fit(to_image(p), 192, 480) for p in pictures] for pictures in both]
        pages.append(_page(title, _columns(*_captions(samples), cells, [_UNCACHED, _DICACHE])))
    return pages


def four_runs_sheet(title: str, samples: Sequence[FourRuns]) -> Image.Image:
    """Frames of the videos of every kind of run, below each other."""
    blocks = [
        [_frame_block(each.prompt, _four_verdict(each).replace("\n", ", "), _videos(each))]
        for each in samples
    ]
    return _page(title, _grid(blocks, gap=18))


def four_runs_animation(title: str, samples: Sequence[FourRuns]) -> list[Image.Image]:
    """Frames of an animation: one column a sample, one row a kind of run."""
    prompts = [sample.prompt for sample in samples]
    feet = [_four_verdict(sample) for sample in samples]
    pages = []
    for index in range(len(samples[0].runs["dense"].pictures)):
        cells = [
            [fit(to_image(video[index]), 140, 480) for video in _videos(sample).values()]
            for sample in samples
        ]
        pages.append(_page(title, _columns(prompts, feet, cells, RUNS)))
    return pages


def _videos(sample: FourRuns) -> dict[str, Tensor]:
    return {name: sample.runs[name].pictures for name in RUNS}


def _four_verdict(sample: FourRuns) -> str:
    likeness = [f"{name} {sample.quality(name).psnr:.1f} dB" for name in RUNS[1:]]
    return "\n".join(likeness)


def save_animation(
    path: Path, frames: Sequence[Image.Image], milliseconds: int = FRAME_MILLISECONDS
) -> None:
    """Write frames as an endless GIF."""
    flat = [frame.quantize(256, dither=Image.Dither.NONE) for frame in frames]
    flat[0].save(path, save_all=True, append_images=flat[1:], duration=milliseconds, loop=0)


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] as an 8-bit picture; values outside are clipped, NaN is black."""
    levels = (picture.nan_to_num(0.0).clamp(0.0, 1.0) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def fit(image: Image.Image, smallest: int, largest: int) -> Image.Image:
    """Bring a picture to a showable size, with its pixels kept square and sharp where it grows."""
    factor = -(-smallest // max(image.size))
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image = image.copy()
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    return image


def difference_gain(differences: Sequence[Tensor]) -> int:
    """The largest gain of a few that leaves their root mean square at most a quarter of white.

    5 up to 26 dB of PSNR, where all is seen anyway; 50 at 50 dB.
    """
    mean_square = sum(float(each.square().mean()) for each in differences) / len(differences)
    fitting = [gain for gain in _GAINS if mean_square and gain * mean_square**0.5 <= 0.25]
    return max(fitting, default=_GAINS[0])


def _image_sheet(samples: Sequence[Sample]) -> Image.Image:
    cells = []
    gain = difference_gain([a - b for a, b in map(_both_pictures, samples)])
    for sample in samples:
        uncached, cached = _both_pictures(sample)
        difference = ((cached - uncached).abs() * gain).clamp(0.0, 1.0)
        pictures = (uncached, cached, difference)
        cells.append([fit(to_image(picture), 192, 1024) for picture in pictures])
    labels = [_UNCACHED, _DICACHE, f"difference\n× {gain}"]
    if len(samples) > 1:
        return _columns(*_captions(samples), cells, labels)
    row = _grid([[_text(label.replace("\n", " ")) for label in labels], cells[0]], gap=8)
    head = _text(samples[0].prompt, row.width, bold=True)
    foot = _text(_verdict(samples[0]).replace("\n", ", "), row.width)
    return _grid([[head], [row], [foot]], gap=8)


def _frame_sheet(samples: Sequence[Sample]) -> Image.Image:
    blocks = []
    for sample in samples:
        videos = dict(zip((_UNCACHED, _DICACHE), _both_pictures(sample), strict=True))
        blocks.append([_frame_block(sample.prompt, _verdict(sample).replace("\n", ", "), videos)])
    return _grid(blocks, gap=18)


def _frame_block(prompt: str, verdict: str, videos: dict[str, Tensor]) -> Image.Image:
    """Frames of one prompt's videos, a row a video, under what there is to say about them."""
    count = len(next(iter(videos.values())))
    shown = min(count, SHEET_FRAMES)
    chosen = [round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)]
    rows = [[_text("")] + [_text(f"frame {index + 1}", size=12) for index in chosen]]
    for label, video in videos.items():
        rows.append([_text(label), *(fit(to_image(video[i]), 100, 320) for i in chosen)])
    block = _grid(rows)
    head = [_text(prompt, block.width, bold=True), _text(verdict, block.width)]
    return _grid([[cell] for cell in (*head, block)])


def _captions(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    return [sample.prompt for sample in samples], [_verdict(sample) for sample in samples]


def _columns(
    prompts: Sequence[str],
    verdicts: Sequence[str],
    cells: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
) -> Image.Image:
    """One column a sample: its prompt, its pictures, and how alike they are."""
    width = cells[0][0].width + 8
    heads = [_text("")] + [_text(prompt, width, bold=True) for prompt in prompts]
    rows = [[_text(label), *(column[row] for column in cells)] for row, label in enumerate(labels)]
    feet = [_text("")] + [_text(verdict, width) for verdict in verdicts]
    return _grid([heads, *rows, feet], gap=8)


def _verdict(sample: Sample) -> str:
    quality = sample.quality
    assert quality is not None  # only compared samples are drawn
    caches = sample.cached.caches.values()
    fewer = sum(c.block_calls_uncached for c in caches) / sum(c.stats.block_calls for c in caches)
    likeness = f"PSNR {quality.psnr:.1f} dB, SSIM {quality.ssim:.3f}"
    return f"{likeness}\n{fewer:.2f}× fewer block calls"


def _both_pictures(sample: Sample, frame: int | None = None) -> tuple[Tensor, Tensor]:
    assert sample.uncached is not None  # only compared samples are drawn
    uncached, cached = sample.uncached.pictures, sample.cached.pictures
    return (uncached, cached) if frame is None else (uncached[frame], cached[frame])


def _page(title: str, body: Image.Image) -> Image.Image:
    head = _text(title, width=body.width, size=17, bold=True)
    content = _grid([[head], [body]], gap=8)
    page = Image.new("RGB", (content.width + 32, content.height + 32), "white")
    page.paste(content, (16, 16))
    return page


def _grid(cells: Sequence[Sequence[Image.Image]], gap: int = 4) -> Image.Image:
    """Put cells into rows and columns, each centred in its place."""
    widths = [max(row[i].width for row in cells) for i in range(len(cells[0]))]
    heights = [max(cell.height for cell in row) for row in cells]
    size = (sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(heights) - 1))
    sheet = Image.new("RGB", size, "white")
    top = 0
    for row, height in zip(cells, heights, strict=True):
        left = 0
        for cell, width in zip(row, widths, strict=True):
            sheet.paste(cell, (left + (width - cell.width) // 2, top + (height - cell.height) // 2))
            left += width + gap
        top += height + gap
    return sheet


def _text(text: str, width: int | None = None, size: int = 14, bold: bool = False) -> Image.Image:
    """A text as a cell, wrapped to `width` pixels; without one, as wide as it is."""
    text, path = lettering(text, bold)
    font = _font(path, size)
    if width is not None:
        text = "\n".join(_wrap(line, width - 8, font) for line in text.split("\n"))
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    right, bottom = draw.multiline_textbbox((0, 0), text, font=font, spacing=4)[2:]
    cell = Image.new("RGB", (int(right) + 8, int(bottom) + 6), "white")
    place = (4, 2)
    ImageDraw.Draw(cell).multiline_text(
        place, text, font=font, fill="#222222", spacing=4, align="center"
    )
    return cell


def _wrap(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Break a line between words, so that no part is wider than `width` pixels, or, as in Chinese,
    inside of one.
    """
    parts = [""]
    for word in line.split():
        longer = f"{parts[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            parts[-1] = longer
            continue
        parts += [""] if parts[-1] else []
        for character in word:
            if parts[-1] and font.getlength(parts[-1] + character) > width:
                parts.append("")
            parts[-1] += character
    return "\n".join(parts)


@cache
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)

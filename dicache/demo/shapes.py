"""Drawn data for the demo models: coloured shapes, still or moving, and the prompts naming them.

Everything is procedural: a prompt such as ``red circle left, blue square right on white`` (image)
or ``yellow circle moves right on black`` (video) fixes what is drawn, a seeded generator fixes the
rest (size, exact position, shade). ``encode_prompts`` stands in for a text encoder: every word of
the small vocabulary and every place in the prompt has a fixed random vector. Needs only torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

IMAGE_SIZE = 32
VIDEO_SIZE = 20
VIDEO_FRAMES = 8
LONG_VIDEO_FRAMES = 24
TEXT_LENGTH = 8
TEXT_DIM = 64
TEXT_SEED = 2024

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.88, 0.10),
    "green": (0.10, 0.68, 0.22),
    "cyan": (0.10, 0.80, 0.88),
    "blue": (0.12, 0.25, 0.92),
    "purple": (0.56, 0.14, 0.72),
    "pink": (1.00, 0.45, 0.72),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.04, 0.04, 0.06),
    "gray": (0.45, 0.45, 0.48),
    "white": (0.96, 0.96, 0.94),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
POSITIONS: dict[str, tuple[float, float]] = {
    "left": (0.27, 0.50),
    "right": (0.73, 0.50),
    "top": (0.50, 0.27),
    "bottom": (0.50, 0.73),
    "center": (0.50, 0.50),
}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
ACTIONS = ("bounces", "grows", "shrinks")
MOTIONS = tuple(f"moves {direction}" for direction in DIRECTIONS) + ACTIONS
VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        [*COLORS, *BACKGROUNDS, *SHAPES, *POSITIONS, *DIRECTIONS, *ACTIONS, "moves", "on"]
    )
)

Kind = Literal["image", "video"]


@dataclass(frozen=True)
class Item:
    """One object of a scene; ``placement`` is a position (image) or a motion (video)."""

    color: str
    shape: str
    placement: str


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for; a background of None leaves the choice to the noise."""

    items: tuple[Item, ...]
    background: str | None


@dataclass(frozen=True)
class TextEmbedding:
    """Stand-in for a text encoder's output."""

    embeds: torch.Tensor  # [B, TEXT_LENGTH, TEXT_DIM] float32, zero after the last word
    pooled: torch.Tensor  # [B, TEXT_DIM] float32, mean over the words
    mask: torch.Tensor  # [B, TEXT_LENGTH] float32, 1 for words and 0 for padding


def words_of(prompt: str) -> list[str]:
    """Split a prompt into vocabulary words; a word outside the vocabulary is a ValueError."""
    words = prompt.lower().replace(",", " ").split()
    for word in words:
        if word not in VOCABULARY:
            raise ValueError(
                f"unknown word {word!r} in prompt {prompt!r}; known words: {', '.join(VOCABULARY)}"
            )
    return words


def parse_prompt(prompt: str, kind: Kind) -> Scene:
    """Read a prompt of the given kind; one that does not follow the grammar is a ValueError."""
    words = words_of(prompt)
    background = None
    if len(words) >= 2 and words[-2] == "on":
        background = words[-1]
        words = words[:-2]
    items = _image_items(words) if kind == "image" else _video_items(words)
    if items is None or (background is not None and background not in BACKGROUNDS):
        raise ValueError(f"cannot read {kind} prompt {prompt!r}; expected {_grammar(kind)}")
    return Scene(items, background)


def _grammar(kind: Kind) -> str:
    colors, shapes = "|".join(COLORS), "|".join(SHAPES)
    background = f"[on {'|'.join(BACKGROUNDS)}]"
    if kind == "image":
        return (
            f"one or two of '<color> <shape> <position>' and {background}, "
            f"with color {colors}, shape {shapes}, position {'|'.join(POSITIONS)}"
        )
    return (
        f"'<color> <shape> <motion>' and {background}, "
        f"with color {colors}, shape {shapes}, motion {' | '.join(MOTIONS)}"
    )


def _image_items(words: list[str]) -> tuple[Item, ...] | None:
    if len(words) not in (3, 6):
        return None
    items = tuple(Item(*words[i : i + 3]) for i in range(0, len(words), 3))
    known = all(i.color in COLORS and i.shape in SHAPES and i.placement in POSITIONS for i in items)
    return items if known else None


def _video_items(words: list[str]) -> tuple[Item, ...] | None:
    if len(words) not in (3, 4):
        return None
    item = Item(words[0], words[1], " ".join(words[2:]))
    known = item.color in COLORS and item.shape in SHAPES and item.placement in MOTIONS
    return (item,) if known else None


def encode_prompts(prompts: list[str]) -> TextEmbedding:
    """Embed prompts: vector of the word + vector of its place; the empty prompt is all zeros.

    The table is ``torch.randn(len(VOCABULARY) + TEXT_LENGTH, TEXT_DIM)`` from ``TEXT_SEED``.
    """
    generator = torch.Generator().manual_seed(TEXT_SEED)
    table = torch.randn(len(VOCABULARY) + TEXT_LENGTH, TEXT_DIM, generator=generator)
    embeds = torch.zeros(len(prompts), TEXT_LENGTH, TEXT_DIM)
    mask = torch.zeros(len(prompts), TEXT_LENGTH)
    for row, prompt in enumerate(prompts):
        words = words_of(prompt)
        if len(words) > TEXT_LENGTH:
            raise ValueError(
                f"prompt {prompt!r} has {len(words)} words; at most {TEXT_LENGTH} are possible"
            )
        for place, word in enumerate(words):
            embeds[row, place] = table[VOCABULARY.index(word)] + table[len(VOCABULARY) + place]
            mask[row, place] = 1.0
    pooled = embeds.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1.0)
    return TextEmbedding(embeds, pooled, mask)


def random_prompts(kind: Kind, count: int, generator: torch.Generator) -> list[str]:
    """Draw ``count`` prompts; about half of the images have two objects on opposite sides."""
    return [_random_prompt(kind, generator) for _ in range(count)]


def _random_prompt(kind: Kind, generator: torch.Generator) -> str:
    placements = tuple(POSITIONS) if kind == "image" else MOTIONS
    placement = _choose(placements, generator)
    prompt = f"{_choose(tuple(COLORS), generator)} {_choose(SHAPES, generator)} {placement}"
    if kind == "image" and placement in OPPOSITE and _uniform(0, 1, generator) < 0.6:
        color, shape = _choose(tuple(COLORS), generator), _choose(SHAPES, generator)
        prompt += f", {color} {shape} {OPPOSITE[placement]}"
    if _uniform(0, 1, generator) < 0.8:
        prompt += f" on {_choose(tuple(BACKGROUNDS), generator)}"
    return prompt


def draw_images(prompts: list[str], generator: torch.Generator) -> torch.Tensor:
    """Draw one image per prompt -> [B, 3, IMAGE_SIZE, IMAGE_SIZE] float32 in [0, 1]."""
    return _draw([parse_prompt(p, "image") for p in prompts], 1, IMAGE_SIZE, generator)[:, 0]


def draw_videos(
    prompts: list[str], generator: torch.Generator, frames: int = VIDEO_FRAMES
) -> torch.Tensor:
    """Draw one video per prompt -> [B, frames, 3, VIDEO_SIZE, VIDEO_SIZE] in [0, 1].

    A motion takes the whole video: with more frames it is slower.
    """
    scenes = [parse_prompt(p, "video") for p in prompts]
    return _draw(scenes, frames, VIDEO_SIZE, generator)


def _draw(scenes: list[Scene], frames: int, size: int, generator: torch.Generator) -> torch.Tensor:
    slots = max(len(scene.items) for scene in scenes)
    shape = torch.zeros(len(scenes), slots, dtype=torch.long)  # [B, K]
    color = torch.zeros(len(scenes), slots, 3)  # [B, K, 3]
    track = torch.full((len(scenes), slots, frames, 3), -1.0)  # [B, K, F, (x, y, radius)]
    background = torch.zeros(len(scenes), 3)
    for row, scene in enumerate(scenes):
        name = scene.background or _choose(tuple(BACKGROUNDS), generator)
        background[row] = _shade(BACKGROUNDS[name], generator)
        for slot, item in enumerate(scene.items):
            shape[row, slot] = SHAPES.index(item.shape)
            color[row, slot] = _shade(COLORS[item.color], generator)
            track[row, slot] = _track(item, len(scene.items), frames, generator)
    return _render(shape, color, track, background, size)


def _track(item: Item, items: int, frames: int, generator: torch.Generator) -> torch.Tensor:
    """Centre and radius in every frame, in units of the picture's side -> [F, 3]."""
    if item.placement in POSITIONS:
        x, y = (p + _uniform(-0.015, 0.015, generator) for p in POSITIONS[item.placement])
        size = _uniform(0.17, 0.19, generator) if items == 2 else _uniform(0.22, 0.25, generator)
        return torch.tensor([x, y, size]).expand(frames, 3)
    u = torch.linspace(0.0, 1.0, frames)
    if item.placement in ("grows", "shrinks"):
        small, large = _uniform(0.10, 0.12, generator), _uniform(0.33, 0.36, generator)
        start, end = (small, large) if item.placement == "grows" else (large, small)
        x, y = _uniform(0.48, 0.52, generator), _uniform(0.48, 0.52, generator)
        return torch.stack([x + 0 * u, y + 0 * u, start + (end - start) * u], dim=-1)
    radius = _uniform(0.17, 0.20, generator) + 0 * u
    if item.placement == "bounces":
        return torch.cat([_bounce(u, generator), radius[:, None]], dim=-1)
    return torch.cat([_slide(item.placement, u, generator), radius[:, None]], dim=-1)


def _bounce(u: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A ball's hops across the picture, from left to right -> [F, 2]."""
    x = 0.5 + _uniform(0.24, 0.28, generator) * (2 * u - 1)
    height, phase = _uniform(0.43, 0.47, generator), _uniform(0.0, 0.08, generator)
    y = 0.78 - height * torch.sin(math.pi * (1.5 * u + phase)).abs()
    return torch.stack([x, y], dim=-1)


def _slide(motion: str, u: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A straight path through the middle in the direction the motion names -> [F, 2]."""
    dx, dy = DIRECTIONS[motion.split()[1]]
    along = _uniform(0.53, 0.59, generator) * (u - 0.5) + _uniform(-0.015, 0.015, generator)
    across = _uniform(-0.03, 0.03, generator)
    return torch.stack([0.5 + dx * along + dy * across, 0.5 + dy * along + dx * across], dim=-1)


def _render(
    shape: torch.Tensor,  # [B, K] index into SHAPES
    color: torch.Tensor,  # [B, K, 3]
    track: torch.Tensor,  # [B, K, F, 3]
    background: torch.Tensor,  # [B, 3]
    size: int,
) -> torch.Tensor:
    """Paint the objects in order, with edges one pixel soft -> [B, F, 3, size, size]."""
    frames = track.shape[2]
    axis = (torch.arange(size) + 0.5) / size
    video = background[:, None, :, None, None].expand(-1, frames, -1, size, size)
    for slot in range(shape.shape[1]):
        x = axis[None, None, None, :] - track[:, slot, :, 0, None, None]  # [B, F, 1, W]
        y = axis[None, None, :, None] - track[:, slot, :, 1, None, None]  # [B, F, H, 1]
        distance = _distance(shape[:, slot], x, y, track[:, slot, :, 2, None, None])
        cover = (0.5 - distance * size).clamp(0.0, 1.0)[:, :, None]  # [B, F, 1, H, W]
        video = torch.lerp(video, color[:, slot, None, :, None, None].expand_as(video), cover)
    return video


def _distance(
    shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor
) -> torch.Tensor:
    """Signed distance to each object's outline, negative inside -> [B, F, H, W]."""
    length = torch.sqrt(x * x + y * y)
    absx, absy = x.abs().expand_as(length), y.abs().expand_as(length)
    slope = math.sqrt(3.0) / 2.0 * absx - 0.5 * y  # right and left side of the triangle
    bar = 0.36 * radius
    choices = [
        length - radius,
        torch.maximum(absx, absy) - 0.88 * radius,
        torch.maximum(slope, y.expand_as(length)) - 0.58 * radius,
        (length - 0.76 * radius).abs() - 0.26 * radius,
        torch.minimum(
            torch.maximum(absx - radius, absy - bar), torch.maximum(absy - radius, absx - bar)
        ),
    ]
    stacked = torch.stack(choices, dim=1)  # [B, shapes, F, H, W]
    return stacked[torch.arange(len(shape)), shape]


def _shade(color: tuple[float, float, float], generator: torch.Generator) -> torch.Tensor:
    jitter = 0.06 * (torch.rand(3, generator=generator) - 0.5)
    light = 1.0 + 0.12 * (_uniform(0, 1, generator) - 0.5)
    return (torch.tensor(color) * light + jitter).clamp(0.0, 1.0)


def _choose(options: tuple[str, ...], generator: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand(1, generator=generator))

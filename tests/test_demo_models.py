"""The shipped models draw what they are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dicache.demo import pipelines, shapes

NAMES = (*pipelines.DEMO_MODELS, *pipelines.LONG_MODELS.values())


def drawn(name: str, prompts: list[str]) -> Tensor:
    """What the training data shows for these prompts."""
    row, generator = pipelines.demo_model(name), torch.Generator().manual_seed(0)
    if row.frames is None:
        return shapes.draw_images(prompts, generator)
    return shapes.draw_videos(prompts, generator, row.frames)


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_is_nearest_to_its_own_prompts(name: str) -> None:
    prompts = pipelines.default_prompts(name)[:4]
    pipe = pipelines.load_pipeline(name)
    pictures = pipelines.decode(name, pipe(**pipelines.pipeline_inputs(name, prompts, 0, 12)))
    wanted = drawn(name, prompts)
    assert pictures.shape == wanted.shape
    distances = (pictures[:, None] - wanted).square().flatten(2).mean(-1)  # [picture, prompt]
    assert distances.argmin(-1).tolist() == list(range(len(prompts)))
    assert distances.diagonal().max() < 0.03


@pytest.mark.parametrize("name", pipelines.LONG_MODELS.values())
def test_long_videos_move_as_their_prompt_says(name: str) -> None:
    """The object's column, weighted by how red the picture is there, goes from left to right."""
    pipe = pipelines.load_pipeline(name)
    inputs = pipelines.pipeline_inputs(name, "red circle moves right on black", 3, 12)
    video = pipelines.decode(name, pipe(**inputs))[0]  # [F, 3, H, W]
    assert len(video) == shapes.LONG_VIDEO_FRAMES
    red = (video[:, 0] - video[:, 2]).clamp(min=0.2) - 0.2
    weight = red.sum(dim=1)  # [F, W]
    column = (weight * torch.arange(weight.shape[1])).sum(-1) / weight.sum(-1)
    steps = column.diff()
    assert column[-1] - column[0] > 7
    assert (steps > -0.7).all()


def test_a_model_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="unknown demo model 'sora'.*wan-long"):
        pipelines.demo_model("sora")

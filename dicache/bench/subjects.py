"""What is drawn: the models that ship with the package, or any pipeline of the user's.

A subject travels to worker processes, so it holds names and numbers, and loads its pipeline there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor, nn

from dicache.demo import pipelines, shapes
from dicache.driver.families import find_family


class Subject(Protocol):
    """A pipeline with a prompt for every seed."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """For files and titles."""
        ...

    @property
    def steps(self) -> int:
        """Denoising steps of an un-cached run."""
        ...

    @property
    def sibling(self) -> tuple[str, int] | None:
        """The real model that it is small for, with the number of its blocks."""
        ...

    def load(self) -> Any:
        """The pipeline."""
        ...

    def inputs(self, seed: int) -> dict[str, Any]:
        """Arguments of a call, anew for every call."""
        ...

    def decode(self, output: Any) -> Tensor:
        """The one picture [3, H, W] or video [F, 3, H, W] of a result, in [0, 1], on the CPU."""
        ...


_SIBLINGS = {"flux": ("FLUX.1", 57), "hunyuan-video": ("HunyuanVideo", 60), "wan": ("Wan 2.1", 30)}
_STEPS = {"flux": 30, "hunyuan-video": 50, "wan": 50}
_PRESETS = {
    "FluxTransformer2DModel": ("flux", "flux-delta-minus"),
    "HunyuanVideoTransformer3DModel": ("hunyuan-video",),
    "WanTransformer3DModel": ("wan2.1",),
}


@dataclass(frozen=True)
class ShippedModel:
    """A small trained model of this package; the seed makes up the prompt, too."""

    name: str
    given_steps: int | None = None

    @property
    def steps(self) -> int:
        return self.given_steps or _STEPS[self.name]

    @property
    def sibling(self) -> tuple[str, int] | None:
        return _SIBLINGS[self.name]

    def load(self) -> Any:
        return pipelines.load_pipeline(self.name)

    def inputs(self, seed: int) -> dict[str, Any]:
        kind = pipelines.demo_model(self.name).kind
        prompt = shapes.random_prompts(kind, 1, torch.Generator().manual_seed(seed))[0]
        return pipelines.pipeline_inputs(self.name, prompt, seed, self.steps)

    def decode(self, output: Any) -> Tensor:
        return pipelines.decode(self.name, output)[0]


@dataclass(frozen=True)
class UserPipeline:
    """A pipeline of the user's; prompts take turns over the seeds.

    Attributes:
        loader: Loads it.
        prompts: At least one.
        arguments: Of the pipeline's call, as names and values.
    """

    name: str
    loader: Callable[[], Any]
    prompts: tuple[str, ...]
    steps: int
    arguments: tuple[tuple[str, Any], ...] = ()
    sibling: tuple[str, int] | None = None

    def load(self) -> Any:
        return self.loader()

    def inputs(self, seed: int) -> dict[str, Any]:
        return {
            "prompt": self.prompts[seed % len(self.prompts)],
            "generator": torch.Generator().manual_seed(seed),
            "num_inference_steps": self.steps,
            "output_type": "pt",
            **dict(self.arguments),
        }

    def decode(self, output: Any) -> Tensor:
        for name in ("images", "frames"):
            batch = getattr(output, name, None)
            if isinstance(batch, Tensor):
                return batch[0].float().cpu().clamp(0, 1)
        raise ValueError(
            f"The pipeline returned a {type(output).__name__} without pictures. Expected `images` "
            f"or `frames`, as output_type='pt' gives them."
        )


def transformers_of(pipe: Any) -> list[nn.Module]:
    """The models of a pipeline that a cache goes on: one, or two experts."""
    parts = pipe.components.values()
    found = [part for part in parts if isinstance(part, nn.Module) and find_family(part)]
    if not found:
        raise ValueError(f"No model of {type(pipe).__name__} is in a family that dicache knows.")
    return found


def presets_for(pipe: Any) -> tuple[str, ...]:
    """The published rules that belong to the pipeline's model."""
    return _PRESETS.get(type(transformers_of(pipe)[0]).__name__, ())


@functools.lru_cache(maxsize=1)
def loaded(subject: Subject) -> Any:
    """The subject's pipeline, once a process, and silent."""
    diffusers.utils.logging.set_verbosity_error()
    pipe = subject.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe

"""What the documentation's code takes for granted, made of small models that are here.

Where a page draws with a published model, a shipped one stands in its place: seeds and output types
are the page's, prompts and sizes the model's, and a run has at most 12 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import original_models
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from tiny_models import build
from tiny_pipelines import ControlVae, control_net_for, text

from dicache import DiCacheConfig, apply_dicache, ops
from dicache.demo.pipelines import decode, default_prompts, load_pipeline, pipeline_inputs
from dicache.driver import families

MOST_STEPS = 12
Stage = Callable[[], dict[str, Any]]


def shipped(name: str) -> Any:
    """A demo pipeline that is called like a published one."""
    pipe: Any = load_pipeline(name)  # type: ignore[arg-type, unused-ignore]

    class Shipped(type(pipe)):
        def __call__(
            self,
            prompt: str | list[str],
            num_inference_steps: int,
            generator: torch.Generator | None = None,
            output_type: str = "pil",
            callback_on_step_end: Any = None,
            negative_prompt: str | None = None,
        ) -> SimpleNamespace:
            many = isinstance(prompt, list)
            prompts = default_prompts(name)[: len(prompt) if many else 1]
            seed = 0 if generator is None else generator.initial_seed()
            given = pipeline_inputs(name, prompts, seed, min(num_inference_steps, MOST_STEPS))
            given["callback_on_step_end"] = callback_on_step_end
            pictures = decode(name, super().__call__(**given))
            if output_type == "pil":
                pictures = [Image.fromarray(each.numpy()) for each in _bytes(pictures)]
            return SimpleNamespace(images=pictures, frames=pictures)

        def to(self, *_: Any, **__: Any) -> Any:
            return self

        def enable_model_cpu_offload(self) -> None:
            """There is no other device."""

        def load_lora_weights(self, _: str, adapter_name: str) -> None:
            layers = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
            self.transformer.add_adapter(layers, adapter_name)

    pipe.__class__ = Shipped
    return pipe


def _bytes(pictures: torch.Tensor) -> torch.Tensor:
    flat = pictures if pictures.ndim == 4 else pictures[:, 0]  # of a video its first frame
    return (255 * flat).byte().permute(0, 2, 3, 1).contiguous()


def _pipe(name: str = "flux") -> dict[str, Any]:
    return {"pipe": shipped(name)}


def _drawn() -> dict[str, Any]:
    """Behind a run with the cache."""
    names = _pipe()
    apply_dicache(names["pipe"])
    names["pipe"]("a lighthouse", num_inference_steps=MOST_STEPS)
    return names


def _calibrated() -> dict[str, Any]:
    pipe = shipped("flux")

    def run(index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        images: torch.Tensor = pipe("", 8, generator=generator, output_type="pt").images
        return images

    return {"pipe": pipe, "run": run, "prompts": ["a lighthouse", "a storm"]}


def _controlled() -> dict[str, Any]:
    return {"edges": torch.rand(1, 3, 64, 64), **_pipe()}


def _original() -> dict[str, Any]:
    sampler = original_models.HunyuanVideoSampler(original_models.build("hunyuan"))
    wan = original_models.WanT2V(model=original_models.build("wan"))
    args = SimpleNamespace(sample_steps=6)
    return {"hunyuan_video_sampler": sampler, "wan_t2v": wan, "args": args}


def _loop() -> dict[str, Any]:
    blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def through(blocks: Any, tokens: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            tokens = tokens + 0.1 * torch.tanh(block(tokens))
        return tokens

    return {
        "timesteps": torch.linspace(1.0, 0.05, 20).tolist(),
        "x": torch.randn(1, 4, 8),
        "probe_blocks": partial(through, blocks[:1]),
        "remaining_blocks": partial(through, blocks[1:]),
        "scheduler_step": lambda x, y, t: x - 0.05 * (y - x),
    }


def _window() -> dict[str, Any]:
    """Of two recorded steps."""
    names: dict[str, Any] = dict(zip("xpy", torch.randn(3, 2, 16, 8), strict=True))
    names |= {"residual_window": torch.zeros(2, 2, 16, 8), "probe_window": torch.zeros(2, 2, 16, 8)}
    names |= {"newest": torch.zeros(2, dtype=torch.int32), "entry_sums": torch.zeros(2, 4)}
    for first in (True, False):
        ops.record_residuals(**names, first=first)
        names |= dict(zip("xpy", torch.randn(3, 2, 16, 8), strict=True))
    return names


def _adapter() -> dict[str, Any]:
    model = build("flux")
    return {"model": model, "family": families.find_family(model), "config": DiCacheConfig()}


STAGES: dict[str, Stage] = {
    "docs/calibration.md": _calibrated,
    "docs/choosing.md": _calibrated,
    "docs/coming_from.md": _pipe,
    "docs/compile.md": _pipe,
    "docs/controlnet_lora.md": _controlled,
    "docs/design/adapters.md": _adapter,
    "docs/extending.md": _loop,
    "docs/guidance_and_batches.md": partial(_pipe, "wan"),
    "docs/kernels.md": _window,
    "docs/memory.md": _pipe,
    "docs/original.md": _original,
    "docs/sparse_videogen.md": partial(_pipe, "hunyuan-video-long"),
    "docs/troubleshooting.md": _drawn,
}


def set_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put small models in the place of published ones, and let nothing stay."""
    monkeypatch.setattr(families, "_FAMILIES", [*families._FAMILIES])
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for name, model in (
        ("FluxPipeline", "flux"),
        ("HunyuanVideoPipeline", "hunyuan-video"),
        ("WanPipeline", "wan"),
    ):
        monkeypatch.setattr(
            getattr(diffusers, name),
            "from_pretrained",
            lambda *_, model=model, **__: shipped(model),
        )
    net = diffusers.FluxControlNetModel
    monkeypatch.setattr(net, "from_pretrained", lambda *_: control_net_for(build("flux"), 0.1))
    monkeypatch.setattr(diffusers.FluxControlNetPipeline, "from_pretrained", _control_pipeline)


def _control_pipeline(_: str, controlnet: Any) -> Any:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    models = {"vae": ControlVae(), "transformer": build("flux"), "controlnet": controlnet}
    pipe = diffusers.FluxControlNetPipeline(**parts, **models, scheduler=scheduler)

    class Controlled(diffusers.FluxControlNetPipeline):
        def __call__(self, prompt: str, **given: Any) -> Any:
            embeddings = {"prompt_embeds": text(0), "pooled_prompt_embeds": text(0)[:, 0]}
            size = {"height": 64, "width": 64, "output_type": "latent"}
            return super().__call__(**embeddings, **size, **given)

    pipe.__class__ = Controlled
    pipe.set_progress_bar_config(disable=True)
    return pipe

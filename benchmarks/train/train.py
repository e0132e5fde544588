"""Train one of the package's demo models and export it into dicache/demo/models/.

Rectified flow on the drawn shapes: x_t = (1 - t) x0 + t noise, the model predicts noise - x0, t is
logit-normal. Muon for the matrices of the blocks and AdamW for the rest, with warm-up and cosine
decay; an exponential moving average of the weights is what gets exported, as fp16. A checkpoint
under .train/ is replaced every few minutes, so that ``--resume`` continues where a killed run
stopped. See README.md for the recipe.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image

from dicache.demo import pipelines, shapes

_scaled_dot_product_attention = F.scaled_dot_product_attention
ROOT = Path(__file__).resolve().parents[2]
WARMUP_STEPS = 100
EMA_DECAY = 0.999
PROMPT_DROPOUT = {"flux": 0.0, "hunyuan-video": 0.0, "wan": 0.15}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "flux": {
        "in_channels": 48,
        "num_layers": 3,
        "num_single_layers": 6,
        "attention_head_dim": 24,
        "num_attention_heads": 4,
        "joint_attention_dim": shapes.TEXT_DIM,
        "pooled_projection_dim": shapes.TEXT_DIM,
        "guidance_embeds": False,
        "axes_dims_rope": (8, 8, 8),
    },
    "hunyuan-video": {
        "in_channels": 12,
        "out_channels": 12,
        "num_layers": 3,
        "num_single_layers": 6,
        "num_refiner_layers": 1,
        "attention_head_dim": 24,
        "num_attention_heads": 4,
        "text_embed_dim": shapes.TEXT_DIM,
        "pooled_projection_dim": shapes.TEXT_DIM,
        "guidance_embeds": False,
        "rope_axes_dim": (8, 8, 8),
    },
    "wan": {
        "in_channels": 12,
        "out_channels": 12,
        "num_layers": 9,
        "attention_head_dim": 24,
        "num_attention_heads": 4,
        "text_dim": shapes.TEXT_DIM,
        "ffn_dim": 384,
        "rope_max_seq_len": 32,
    },
}


@dataclass
class Recipe:
    """How long and on what batches a model is trained, and whose shipped weights it begins with."""

    steps: int
    batch: int
    learning_rate: float = 2e-3
    seconds: float = math.inf
    begins_with: str | None = None

    def progress(self, step: int, seconds: float) -> float:
        """Share of the training that is over, by steps or by the clock, in [0, 1]."""
        return min(1.0, max(step / self.steps, seconds / self.seconds))


RECIPES = {
    "flux": Recipe(steps=3000, batch=64),
    "hunyuan-video": Recipe(steps=2500, batch=24),
    "wan": Recipe(steps=2500, batch=24),
    # Longer videos of the same kind: as many tokens a batch, and most is known already.
    "hunyuan-video-long": Recipe(steps=2200, batch=8, begins_with="hunyuan-video"),
    "wan-long": Recipe(steps=2000, batch=8, begins_with="wan"),
}


@dataclass
class State:
    """All that a checkpoint holds."""

    model: Any
    ema: Any
    muon: torch.optim.Muon
    adamw: torch.optim.AdamW
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint beside ``path``, then replace ``path`` in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {k: getattr(self, k).state_dict() for k in ("model", "ema", "muon", "adamw")}
        parts |= {"step": self.step, "seconds": self.seconds}
        parts |= {"generator": self.generator.get_state()}
        torch.save(parts, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path) -> None:
        """Continue from the checkpoint at ``path``."""
        parts = torch.load(path, weights_only=True)
        for key in ("model", "ema", "muon", "adamw"):
            getattr(self, key).load_state_dict(parts[key])
        self.generator.set_state(parts["generator"])
        self.step, self.seconds = parts["step"], parts["seconds"]


def new_state(name: str, seed: int, learning_rate: float) -> State:
    """Build a model, with its EMA, optimiser and generator."""
    row, begins_with = pipelines.demo_model(name), RECIPES[name].begins_with
    torch.manual_seed(seed)
    model = row.transformer(**ARCHITECTURES[row.family])
    if begins_with is not None:
        model.load_state_dict(pipelines.load_transformer(begins_with).state_dict())
    elif row.family != "wan":
        torch.nn.init.zeros_(model.proj_out.weight)
        torch.nn.init.zeros_(model.proj_out.bias)
    hidden = [p for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2]
    others = [p for n, p in model.named_parameters() if "blocks" not in n or p.dim() != 2]
    muon = torch.optim.Muon(
        hidden, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    return State(model, copy.deepcopy(model).requires_grad_(False), muon, adamw, generator)


def draw_batch(
    name: str, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, shapes.TextEmbedding]:
    """Draw clean latents and the embedding of their prompts (some dropped, for guidance)."""
    row = pipelines.demo_model(name)
    prompts = shapes.random_prompts(row.kind, batch, generator)
    if row.frames is None:
        pictures = shapes.draw_images(prompts, generator)
    else:
        pictures = shapes.draw_videos(prompts, generator, row.frames)
    latents = pipelines.encode_pictures(name, pictures).contiguous()
    drop = torch.rand(batch, generator=generator) < PROMPT_DROPOUT[row.family]
    kept = ["" if d else p for d, p in zip(drop.tolist(), prompts, strict=True)]
    return latents, shapes.encode_prompts(kept)


def velocity(
    name: str, model: Any, x: torch.Tensor, t: torch.Tensor, text: shapes.TextEmbedding
) -> torch.Tensor:
    """Call the transformer as its pipeline does; ``t`` in [0, 1] -> tensor of x's shape."""
    family = pipelines.demo_model(name).family
    inputs: dict[str, Any] = {"hidden_states": x, "encoder_hidden_states": text.embeds}
    if family == "flux":
        side = math.isqrt(x.shape[1])
        row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        inputs["img_ids"] = torch.stack([0 * row, row, column], dim=-1).flatten(0, 1).float()
        inputs["txt_ids"] = torch.zeros(shapes.TEXT_LENGTH, 3)
    if family != "wan":
        inputs["pooled_projections"] = text.pooled
    if family == "hunyuan-video":
        inputs["encoder_attention_mask"] = text.mask
    timestep = t if family == "flux" else 1000 * t
    output: torch.Tensor = model(**inputs, timestep=timestep, return_dict=False)[0]
    return output


def flow_loss(name: str, model: Any, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted velocity on one freshly drawn batch."""
    x0, text = draw_batch(name, batch, generator)
    noise = pipelines.noise_mean(name) + torch.randn(x0.shape, generator=generator)
    t = torch.sigmoid(
        torch.randn(batch, generator=generator) + math.log(pipelines.demo_model(name).flow_shift)
    )
    weight = t.view(-1, *[1] * (x0.dim() - 1))
    prediction = velocity(name, model, (1 - weight) * x0 + weight * noise, t, text)
    return F.mse_loss(prediction.float(), noise - x0)


def attend_in_float32(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Scaled dot-product attention outside autocast: on CPUs its bfloat16 backward is slow."""
    with torch.autocast("cpu", enabled=False):
        floats = (x.float() for x in (query, key, value))
        return _scaled_dot_product_attention(*floats, **options).to(query.dtype)


def learning_rate_at(step: int, progress: float, peak: float) -> float:
    """Linear warm-up over the first steps, then cosine decay to 2 % of the peak."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * cosine * min(1.0, (step + 1) / WARMUP_STEPS)


def train_step(name: str, state: State, recipe: Recipe, dtype: torch.dtype) -> float:
    """One optimiser step and EMA update; returns the loss."""
    progress = recipe.progress(state.step, state.seconds)
    for group in state.muon.param_groups + state.adamw.param_groups:
        group["lr"] = learning_rate_at(state.step, progress, recipe.learning_rate)
    bf16 = dtype == torch.bfloat16
    attention = attend_in_float32 if bf16 else _scaled_dot_product_attention
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
    ):
        loss = flow_loss(name, state.model, recipe.batch, state.generator)
    state.model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.muon.step()
    state.adamw.step()
    state.step += 1
    decay = min(EMA_DECAY, (1 + state.step) / (10 + state.step))
    torch._foreach_lerp_(
        list(state.ema.parameters()), list(state.model.parameters()), weight=1 - decay
    )
    return float(loss.detach())


def export(name: str, model: Any, out: Path) -> None:
    """Write config.json and fp16 safetensors to ``out``/``name``; a threshold there is kept."""
    model = copy.deepcopy(model).half()
    if (out / name / "config.json").exists():
        old = pipelines.demo_model(name).transformer.load_config(out / name)
        if "_dicache_threshold" in old:
            model.register_to_config(_dicache_threshold=old["_dicache_threshold"])
    model.save_pretrained(out / name)
    for path in (out / name).iterdir():
        path.chmod(0o644)


def sample_sheet(name: str, model: Any, path: Path, steps: int, zoom: int = 4) -> None:
    """Sample the default prompts with the real pipeline and save them enlarged as a PNG."""
    prompts = pipelines.default_prompts(name)
    pipe = pipelines.wrap_transformer(name, model)
    pictures = pipelines.decode(name, pipe(**pipelines.pipeline_inputs(name, prompts, 0, steps)))
    if pipelines.demo_model(name).kind == "image":
        rows = pictures.unflatten(0, (-1, 4)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    else:
        rows = pictures.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [B * H, F * W, 3]
    image = Image.fromarray((255 * rows).round().byte().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)


def train(name: str, args: argparse.Namespace) -> None:
    """Train to the end, with checkpoints, sample sheets and a line of progress now and then."""
    recipe = RECIPES[name]
    recipe.steps, recipe.batch = args.steps or recipe.steps, args.batch or recipe.batch
    recipe.seconds = 60 * args.minutes
    state = new_state(name, args.seed, recipe.learning_rate)
    checkpoint = args.work / f"{name}.pt"
    if args.resume and checkpoint.exists():
        state.load(checkpoint)
    if args.compile:
        state.model.compile_repeated_blocks()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    average, last_save, last_tick = 0.0, time.monotonic(), time.monotonic()
    while recipe.progress(state.step, state.seconds) < 1:
        loss = train_step(name, state, recipe, dtype)
        average = loss if average == 0 else 0.98 * average + 0.02 * loss
        state.seconds += time.monotonic() - last_tick
        last_tick = time.monotonic()
        if state.step % 20 == 0:
            print(f"{name} step {state.step} loss {average:.4f} {state.seconds:.0f} s", flush=True)
        if last_tick - last_save > args.save_every:
            state.save(checkpoint)
            sample_sheet(name, state.ema, args.work / f"{name}.png", steps=20)
            last_save = time.monotonic()
    state.save(checkpoint)
    export(name, state.ema, args.out)
    exported = pipelines.demo_model(name).transformer.from_pretrained(
        args.out / name, dtype=torch.float32
    )
    sample_sheet(name, exported, args.work / f"{name}.png", steps=30)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, choices=RECIPES)
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end after so long, decay included"
    )
    parser.add_argument("--batch", type=int, help="batch size (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=pipelines.MODEL_DIR, help="export folder")
    parser.add_argument("--work", type=Path, default=ROOT / ".train", help="checkpoint folder")
    parser.add_argument("--save-every", type=float, default=240, help="seconds")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.model, args)


if __name__ == "__main__":
    main()

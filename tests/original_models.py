"""Stand-ins for the original classes of HunyuanVideo, Wan 2.1 and Wan 2.2.

They have the names, modules, arguments and returns of the repositories' classes, as those call each
other: positional blocks, the image first in single blocks, lists in and out, tokens padded with
zeros, dtypes that grow under autocast. What they compute is smooth and of no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, CHANNELS, TEXT_WIDTH = 16, 4, 8


class MMDoubleStreamBlock(nn.Module):
    __module__ = "hyvideo.modules.models"

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.hybrid_seq_parallel_attn = None

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert cu_seqlens_q is not None and len(cu_seqlens_q) == 2 * len(img) + 1
        whole = img.mean(1, keepdim=True)
        if self.hybrid_seq_parallel_attn is not None:  # of the parts of all ranks
            whole = self.hybrid_seq_parallel_attn(whole)
        mixed = vec[:, None] + txt.mean(1, keepdim=True) + whole
        return img + 0.3 * (self.image(img) + mixed).sin(), txt + 0.1 * (
            self.text(txt) + mixed
        ).sin()


class MMSingleStreamBlock(nn.Module):
    __module__ = "hyvideo.modules.models"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.hybrid_seq_parallel_attn = None

    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        txt_len: int,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        text = x[:, -txt_len:].mean(1, keepdim=True)
        return x + 0.3 * (self.linear(x) + vec[:, None] + text).sin()


class HYVideoDiffusionTransformer(nn.Module):
    __module__ = "hyvideo.modules.models"

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(CHANNELS, WIDTH), nn.Linear(TEXT_WIDTH, WIDTH)
        self.vector_in, self.time_in = nn.Linear(TEXT_WIDTH, WIDTH), nn.Linear(1, WIDTH)
        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock() for _ in range(depth))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock() for _ in range(depth))
        self.final_layer = nn.Linear(WIDTH, CHANNELS)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text_states: Tensor,
        text_mask: Tensor | None = None,
        text_states_2: Tensor | None = None,
        freqs_cos: Tensor | None = None,
        freqs_sin: Tensor | None = None,
        guidance: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        assert text_states_2 is not None
        vec = self.time_in(t[:, None] / 1000) + self.vector_in(text_states_2)
        img = self.img_in(x.flatten(2).transpose(1, 2))
        txt = self.txt_in(text_states)
        image_length, text_length = img.shape[1], txt.shape[1]
        cumulative = torch.arange(2 * len(img) + 1) * (image_length + text_length)
        longest = image_length + text_length
        lengths = (cumulative, cumulative, longest, longest)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, *lengths, (freqs_cos, freqs_sin))
        joint = torch.cat((img, txt), 1)
        for block in self.single_blocks:
            joint = block(joint, vec, text_length, *lengths, (freqs_cos, freqs_sin))
        out = self.final_layer(joint[:, :image_length]).transpose(1, 2).reshape(x.shape)
        return {"x": out} if return_dict else out


class WanAttentionBlock(nn.Module):
    __module__ = "wan.modules.model"

    def __init__(self, widens: bool) -> None:
        super().__init__()
        self.linear, self.widens = nn.Linear(WIDTH, WIDTH), widens
        self.self_attn = nn.Identity()

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        context: Tensor,
        context_lens: Tensor | None,
    ) -> Tensor:
        shift = e[..., 0, :] if e.dim() == 4 else e[:, None, 0]
        change = self.linear(x.to(self.linear.weight.dtype)) + context.mean(1, keepdim=True)
        change = 0.3 * (change.float() + shift).sin()  # autocast's fp32: what comes out is wider
        return x + change if self.widens else (x + change).to(x.dtype)


class WanModel(nn.Module):
    """Of Wan 2.1."""

    __module__ = "wan.modules.model"
    block_class: Callable[[bool], nn.Module] = WanAttentionBlock

    def __init__(self, model_type: str = "t2v", depth: int = 5, widens: bool = False) -> None:
        super().__init__()
        self.model_type = model_type
        channels = CHANNELS if model_type == "t2v" else 2 * CHANNELS
        self.patch_embedding = nn.Linear(channels, WIDTH)
        self.text_embedding, self.time_embedding = nn.Linear(TEXT_WIDTH, WIDTH), nn.Linear(1, WIDTH)
        if model_type in ("i2v", "flf2v"):
            self.img_emb = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(self.block_class(widens) for _ in range(depth))
        self.head = nn.Linear(WIDTH, CHANNELS)

    def embed(self, x: list[Tensor], seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens padded with zeros [B, seq_len, D], how many there are of each, and their grids."""
        dtype = self.patch_embedding.weight.dtype
        tokens = [self.patch_embedding(each.flatten(1).T[None].to(dtype)) for each in x]
        lengths = torch.tensor([each.shape[1] for each in tokens])
        grids = torch.stack([torch.tensor(each.shape[1:]) for each in x])
        pads = [each.new_zeros(1, seq_len - each.shape[1], WIDTH) for each in tokens]
        padded = [torch.cat(pair, dim=1) for pair in zip(tokens, pads, strict=True)]
        return torch.cat(padded), lengths, grids

    def times(self, t: Tensor) -> Tensor:
        e = self.time_embedding(t.float()[..., None].to(self.head.weight.dtype) / 1000).float()
        return torch.stack([e * k for k in range(1, 7)], dim=-2)  # [B, 6, D], or a token each

    def texts(self, context: list[Tensor]) -> Tensor:
        longest = 7
        padded = [torch.cat([c, c.new_zeros(longest - len(c), TEXT_WIDTH)]) for c in context]
        return self.text_embedding(torch.stack(padded).to(self.head.weight.dtype))

    def unpatchify(self, x: Tensor, grids: Tensor) -> list[Tensor]:
        out = self.head(x.to(self.head.weight.dtype))
        return [
            tokens[: int(grid.prod())].T.reshape(CHANNELS, *grid.tolist()).float()
            for tokens, grid in zip(out, grids, strict=True)
        ]

    def forward(
        self,
        x: list[Tensor],
        t: Tensor,
        context: list[Tensor],
        seq_len: int,
        clip_fea: Tensor | None = None,
        y: list[Tensor] | None = None,
    ) -> list[Tensor]:
        if y is not None:
            x = [torch.cat(pair) for pair in zip(x, y, strict=True)]
        tokens, lengths, grids = self.embed(x, seq_len)
        text = self.texts(context)
        if clip_fea is not None:
            text = torch.cat([self.img_emb(clip_fea), text], dim=1)
        shared: dict[str, Any] = {"e": self.times(t), "seq_lens": lengths, "grid_sizes": grids}
        shared |= {"freqs": torch.ones(1024, 4), "context": text, "context_lens": None}
        for block in self.blocks:
            tokens = block(tokens, **shared)
        return self.unpatchify(tokens, grids)


class VaceWanAttentionBlock(nn.Module):
    __module__ = "wan.modules.vace_model"

    def __init__(self, widens: bool) -> None:
        super().__init__()
        self.base = WanAttentionBlock(widens)

    def forward(
        self, x: Tensor, hints: list[Tensor], context_scale: float = 1.0, **kwargs: Any
    ) -> Tensor:
        return self.base(x, **kwargs) + hints[0] * context_scale


class VaceWanModel(WanModel):
    __module__ = "wan.modules.vace_model"
    block_class = VaceWanAttentionBlock

    def __init__(self, **options: Any) -> None:
        super().__init__("t2v", **options)
        self.vace_embedding = nn.Linear(CHANNELS, WIDTH)

    def forward(  # type: ignore[override]
        self,
        x: list[Tensor],
        t: Tensor,
        vace_context: list[Tensor],
        context: list[Tensor],
        seq_len: int,
        vace_context_scale: float = 1.0,
        clip_fea: Tensor | None = None,
        y: list[Tensor] | None = None,
    ) -> list[Tensor]:
        tokens, lengths, grids = self.embed(x, seq_len)
        hint = 0.2 * self.vace_embedding(torch.stack([v.flatten(1).T for v in vace_context]))
        rest = hint.new_zeros(len(hint), seq_len - hint.shape[1], WIDTH)
        hint = torch.cat([hint, rest], dim=1)
        shared: dict[str, Any] = {"e": self.times(t), "seq_lens": lengths, "grid_sizes": grids}
        shared |= {"freqs": torch.ones(1024, 4), "context": self.texts(context)}
        shared |= {"context_lens": None, "hints": [hint], "context_scale": vace_context_scale}
        for block in self.blocks:
            tokens = block(tokens, **shared)
        return self.unpatchify(tokens, grids)


class _WanModel22(WanModel):
    """Of Wan 2.2: no clip_fea, and a timestep a token."""

    __module__ = "wan.modules.model"

    def forward(  # type: ignore[override]
        self,
        x: list[Tensor],
        t: Tensor,
        context: list[Tensor],
        seq_len: int,
        y: list[Tensor] | None = None,
    ) -> list[Tensor]:
        if t.dim() == 1:
            t = t[:, None].expand(len(t), seq_len)
        return super().forward(x, t, context, seq_len, None, y)


def wan_2_2(**options: Any) -> nn.Module:
    """A class called `WanModel`, too, and no other of that name above it."""
    kind = type("WanModel", (_WanModel22,), {"__module__": "wan.modules.model"})
    return kind(**options)


def build(kind: str, seed: int = 0, **options: Any) -> Any:
    """A stand-in by name, with fixed weights: hunyuan, t2v, i2v, flf2v, vace or 2.2."""
    makers: dict[str, Callable[..., nn.Module]] = {
        "hunyuan": HYVideoDiffusionTransformer,
        "vace": VaceWanModel,
        "2.2": wan_2_2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = makers[kind](**options) if kind in makers else WanModel(kind, **options)
    return model.eval().requires_grad_(False)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def branches(kind: str, batch: int = 1, seed: int = 0) -> list[dict[str, Any]]:
    """What the calls of each branch of guidance share: the same objects in every step."""
    if kind == "hunyuan":  # one batch holds both, or guidance is embedded
        text = {"text_states": _normal(batch, 5, TEXT_WIDTH, seed=seed + 1), "text_mask": None}
        pooled = {"text_states_2": _normal(batch, TEXT_WIDTH, seed=seed + 2)}
        return [{**text, **pooled, "freqs_cos": torch.ones(1), "freqs_sin": torch.ones(1)}]
    shared: dict[str, Any] = {"seq_len": 30}
    if kind in ("i2v", "flf2v"):
        shared["clip_fea"] = _normal(batch, 3, 6, seed=seed + 5)
        shared["y"] = [_normal(CHANNELS, 2, 3, 4, seed=seed + 6 + k) for k in range(batch)]
    if kind == "vace":
        shared["vace_context"] = [
            _normal(CHANNELS, 2, 3, 4, seed=seed + 7 + k) for k in range(batch)
        ]
    texts = [
        [_normal(4 + n, TEXT_WIDTH, seed=seed + n + 10 * k) for k in range(batch)] for n in (1, 2)
    ]
    return [{"context": text, **shared} for text in texts]


def steps(kind: str, num_steps: int, batch: int = 1, seed: int = 0) -> Iterator[tuple[Any, Tensor]]:
    """Latents and timestep of every step of a run: between two points, by a bent way."""
    noise, picture = (_normal(batch, CHANNELS, 2, 3, 4, seed=seed + 20 + k) for k in (0, 1))
    for share in torch.linspace(0, 1, num_steps + 1)[:-1].tolist():
        size = torch.arange(1, batch + 1).view(-1, 1, 1, 1, 1)  # samples that differ
        wave = 0.3 * size * torch.sin(4 * share + picture)
        latents = (1 - share) * noise + share * picture + wave
        time = torch.full((batch,), 1000 * (1 - share))
        yield (latents if kind == "hunyuan" else list(latents)), time


def ask(model: Any, latents: Any, time: Tensor, given: dict[str, Any], kind: str) -> Tensor:
    """One call, as the repositories make it; the latents of all samples."""
    if kind == "hunyuan":
        return model(latents, time, **given, return_dict=True)["x"]
    return torch.stack(model(latents, t=time, **given))


class Scheduler:
    """Of diffusers' kind, as Tencent's pipeline has one."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}

    def set_timesteps(self, num_steps: int) -> None:
        self.timesteps = torch.linspace(1000, 0, num_steps + 1)[:-1]
        self.step_index, self.begin_index = None, None

    def step(self) -> None:
        self.step_index = 0 if self.step_index is None else self.step_index
        self.step_index += 1


class HunyuanVideoSampler:
    """Holds a pipeline, which holds the model and the scheduler."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pipeline = SimpleNamespace(transformer=model, scheduler=Scheduler(), vae=nn.Identity())

    def predict(self, num_steps: int, seed: int = 0) -> list[Tensor]:
        scheduler, made = self.pipeline.scheduler, []
        scheduler.set_timesteps(num_steps)
        (given,) = branches("hunyuan", seed=seed)
        for (latents, _), time in zip(
            steps("hunyuan", num_steps, seed=seed), scheduler.timesteps, strict=True
        ):
            made.append(ask(self.pipeline.transformer, latents, time[None], given, "hunyuan"))
            scheduler.step()
        return made


class WanT2V:
    """Holds one model, or two experts; its scheduler is a local of `generate`."""

    def __init__(self, **models: nn.Module) -> None:
        vars(self).update(models)
        self.vae, self.param_dtype = SimpleNamespace(model=None), torch.bfloat16

    def generate(
        self, kind: str, num_steps: int, seed: int = 0, boundary: float = 500.0
    ) -> list[Tensor]:
        """The answers of both branches in every step."""
        made = []
        conditions = branches(kind, seed=seed)
        for latents, time in steps(kind, num_steps, seed=seed):
            if "model" in vars(self):
                model = self.model
            elif float(time) >= boundary:
                model = self.high_noise_model
            else:
                model = self.low_noise_model
            made += [ask(model, latents, time, given, kind) for given in conditions]
        return made

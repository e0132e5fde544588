"""Complete pipelines on disk: the shipped transformers with tiny VAEs and text encoders.

VAE and text encoders have random weights from a fixed seed, so the pictures mean nothing, but all
that `from_pretrained` and a call need is there. Vocabularies are made on the spot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    ChromaPipeline,
    CogVideoXPipeline,
    FluxPipeline,
    HunyuanVideoPipeline,
    WanPipeline,
)
from tiny_pipelines import scheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from dicache.demo.pipelines import load_pipeline
from dicache.demo.shapes import TEXT_DIM, VOCABULARY

_LATENT_CHANNELS = 12  # as the shipped transformers have it
_T5 = {
    "vocab_size": 64,
    "d_model": TEXT_DIM,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
}


def save_flux(folder: Path) -> Path:
    """A FluxPipeline; its VAE halves height and width."""
    torch.manual_seed(0)
    demo, tokenizer = load_pipeline("flux"), _clip_tokenizer()
    pipe = FluxPipeline(
        transformer=demo.transformer,
        scheduler=demo.scheduler,
        vae=_image_vae(),
        text_encoder=_clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(**_T5)),
        tokenizer_2=_t5_tokenizer(),
    )
    pipe.save_pretrained(folder)
    return folder


def save_wan(folder: Path) -> Path:
    """A WanPipeline; its VAE divides height and width by 8."""
    torch.manual_seed(0)
    demo = load_pipeline("wan")
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=_LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * _LATENT_CHANNELS,
        latents_std=[1.0] * _LATENT_CHANNELS,
    )
    pipe = WanPipeline(
        transformer=demo.transformer,
        scheduler=demo.scheduler,
        vae=vae,
        text_encoder=UMT5EncoderModel(UMT5Config(**_T5)),
        tokenizer=_t5_tokenizer(),
    )
    pipe.save_pretrained(folder)
    return folder


def save_hunyuan_video(folder: Path) -> Path:
    """A HunyuanVideoPipeline; its VAE halves all three."""
    torch.manual_seed(0)
    demo, tokenizer = load_pipeline("hunyuan-video"), _clip_tokenizer()
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=_LATENT_CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * 2,
        up_block_types=("HunyuanVideoUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=2,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    )
    llama = LlamaConfig(
        vocab_size=_T5["vocab_size"],
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=3,  # the pipeline takes the last but two
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    pipe = HunyuanVideoPipeline(
        transformer=demo.transformer,
        scheduler=demo.scheduler,
        vae=vae,
        text_encoder=LlamaModel(llama),
        # The pipeline cuts 95 tokens off the front, and its template has fewer words.
        tokenizer=_t5_tokenizer(padding_side="left"),
        text_encoder_2=_clip_encoder(tokenizer),
        tokenizer_2=tokenizer,
    )
    pipe.save_pretrained(folder)
    return folder


def save_chroma(folder: Path) -> Path:
    """A ChromaPipeline, with a transformer of random weights; its VAE halves height and width."""
    torch.manual_seed(0)
    pipe = ChromaPipeline(
        transformer=tiny_models.build("chroma"),
        scheduler=scheduler("chroma"),
        vae=_image_vae(4),
        text_encoder=_tiny_t5(),
        tokenizer=_t5_tokenizer(),
    )
    pipe.save_pretrained(folder)
    return folder


def save_cogvideox(folder: Path) -> Path:
    """A CogVideoXPipeline, with a transformer of random weights; its VAE halves all three."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=2,
    )
    pipe = CogVideoXPipeline(
        transformer=tiny_models.build("cogvideox", max_text_seq_length=226),  # the call's default
        scheduler=scheduler("cogvideox"),
        vae=vae,
        text_encoder=_tiny_t5(),
        tokenizer=_t5_tokenizer(),
    )
    pipe.save_pretrained(folder)
    return folder


def _tiny_t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(**{**_T5, "d_model": tiny_models.TEXT_WIDTH}))


def _image_vae(channels: int = _LATENT_CHANNELS) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)


def _clip_encoder(tokenizer: Any) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,  # what HunyuanVideo pads to
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def _t5_tokenizer(**options: Any) -> T5TokenizerFast:
    words = [("▁" + word, -1.0) for word in VOCABULARY]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    return T5TokenizerFast(vocab=special + words, extra_ids=0, **options)

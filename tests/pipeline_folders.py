"""Complete pipelines on disk: the shipped transformers with tiny VAEs and text encoders.

VAE and text encoders have random weights from a fixed seed, so the pictures mean nothing, but all
that `from_pretrained` and a call need is there. Vocabularies are made on the spot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, FluxPipeline, WanPipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
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


def _image_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=_LATENT_CHANNELS,
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
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def _t5_tokenizer() -> T5TokenizerFast:
    words = [("▁" + word, -1.0) for word in VOCABULARY]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    return T5TokenizerFast(vocab=special + words, extra_ids=0)

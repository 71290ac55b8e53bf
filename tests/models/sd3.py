"""A Stable Diffusion 3.5 model of random weights: diffusers' own classes, a few channels wide.

A pixel and its neighbour are one latent, so that 16 x 16 pixels are 8 x 8 latents, or 4 x 4 patches. The two CLIP
encoders and the transformer differ in all their widths, so that a mix-up shows.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from . import parts

CLIP = Path(__file__).parents[2] / "examples" / "shapes" / "model" / "tokenizer"
LARGEST = 12  # patches along a side of the table of positions


def make(folder: Path, *, t5: bool = True, **transformer: Any) -> Path:
    """Save the model, and return its folder. transformer: changes of the denoiser's configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusion3Pipeline(
            transformer=_transformer(**transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=_clip(hidden=16, projection=12, act="quick_gelu"),
            tokenizer=CLIPTokenizer.from_pretrained(CLIP),
            text_encoder_2=_clip(hidden=24, projection=8, act="gelu"),
            tokenizer_2=CLIPTokenizer.from_pretrained(CLIP, pad_token="!"),
            text_encoder_3=_t5() if t5 else None,
            tokenizer_3=_t5_tokenizer() if t5 else None,
        )
    pipeline.save_pretrained(folder)
    return folder


def _transformer(**changes: Any) -> SD3Transformer2DModel:
    config: dict[str, Any] = {
        "sample_size": 8,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,  # more than both CLIPs together, 40
        "caption_projection_dim": 16,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": LARGEST,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    }
    model = SD3Transformer2DModel(**config | changes)
    parts.as_trained(model)
    return model


def _vae() -> AutoencoderKL:
    return parts.autoencoder(
        latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    )


def _clip(hidden: int, projection: int, act: str) -> CLIPTextModelWithProjection:
    tokenizer = CLIPTokenizer.from_pretrained(CLIP)
    return CLIPTextModelWithProjection(
        parts.clip_config(tokenizer, hidden, 3, projection_dim=projection, hidden_act=act)
    )


def _t5() -> T5EncoderModel:
    shape = {"d_model": 48, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(_t5_tokenizer()), feed_forward_proj="gated-gelu", **shape))


def _t5_tokenizer() -> T5TokenizerFast:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = string.ascii_letters + string.digits
    return T5TokenizerFast(vocab=[*special, *((letter, -3.0) for letter in letters)], extra_ids=0)

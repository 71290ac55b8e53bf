"""A Stable Diffusion XL model of random weights: diffusers' own classes, a few channels wide.

A pixel and its neighbour are one latent, so that 16 x 16 pixels are 8 x 8 latents. The text encoders differ in widths,
depths and activations, and their tokenizers in the padding, as the published ones do, so that a mix-up shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from . import parts

CLIP = Path(__file__).parents[2] / "examples" / "shapes" / "model" / "tokenizer"
PROJECTION, TIME = 12, 8
PADDING = "!"
"""Of the second tokenizer; the first one's is the end token."""


def make(folder: Path, *, force_zeros: bool = True, **unet: Any) -> Path:
    """Save the model in float16, and return its folder. unet: changes of the denoiser's configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text(16, 2, "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(_text(24, 3, "gelu", projection_dim=PROJECTION)),
            tokenizer=CLIPTokenizer.from_pretrained(CLIP),
            tokenizer_2=CLIPTokenizer.from_pretrained(CLIP, pad_token=PADDING),
            unet=_unet(**unet),
            scheduler=EulerDiscreteScheduler(
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                timestep_spacing="leading",
                steps_offset=1,
            ),
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    published = {"clip_sample": False, "set_alpha_to_one": False}  # which the scheduler itself does not know
    file.write_text(json.dumps(json.loads(file.read_text()) | published))
    return folder


def _unet(**changes: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 16 + 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME,
        "projection_class_embeddings_input_dim": 6 * TIME + PROJECTION,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**config | changes)


def _vae() -> AutoencoderKL:
    return parts.autoencoder(scaling_factor=0.13025)


def _text(width: int, layers: int, activation: str, **changes: Any) -> CLIPTextConfig:
    return parts.clip_config(CLIPTokenizer.from_pretrained(CLIP), width, layers, hidden_act=activation, **changes)

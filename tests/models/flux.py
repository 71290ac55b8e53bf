"""A FLUX.1 model of random weights: diffusers' own classes, a few channels wide.

A pixel and its neighbour are one latent, so that 16 x 16 pixels are 8 x 8 latents, or 4 x 4 tokens. The rotary
embedding's axes, the text encoders and the transformer differ in all their widths, so that a mix-up shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from . import parts

CLIP = Path(__file__).parents[2] / "examples" / "shapes" / "model" / "tokenizer"
DEV = {"use_dynamic_shifting": True, "shift": 3.0}
"""The scheduler of FLUX.1 [dev], besides its class's defaults."""
SCHNELL = {"use_dynamic_shifting": False, "shift": 1.0}
"""That of FLUX.1 [schnell]."""


def make(folder: Path, *, dev: bool = True, **transformer: Any) -> Path:
    """Save the model, and return its folder. dev: like FLUX.1 [dev], not [schnell]. transformer: changes of the
    denoiser's configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = CLIPTokenizer.from_pretrained(CLIP)
        pipeline = FluxPipeline(
            transformer=_transformer(guidance_embeds=dev, **transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(**(DEV if dev else SCHNELL)),
            vae=_vae(),
            text_encoder=_clip(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=_t5(),
            tokenizer_2=_t5_tokenizer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def _transformer(**changes: Any) -> FluxTransformer2DModel:
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 8, 4),
    }
    model = FluxTransformer2DModel(**config | changes)
    parts.as_trained(model)
    return model


def _vae() -> AutoencoderKL:
    return parts.autoencoder(
        latent_channels=4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(parts.clip_config(tokenizer, 20, 2))


def _t5() -> T5EncoderModel:
    shape = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    # A larger vocabulary than the tokenizer's, as in the published models.
    model = T5EncoderModel(T5Config(vocab_size=64, feed_forward_proj="gated-gelu", **shape))
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    bias.weight.data = torch.randn(bias.weight.shape)  # as trained: one that tells positions apart
    return model


def _t5_tokenizer() -> T5TokenizerFast:
    """A vocabulary of letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5TokenizerFast(vocab=[*special, *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")], extra_ids=0)

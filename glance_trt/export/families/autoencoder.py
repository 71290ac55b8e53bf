"""The AutoencoderKL that most families have: its decoder and its encoder as graphs; and the AutoencoderTiny, whose
decoder a recipe may take instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from glance_trt.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

_TINY = "AutoencoderTiny"

# What early diffusers versions, and so the published files of Stable Diffusion 1, call the VAE's attention.
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_ATTENTION = re.compile(rf"((?:de|en)coder\.mid_block\.attentions\.\d+\.)({'|'.join(_OLD_NAMES)})(\.\w+)")


def scale(config: Mapping[str, Any]) -> int:
    """Pixels per latent along each side."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def aliases(name: str) -> Iterable[str]:
    """Other names of a parameter in weights files."""
    if match := _ATTENTION.fullmatch(name):
        yield f"{match[1]}{_OLD_NAMES[match[2]]}{match[3]}"


def reduced(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a small one of the same blocks."""
    return {**config, "layers_per_block": 1, "block_out_channels": few_channels(config)}


def few_channels(config: Mapping[str, Any]) -> list[int]:
    """As few channels for the blocks of a VAE or UNet as the group norms allow, and equal where the model's are."""
    channels = config["block_out_channels"]
    sizes = sorted(set(channels))
    return [(1 + sizes.index(size)) * config.get("norm_num_groups", 32) for size in channels]


def check_tiny(name: str, config: Mapping[str, Any], channels: int, scale: int) -> None:
    """That the recipe's decoder is an AutoencoderTiny for latents of `channels`, `scale` pixels per latent along each
    side. Raises `RecipeError`."""
    if config.get("_class_name") != _TINY:
        raise RecipeError(f"decoder: {name} holds {config.get('_class_name')}; expected an {_TINY}")
    steps = len(config.get("num_decoder_blocks", (3, 3, 3, 1))) - 1
    found = (config.get("latent_channels", 4), config.get("upsampling_scaling_factor", 2) ** steps)
    if found != (channels, scale):
        raise RecipeError(
            f"decoder: {name} is for latents of {found[0]} channels, {found[1]} pixels each along a side; this model's "
            f"have {channels} channels, {scale} pixels each. Take one that was made for this model"
        )


def decoder(config: Mapping[str, Any]) -> nn.Module:
    """latents to images; see `glance_trt.export.modules.Decoder`."""
    import diffusers

    from glance_trt.export.modules import Decoder

    kind = _TINY if config.get("_class_name") == _TINY else "AutoencoderKL"
    return Decoder(getattr(diffusers, kind).from_config(config))


def encoder(config: Mapping[str, Any]) -> nn.Module:
    """Images to latents; see `glance_trt.export.modules.Encoder`."""
    from diffusers import AutoencoderKL

    from glance_trt.export.modules import Encoder

    return Encoder(AutoencoderKL.from_config(config))

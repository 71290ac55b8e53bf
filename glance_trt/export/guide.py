"""Guides: small additional weights that take the guidance scale, so that one evaluation gives a guided prediction.

The base model stays as it is, bit for bit: a guide acts upon it from outside, while it is asked to. There are three
kinds:

- ``embedding``: the scale's sinusoids, projected and added to those of the time, as latent consistency models
  (arXiv 2310.04378) and diffusers do. A LoRA that is trained with it acts upon what it adds.
- ``tiny`` and ``full`` (arXiv 2406.01954): an adapter behind the middle block and behind each decoder block, which adds
  ``scale - 1`` times what it makes of the block's features, the scale, the timestep and the text; at scale 1 nothing.
  The paper publishes neither where its features are added nor how the scale is embedded: this is our own choice.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from glance_trt import strict
from glance_trt.errors import LoraError, ModelError
from glance_trt.export import lora
from glance_trt.export.weights import TensorRef, read_header

Kind = Literal["embedding", "tiny", "full"]

_EMBEDDING_WIDTH = 256  # as in latent consistency models
_HIDDEN = 64
_TINY = 0.01  # of the base's parameters


@dataclass(frozen=True)
class Config:
    """What a guide is made for: each block's channels, by the UNet's own name for it, and the adapter's width there.

    text: width of the text embeddings. scales: the lowest and the highest guidance scale that it was trained for; empty
    where that is not known. An ``embedding`` has one block, ``time_embedding``, with the channels of its input and the
    width of the scale's sinusoids.
    """

    kind: Kind
    channels: dict[str, int]
    widths: dict[str, int]
    text: int
    scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.scales and not (len(self.scales) == 2 and self.scales[0] < self.scales[1]):
            raise strict.Mismatch(f"scales: expected the lowest and the highest one, got {list(self.scales)}")
        if self.widths.keys() != self.channels.keys() or not all(0 < width <= 2**16 for width in self.widths.values()):
            raise strict.Mismatch("widths: expected a width from 1 to 65536 for each of the channels")


def configure(kind: Kind, unet: Mapping[str, Any], parameters: int) -> Config:
    """A guide for a UNet with this config and this number of parameters, of which ``tiny`` has at most 1 %.

    Raises `ModelError` where not even the smallest ``tiny`` guide is that small.
    """
    channels, text = blocks(kind, unet), unet["cross_attention_dim"]
    if kind == "embedding":
        return Config(kind, channels, dict.fromkeys(channels, _EMBEDDING_WIDTH), text)
    if kind == "full":
        return Config(kind, channels, channels, text)
    width = 0
    while (size := _size(Config(kind, channels, dict.fromkeys(channels, width + 1), text))) <= _TINY * parameters:
        width += 1
    if not width:
        raise ModelError(
            f"a tiny guide has at most {_TINY:.0%} of the UNet's {parameters} parameters, and the smallest one has "
            f"{size}; use another kind of guide"
        )
    return Config(kind, channels, dict.fromkeys(channels, width), text)


def blocks(kind: Kind, unet: Mapping[str, Any]) -> dict[str, int]:
    """The parts of a UNet that a guide of this kind acts upon, and their channels."""
    channels = unet["block_out_channels"]
    if kind == "embedding":
        return {"time_embedding": channels[0]}
    middle = {"mid_block": channels[-1]} if unet.get("mid_block_type", "default") else {}  # a UNet may have none
    return {**middle, **{f"up_blocks.{i}": count for i, count in enumerate(reversed(channels))}}


class Guide(nn.Module):
    """The additional weights; they do nothing but in `acting`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        if config.kind == "embedding":
            self.cond_proj = nn.Linear(_EMBEDDING_WIDTH, config.channels["time_embedding"], bias=False)
            nn.init.zeros_(self.cond_proj.weight)
            return
        self.text, self.time, self.scale = (nn.Linear(size, _HIDDEN) for size in (config.text, _HIDDEN, 1))
        self.mix = nn.Linear(_HIDDEN, _HIDDEN)
        self.adapters = nn.ModuleDict(
            {_key(name): _Adapter(channels, config.widths[name]) for name, channels in config.channels.items()}
        )

    @contextlib.contextmanager
    def acting(
        self, unet: UNet2DConditionModel, timestep: Tensor, prompt_embeds: Tensor, scale: Tensor
    ) -> Iterator[None]:
        """While open, the UNet's prediction for this timestep [] or [B], prompt_embeds [B, L, D] and guidance scale []
        or [B] is guided."""
        with contextlib.ExitStack() as hooks:
            if self.config.kind == "embedding":
                added = self.cond_proj(sinusoids(scale, _EMBEDDING_WIDTH).to(self.cond_proj.weight.dtype))
                hook = unet.time_embedding.register_forward_pre_hook(
                    lambda _, inputs: (inputs[0] + added.to(inputs[0].dtype), *inputs[1:])
                )
                hooks.callback(hook.remove)
            else:
                condition, strength = self._condition(timestep, prompt_embeds, scale), scale.view(-1, 1, 1, 1) - 1
                for name in self.config.channels:
                    hook = unet.get_submodule(name).register_forward_hook(
                        functools.partial(_add, self.adapters[_key(name)], condition, strength)
                    )
                    hooks.callback(hook.remove)
            yield

    def _condition(self, timestep: Tensor, prompt_embeds: Tensor, scale: Tensor) -> Tensor:
        """[B, hidden]: what all adapters are told."""
        dtype = self.mix.weight.dtype
        time = get_timestep_embedding(timestep.view(-1), _HIDDEN, flip_sin_to_cos=True, downscale_freq_shift=0)
        text = self.text(F.layer_norm(prompt_embeds.mean(dim=1), prompt_embeds.shape[-1:]).to(dtype))
        scaled = self.scale((scale.view(-1, 1) / 8).to(dtype))
        return F.silu(self.mix(F.silu(text + self.time(time.to(dtype)) + scaled)))


class _Adapter(nn.Module):
    """A bottleneck of convolutions, modulated by the condition; it starts with no effect."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(channels, 32), channels)
        self.down = nn.Conv2d(channels, width, 1)
        self.modulation = nn.Linear(_HIDDEN, 2 * width)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Conv2d(width, channels, 1)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """features [B, C, h, w], condition [B, hidden] to [B, C, h, w]."""
        inner = self.down(F.silu(self.norm(features)))
        width = inner.shape[1]
        modulation = self.modulation(condition)[:, :, None, None]
        inner = inner * (1 + modulation[:, :width]) + modulation[:, width:]
        return self.up(F.silu(self.mix(F.silu(inner))))


def _add(adapter: nn.Module, condition: Tensor, strength: Tensor, _: nn.Module, __: object, features: Tensor) -> Tensor:
    return features + (strength * adapter(features, condition)).to(features.dtype)


def sinusoids(scale: Tensor, width: int) -> Tensor:
    """[B, width] of a guidance scale [] or [B]: diffusers' ``get_guidance_scale_embedding``, which counts from 1."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=scale.device) * (-math.log(10000) / (half - 1)))
    angles = 1000 * (scale.view(-1, 1) - 1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@dataclass(frozen=True)
class GuideFile:
    """A guide in a file, its tensors by their names in `Guide`."""

    file: Path
    config: Config
    tensors: dict[str, TensorRef]


def read(path: Path, unet: Mapping[str, Any]) -> GuideFile:
    """Read a guide for a model whose UNet has the config `unet`.

    Raises `LoraError` for a file that is no guide, and for one that was made for another architecture.
    """
    if not path.is_file():
        raise LoraError(f"{path}: no such guide; train one with: glance-trt distill RECIPE")
    try:
        tensors, metadata = read_header(path)
        if lora.GUIDE not in metadata:
            raise LoraError(f"{path}: no guide; its metadata lack {lora.GUIDE}")
        config = strict.read(Config, json.loads(metadata[lora.GUIDE]))
    except ModelError as error:
        raise LoraError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{path}: not a readable guide: {error}") from None
    if difference := _difference(config, unet):
        raise LoraError(f"{path}: a guide for another architecture: {difference}")
    expected = {name: tuple(value.shape) for name, value in _shapes(config).items()}
    for name, shape in expected.items():
        if name not in tensors or tensors[name].shape != shape:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise LoraError(f"{path}: {name}: expected the shape {list(shape)}, found {found}; the file is damaged")
    return GuideFile(path, config, {name: tensors[name] for name in expected})


def _difference(config: Config, unet: Mapping[str, Any]) -> str | None:
    """How the model differs from the one that a guide was made for, block by block."""
    here = blocks(config.kind, unet)
    differences = [
        f"{name} has {here.get(name, 'no')} channels here, {config.channels.get(name, 'none')} in the guide"
        for name in {**here, **config.channels}
        if here.get(name) != config.channels.get(name)
    ]
    if config.kind != "embedding" and config.text != unet["cross_attention_dim"]:
        differences.append(f"text embeddings are {unet['cross_attention_dim']} wide here, {config.text} in the guide")
    return "; ".join(differences) or None


def _key(name: str) -> str:
    return name.replace(".", "_")  # a ModuleDict takes no dots


def _shapes(config: Config) -> dict[str, Tensor]:
    with torch.device("meta"):
        return Guide(config).state_dict()


def _size(config: Config) -> int:
    return sum(value.numel() for value in _shapes(config).values())

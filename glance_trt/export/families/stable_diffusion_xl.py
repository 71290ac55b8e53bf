"""Stable Diffusion XL: two CLIP text encoders, UNet2DConditionModel, AutoencoderKL."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from glance_trt.bundle import DType, Port
from glance_trt.errors import ModelError
from glance_trt.export.families import TokenizerSource
from glance_trt.export.families import autoencoder as autoencoders
from glance_trt.export.families.adapter import Adapter, fitted
from glance_trt.export.model import Model
from glance_trt.export.source import Source
from glance_trt.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from glance_trt.export.guide import Config, GuideFile

_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_OR_ZEROS = "_or_zeros"
"""Ends the names of what the text encoders put out for a negative prompt."""


class StableDiffusionXL(Adapter):
    """See `glance_trt.export.families.Family`."""

    name = "stable-diffusion-xl"
    text_encoders: ClassVar[tuple[str, ...]] = tuple(_TOKENIZERS)
    denoiser: ClassVar[str] = "unet"
    parts: ClassVar[Mapping[str, str | None]] = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    schedulers: ClassVar[Literal["diffusion", "flow matching"]] = "diffusion"
    takes_guides = True

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        self._check_parts()
        self.multiple = 2 ** (len(self.configs["unet"]["block_out_channels"]) - 1)
        zeros = bool(model.index().get("force_zeros_for_empty_prompt", True))
        self.zeros = zeros and recipe.guidance.mode == "cfg"

    def _check_parts(self) -> None:
        model, unet, vae = self.model, self.configs["unet"], self.configs["vae"]
        if lacking := [part for part in _TOKENIZERS if part not in self.components]:
            raise ModelError(
                f"{model.folder}: model_index.json has no {lacking[0]}; the base model has two text encoders. The "
                "refiner, which has one, is not supported"
            )
        where, added = model.path("unet"), unet.get("addition_embed_type")
        if added != "text_time" or unet.get("class_embed_type"):
            raise ModelError(f"{where}: its addition_embed_type is {added}; that of Stable Diffusion XL is text_time")
        if unet["in_channels"] != vae["latent_channels"]:
            raise ModelError(
                f"{where}: takes {unet['in_channels']} channels where the VAE makes {vae['latent_channels']}; models "
                "for inpainting and editing are not supported"
            )
        width = unet["projection_class_embeddings_input_dim"] - self.configs["text_encoder_2"]["projection_dim"]
        if width != 6 * unet["addition_time_embed_dim"]:
            raise ModelError(
                f"{where}: is told {width / unet['addition_time_embed_dim']:g} numbers of an image, the base model 6. "
                "The refiner, which takes an aesthetic score, is not supported"
            )
        if unet.get("time_cond_proj_dim"):
            raise ModelError(
                f"{where}: takes the guidance scale (time_cond_proj_dim), as latent consistency models do, which are "
                "not supported"
            )
        if vae.get("latents_mean"):
            raise ModelError(
                f"{model.path('vae')}: its latents are normalised (latents_mean), as in Playground v2.5, which is not "
                "supported"
            )

    def sources(self, guides: Mapping[str, GuideFile] | None = None) -> dict[str, Source]:
        """See `Family.sources`."""
        first, second = (self.configs[part] for part in _TOKENIZERS)
        embeds, more = (
            Port(name, "float32", ("batch", text["max_position_embeddings"], text["hidden_size"]))
            for name, text in (("prompt_embeds", first), ("prompt_embeds_2", second))
        )
        pooled = Port("pooled_prompt_embeds", "float32", ("batch", second["projection_dim"]))
        return {
            "text_encoder": self._text_encoder("text_encoder", [embeds]),
            "text_encoder_2": self._text_encoder("text_encoder_2", [more, pooled]),
            **self.steps(self._step, [embeds, more, pooled], guides),
            **self.autoencoder(),
        }

    def _text_encoder(self, part: str, outputs: Sequence[Port]) -> Source:
        either = [replace(port, name=port.name + _OR_ZEROS) for port in outputs] if self.zeros else []
        build = functools.partial(_encoder, part, self.configs[part], self.zeros)
        length = self.configs[part]["max_position_embeddings"]
        return self.text_encoder(part, build, [*outputs, *either], length, masked=self.zeros)

    def step(self, build: Callable[[], nn.Module], conditions: Sequence[Port], *, guided: bool | None = None) -> Source:
        """See `Adapter.step`."""
        source = super().step(build, conditions, guided=guided)
        if not self.zeros:
            return source
        ports = [
            replace(port, source=port.source + _OR_ZEROS) if port.source.startswith("negative.") else port
            for port in source.inputs
        ]
        return replace(source, inputs=tuple(ports))

    def _step(self, guide: Config | None = None) -> nn.Module:
        from diffusers import UNet2DConditionModel

        from glance_trt.export.families.stable_diffusion_xl_modules import XLStep

        unet, guidance = UNet2DConditionModel.from_config(self.configs["unet"]), self.recipe.guidance
        mode = "embedded" if guide else guidance.mode
        return XLStep(unet, mode, guidance.rescale, guide, latent_scale=self.latent_scale())

    def reduced(self, guides: Mapping[str, GuideFile]) -> tuple[StableDiffusionXL, dict[str, GuideFile]]:
        """See `Family.reduced`."""
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
        unet, small = self.configs["unet"], copy.copy(self)
        blocks = {"layers_per_block": 1, "transformer_layers_per_block": 1, "attention_head_dim": 2}
        blocks["cross_attention_dim"] = 2 * 64
        told = {"addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 6 * 32 + 64}
        small.configs = {
            **{part: self.configs[part] | narrow | {"projection_dim": 64} for part in _TOKENIZERS},
            "unet": unet | blocks | told | {"block_out_channels": autoencoders.few_channels(unet)},
            "vae": autoencoders.reduced(self.configs["vae"]),
        }
        return small, fitted(guides, small.configs["unet"])

    def dtype(self, kind: str, wanted: DType) -> DType:
        """See `Family.dtype`: the published VAE overflows in float16, as its configuration says."""
        own = kind == "encoder" or (kind == "decoder" and not self.tiny_decoder)
        upcast = own and self.configs["vae"].get("force_upcast", True)
        return "float32" if upcast and wanted == "float16" else wanted

    def tokenizers(self) -> dict[str, TokenizerSource]:
        """See `Family.tokenizers`."""
        return {
            name: self.tokenizer(name, self.configs[part]["max_position_embeddings"])
            for part, name in _TOKENIZERS.items()
        }


def _encoder(part: str, config: Mapping[str, Any], zeros: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from glance_trt.export.families.stable_diffusion_xl_modules import XLEncoder
    from glance_trt.export.modules import ClipEncoder

    pooled = part == "text_encoder_2"
    model = (CLIPTextModelWithProjection if pooled else CLIPTextModel)(CLIPTextConfig(**config))
    return (XLEncoder if zeros else ClipEncoder)(model, pooled=pooled)

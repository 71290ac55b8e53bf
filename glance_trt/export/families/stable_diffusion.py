"""Stable Diffusion 1.x and 2.x: CLIP text encoder, UNet2DConditionModel, AutoencoderKL."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from glance_trt.bundle import Port
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


class StableDiffusion(Adapter):
    """See `glance_trt.export.families.Family`."""

    name = "stable-diffusion"
    denoiser: ClassVar[str] = "unet"
    parts: ClassVar[Mapping[str, str | None]] = {
        "text_encoder": None,
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    }
    schedulers: ClassVar[Literal["diffusion", "flow matching"]] = "diffusion"
    takes_guides = True

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        unet = self.configs["unet"]
        if unet.get("class_embed_type") or unet.get("addition_embed_type"):
            raise ModelError(
                f"{model.path('unet')}: a UNet with class or added embeddings is not Stable Diffusion 1.x or 2.x"
            )
        self.multiple = 2 ** (len(unet["block_out_channels"]) - 1)

    def sources(self, guides: Mapping[str, GuideFile] | None = None) -> dict[str, Source]:
        """See `Family.sources`."""
        text = self.configs["text_encoder"]
        length = text["max_position_embeddings"]
        embeds = Port("prompt_embeds", "float32", ("batch", length, text["hidden_size"]))
        return {
            "text_encoder": self.text_encoder("text_encoder", self._text_encoder, [embeds], length),
            **self.steps(self._step, [embeds], guides),
            **self.autoencoder(),
        }

    def _step(self, guide: Config | None = None) -> nn.Module:
        from diffusers import UNet2DConditionModel

        from glance_trt.export.modules import UNetStep

        guidance = self.recipe.guidance
        mode = "embedded" if guide else guidance.mode
        return UNetStep(UNet2DConditionModel.from_config(self.configs["unet"]), mode, guidance.rescale, guide)

    def _text_encoder(self) -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel

        from glance_trt.export.modules import TextEncoder

        return TextEncoder(CLIPTextModel(CLIPTextConfig(**self.configs["text_encoder"])))

    def reduced(self, guides: Mapping[str, GuideFile]) -> tuple[StableDiffusion, dict[str, GuideFile]]:
        """See `Family.reduced`."""
        text, unet, vae = (self.configs[part] for part in ("text_encoder", "unet", "vae"))
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
        blocks = {"layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 64}
        small = copy.copy(self)
        small.configs = {
            "text_encoder": text | narrow,
            "unet": unet | blocks | {"block_out_channels": autoencoders.few_channels(unet)},
            "vae": autoencoders.reduced(vae),
        }
        return small, fitted(guides, small.configs["unet"])

    # What a VAE's force_upcast says is not asked: diffusers writes it into every new configuration, and its Stable
    # Diffusion pipeline, unlike that of SDXL, does not heed it. So `dtype` is that of `Adapter`.

    def scheduler_config(self) -> dict[str, Any]:
        """See `Family.scheduler_config`."""
        # StableDiffusionPipeline corrects these two in every scheduler it is given; old configurations rely on it.
        return super().scheduler_config() | {"steps_offset": 1, "clip_sample": False}

    def latent_channels(self) -> int:
        """See `Adapter.latent_channels`."""
        return int(self.configs["unet"]["in_channels"])

    def tokenizers(self) -> dict[str, TokenizerSource]:
        """See `Family.tokenizers`."""
        length = self.configs["text_encoder"]["max_position_embeddings"]
        return {"tokenizer": self.tokenizer("tokenizer", length)}

"""FLUX.1 [dev] and [schnell]: CLIP's pooled output and T5, FluxTransformer2DModel, AutoencoderKL."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from glance_trt import limits
from glance_trt.bundle import DType, Port
from glance_trt.errors import ModelError, RecipeError
from glance_trt.export.families import TokenizerSource, t5
from glance_trt.export.families import autoencoder as autoencoders
from glance_trt.export.families.adapter import Adapter
from glance_trt.export.model import Model
from glance_trt.export.source import Source
from glance_trt.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from glance_trt.export.guide import GuideFile


class Flux(Adapter):
    """See `glance_trt.export.families.Family`. The two differ in whether the denoiser takes the guidance scale."""

    name = "flux"
    parts: ClassVar[Mapping[str, str | None]] = {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL"}
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    most_tokens = 512

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        for part in self.text_encoders:
            if part not in self.components:
                raise ModelError(f"{model.folder}: model_index.json has no {part}; FLUX needs CLIP and T5")
        transformer, channels = self.configs["transformer"], 4 * self.latent_channels()
        for key in ("in_channels", "out_channels"):
            if (found := transformer.get(key)) not in (channels, None):
                raise ModelError(
                    f"{model.path('transformer')}: {key} is {found}, and patches of the VAE's latents have {channels}; "
                    "models that fill, edit or follow a control image are not supported"
                )
        # schnell was trained with prompts of 256 tokens.
        self.prompt_tokens = recipe.prompt_tokens or (512 if self.takes_scale else 256)

    def _check_guidance(self) -> None:
        self.takes_scale = bool(self.configs["transformer"].get("guidance_embeds"))
        mode = self.recipe.guidance.mode
        if self.takes_scale and mode != "embedded":
            raise RecipeError(
                f"guidance.mode: {mode}, and this model takes the guidance scale itself, like FLUX.1 [dev]; use "
                "embedded, for instance with scale 3.5"
            )
        if not self.takes_scale and mode == "embedded":
            raise RecipeError(
                "guidance.mode: embedded, and this model takes no guidance scale, like FLUX.1 [schnell]; use none"
            )
        super()._check_guidance()

    def sources(self, guides: Mapping[str, GuideFile] | None = None) -> dict[str, Source]:
        """See `Family.sources`."""
        clip, encoder = self.configs["text_encoder"], self.configs["text_encoder_2"]
        embeds = Port("prompt_embeds", "float32", ("batch", self.prompt_tokens, encoder["d_model"]))
        pooled = Port("pooled_prompt_embeds", "float32", ("batch", clip["hidden_size"]))
        build = functools.partial(t5.encoder, encoder, self.prompt_tokens)
        return {
            "text_encoder": self.text_encoder("text_encoder", self._clip, [pooled], clip["max_position_embeddings"]),
            "text_encoder_2": self.text_encoder("text_encoder_2", build, [embeds], self.prompt_tokens),
            "denoiser": self.step(self._step, [embeds, pooled]),
            **self.autoencoder(),
        }

    def _clip(self) -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel

        from glance_trt.export.modules import ClipEncoder

        return ClipEncoder(CLIPTextModel(CLIPTextConfig(**self.configs["text_encoder"])), hidden=False)

    def _step(self) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        from glance_trt.export.families.flux_modules import FluxStep

        transformer = FluxTransformer2DModel.from_config(self.configs["transformer"])
        guidance = self.recipe.guidance
        return FluxStep(transformer, guidance.mode, guidance.rescale, self.limits()["h"])

    def reduced(self, guides: Mapping[str, GuideFile]) -> tuple[Flux, dict[str, GuideFile]]:
        """See `Family.reduced`."""
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
        few = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2}
        small = copy.copy(self)
        small.configs = {
            "text_encoder": self.configs["text_encoder"] | narrow,
            "text_encoder_2": t5.reduced(self.configs["text_encoder_2"], 96),
            "transformer": self.configs["transformer"] | few | {"joint_attention_dim": 96, "pooled_projection_dim": 64},
            "vae": autoencoders.reduced(self.configs["vae"]),
        }
        return small, {}

    def dtype(self, kind: str, wanted: DType) -> DType:
        """See `Family.dtype`."""
        if self.components[kind] == "vae" and wanted == "float16":
            return "float32"  # the published one makes black images in float16
        return t5.dtype(wanted) if kind == "text_encoder_2" else wanted

    def aliases(self, name: str) -> Iterable[str]:
        """See `Family.aliases`."""
        return [*super().aliases(name), *t5.aliases(name)]

    def limits(self) -> dict[str, int]:
        """See `Adapter.limits`."""
        side = limits.IMAGE_SIDE // (2 * self.latent_scale())  # tokens
        return super().limits() | {"h": side, "w": side}

    def tokenizers(self) -> dict[str, TokenizerSource]:
        """See `Family.tokenizers`."""
        length = self.configs["text_encoder"]["max_position_embeddings"]
        return {
            "tokenizer": self.tokenizer("tokenizer", length),
            "tokenizer_2": self.tokenizer("tokenizer_2", self.prompt_tokens, kind="T5TokenizerFast"),
        }

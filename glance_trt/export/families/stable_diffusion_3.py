"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, SD3Transformer2DModel, AutoencoderKL."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from glance_trt.bundle import DType, Port
from glance_trt.errors import ModelError
from glance_trt.export.families import TokenizerSource, t5
from glance_trt.export.families import autoencoder as autoencoders
from glance_trt.export.families.adapter import Adapter
from glance_trt.export.model import Model
from glance_trt.export.source import Source
from glance_trt.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from glance_trt.export.guide import GuideFile

_PROMPT_TOKENS = 256  # of T5: diffusers' default
_CLIPS, _T5 = {"text_encoder": "", "text_encoder_2": "_2"}, "text_encoder_3"


class StableDiffusion3(Adapter):
    """See `glance_trt.export.families.Family`. Without the T5 encoder, zeros stand for its embeddings."""

    name = "stable-diffusion-3"
    parts: ClassVar[Mapping[str, str | None]] = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
    text_encoders: ClassVar[tuple[str, ...]] = (*_CLIPS, _T5)
    most_tokens = 512

    def __init__(self, model: Model, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        for part in _CLIPS:
            if part not in self.components:
                raise ModelError(f"{model.folder}: model_index.json has no {part}; both CLIP encoders are needed")
        transformer, channels = self.configs["transformer"], self.latent_channels()
        if transformer["in_channels"] != channels:
            raise ModelError(
                f"{model.path('transformer')}: takes {transformer['in_channels']} channels, and the VAE's latents have "
                f"{channels}; models that inpaint or edit are not supported"
            )
        self.multiple = transformer["patch_size"]
        self.prompt_tokens = recipe.prompt_tokens or _PROMPT_TOKENS

    def sources(self, guides: Mapping[str, GuideFile] | None = None) -> dict[str, Source]:
        """See `Family.sources`."""
        encoders = {part: self._clip(part) for part in _CLIPS}
        if _T5 in self.components:
            config = self.configs[_T5]
            embeds = Port("t5_embeds", "float32", ("batch", self.prompt_tokens, config["d_model"]))
            build = functools.partial(t5.encoder, config, self.prompt_tokens)
            encoders[_T5] = self.text_encoder(_T5, build, [embeds], self.prompt_tokens)
        conditions = [port for source in encoders.values() for port in source.outputs]
        return {**encoders, "denoiser": self.step(self._step, conditions), **self.autoencoder()}

    def _clip(self, part: str) -> Source:
        config, suffix = self.configs[part], _CLIPS[part]
        length = config["max_position_embeddings"]
        embeds = Port(f"clip_embeds{suffix}", "float32", ("batch", length, config["hidden_size"]))
        pooled = Port(f"clip_pooled{suffix}", "float32", ("batch", config["projection_dim"]))
        return self.text_encoder(part, functools.partial(_build_clip, config), [embeds, pooled], length)

    def _step(self) -> nn.Module:
        from glance_trt.export.families.stable_diffusion_3_modules import SD3Step, transformer

        guidance, config = self.recipe.guidance, self.configs["transformer"]
        return SD3Step(transformer(config), guidance.mode, guidance.rescale, self.prompt_tokens)

    def reduced(self, guides: Mapping[str, GuideFile]) -> tuple[StableDiffusion3, dict[str, GuideFile]]:
        """See `Family.reduced`."""
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3}
        few = {"num_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 192, "pooled_projection_dim": 64}
        transformer, small = self.configs["transformer"], copy.copy(self)
        few["caption_projection_dim"] = 2 * transformer["attention_head_dim"]
        few["pos_embed_max_size"] = 16
        dual = {"dual_attention_layers": [0] if transformer.get("dual_attention_layers") else []}
        small.configs = {part: self.configs[part] | narrow | {"projection_dim": 32} for part in _CLIPS}
        small.configs |= {"transformer": transformer | few | dual, "vae": autoencoders.reduced(self.configs["vae"])}
        if _T5 in self.components:
            small.configs[_T5] = t5.reduced(self.configs[_T5], few["joint_attention_dim"])
        return small, {}

    def dtype(self, kind: str, wanted: DType) -> DType:
        """See `Family.dtype`."""
        return t5.dtype(wanted) if kind == _T5 else wanted

    def aliases(self, name: str) -> Iterable[str]:
        """See `Family.aliases`."""
        return [*super().aliases(name), *t5.aliases(name)]

    def scheduler_config(self) -> dict[str, Any]:
        """See `Family.scheduler_config`."""
        # StableDiffusion3Pipeline passes no sigmas to the scheduler, as those of other families do.
        return super().scheduler_config() | {"own_sigmas": True}

    def limits(self) -> dict[str, int]:
        """See `Adapter.limits`."""
        side = self.configs["transformer"]["pos_embed_max_size"]  # patches
        return super().limits() | {"h": side, "w": side}

    def tokenizers(self) -> dict[str, TokenizerSource]:
        """See `Family.tokenizers`."""
        length = self.configs["text_encoder"]["max_position_embeddings"]
        found = {f"tokenizer{suffix}": self.tokenizer(f"tokenizer{suffix}", length) for suffix in _CLIPS.values()}
        if _T5 in self.components:
            found["tokenizer_3"] = self.tokenizer("tokenizer_3", self.prompt_tokens, kind="T5TokenizerFast")
        return found


def _build_clip(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from glance_trt.export.modules import ClipEncoder

    return ClipEncoder(CLIPTextModelWithProjection(CLIPTextConfig(**config)))

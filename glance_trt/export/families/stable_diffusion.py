"""Stable Diffusion 1.x and 2.x: CLIP text encoder, UNet2DConditionModel, AutoencoderKL."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from glance_trt.bundle import Image, Port
from glance_trt.errors import ModelError, RecipeError
from glance_trt.export import guide
from glance_trt.export.families import read_json
from glance_trt.export.guide import Guide, GuideFile
from glance_trt.export.trace import Source
from glance_trt.recipe import Recipe

# UNet2DConditionModel's upsampler takes another path from a batch of 64 on (a workaround for a bfloat16 kernel that
# counted in 32 bits); guidance doubles the batch, so 31 images are what one traced graph can promise.
_MAX_BATCH = 31

# What early diffusers versions, and so the published files of Stable Diffusion 1, call the VAE's attention.
_OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_VAE_ATTENTION = re.compile(rf"(decoder\.mid_block\.attentions\.\d+\.)({'|'.join(_OLD_VAE_NAMES)})(\.\w+)")


class Step(nn.Module):
    """One sampling step without guidance, the scheduler's update included: ``a * x + b * model(c_in * x, t)``."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timestep: Tensor, coefficients: Tensor, prompt_embeds: Tensor) -> Tensor:
        """latents [B, C, H, W], timestep [], coefficients [3] (c_in, a, b), prompt_embeds [B, L, D]; all float32."""
        predicted = self.predict(latents * coefficients[0], timestep, prompt_embeds)
        return coefficients[1] * latents + coefficients[2] * predicted

    def predict(self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        """The UNet in its own dtype, float32 outside."""
        dtype = next(self.unet.parameters()).dtype
        return self.unet(sample.to(dtype), timestep, prompt_embeds.to(dtype), return_dict=False)[0].float()


class EmbeddedStep(Step):
    """The same with a guide, which takes the guidance scale."""

    def __init__(self, unet: nn.Module, config: guide.Config) -> None:
        super().__init__(unet)
        self.guide = Guide(config)

    def forward(  # type: ignore[override]
        self, latents: Tensor, timestep: Tensor, coefficients: Tensor, guidance_scale: Tensor, prompt_embeds: Tensor
    ) -> Tensor:
        """As `Step.forward`, with guidance_scale []; all float32."""
        with self.guide.acting(self.unet, timestep, prompt_embeds, guidance_scale):
            return super().forward(latents, timestep, coefficients, prompt_embeds)


class GuidedStep(Step):
    """The same with classifier-free guidance: both predictions in one batch."""

    def __init__(self, unet: nn.Module, rescale: float) -> None:
        super().__init__(unet)
        self.rescale = rescale

    def forward(  # type: ignore[override]
        self,
        latents: Tensor,
        timestep: Tensor,
        coefficients: Tensor,
        guidance_scale: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
    ) -> Tensor:
        """As `Step.forward`, with guidance_scale [] and negative_prompt_embeds [B, L, D]; all float32."""
        sample = latents * coefficients[0]
        embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        both = self.predict(torch.cat([sample, sample]), timestep, embeds)
        # Slices, not chunk: torch.export would fix the batch size to make chunk's number of outputs known.
        batch = latents.shape[0]
        unconditional, conditional = both[:batch], both[batch:]
        predicted = unconditional + guidance_scale * (conditional - unconditional)
        if self.rescale:  # arXiv 2305.08891, eq. 15 and 16
            ratio = _std(conditional) / _std(predicted)
            predicted = predicted * (self.rescale * ratio + (1 - self.rescale))
        return coefficients[1] * latents + coefficients[2] * predicted


def _std(x: Tensor) -> Tensor:
    return x.std(dim=(1, 2, 3), keepdim=True)


class TextEncoder(nn.Module):
    """input_ids [B, L] int64 to prompt_embeds [B, L, D] float32."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids, return_dict=False)[0].float()


class Decoder(nn.Module):
    """latents [B, C, H, W] float32 to images [B, 8 H, 8 W, 3] uint8."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        vae.encoder = vae.quant_conv = None  # the graph needs the decoder's half only
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        scaled = (latents / self.vae.config.scaling_factor).to(next(self.vae.parameters()).dtype)
        image = self.vae.decode(scaled, return_dict=False)[0].float()
        # Channels last before the conversion: TensorRT-RTX 1.7 rejects a permute of uint8.
        pixels = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
        return pixels.round().to(torch.uint8)


class StableDiffusion:
    """See `glance_trt.export.families.Family`."""

    name = "stable-diffusion"
    components: ClassVar[dict[str, str]] = {"text_encoder": "text_encoder", "denoiser": "unet", "decoder": "vae"}

    def __init__(self, model: Path, recipe: Recipe) -> None:
        self._model, self._recipe = model, recipe
        self._configs = {
            part: read_json(model / part / "config.json", f"{model / part}: missing, with its config.json")
            for part in self.components.values()
        }
        unet = self._configs["unet"]
        if unet.get("class_embed_type") or unet.get("addition_embed_type"):
            raise ModelError(
                f"{model / 'unet'}: a UNet with class or added embeddings is not Stable Diffusion 1.x or 2.x"
            )

    def sources(self, guides: Mapping[str, GuideFile] | None = None) -> dict[str, Source]:
        unet, text, vae = (self._configs[part] for part in ("unet", "text_encoder", "vae"))
        length = text["max_position_embeddings"]
        multiple = 2 ** (len(unet["block_out_channels"]) - 1)
        height, width = f"{multiple}*h", f"{multiple}*w"
        limits = {"batch": _MAX_BATCH, "h": 4096 // multiple, "w": 4096 // multiple}
        sizes = {"batch": 2, "h": 3, "w": 5}
        latents = ("batch", unet["in_channels"], height, width)
        embeds = ("batch", length, text["hidden_size"])
        plain = (
            Port("latents", "float32", latents, "latents"),
            Port("timestep", "float32", (), "table.timestep"),
            Port("coefficients", "float32", (3,), "table.coefficients"),
            Port("prompt_embeds", "float32", embeds, "condition.prompt_embeds"),
        )
        embedded = (*plain[:3], Port("guidance_scale", "float32", (), "guidance_scale"), plain[3])
        guided = (*embedded, Port("negative_prompt_embeds", "float32", embeds, "negative.prompt_embeds"))
        outputs = (Port("latents_out", "float32", latents),)

        def step(build: Callable[[], nn.Module], inputs: tuple[Port, ...]) -> Source:
            return Source("denoiser", build, inputs, outputs, "unet.", sizes, limits)

        cfg = self._recipe.guidance.mode == "cfg"
        # Phases with guides of one shape share a trace.
        by_config = {
            str(item.config): step(functools.partial(self._embedded_step, item.config), embedded)
            for item in (guides or {}).values()
        }
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        pixels = ("batch", f"{factor * multiple}*h", f"{factor * multiple}*w", 3)
        return {
            "text_encoder": Source(
                "text_encoder",
                lambda: TextEncoder(CLIPTextModel(CLIPTextConfig(**text))),
                (Port("input_ids", "int64", ("batch", length), "tokens.tokenizer"),),
                (Port("prompt_embeds", "float32", embeds),),
                "encoder.",
                {"batch": 2},
                {"batch": _MAX_BATCH},
            ),
            "denoiser": step(self._guided_step, guided) if cfg else step(lambda: Step(self._unet()), plain),
            **{f"denoiser.{phase}": by_config[str(item.config)] for phase, item in (guides or {}).items()},
            "decoder": Source(
                "decoder",
                lambda: Decoder(AutoencoderKL.from_config(vae)),
                (Port("latents", "float32", latents, "latents"),),
                (Port("images", "uint8", pixels),),
                "vae.",
                sizes,
                limits,
            ),
        }

    def _unet(self) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_config(self._configs["unet"])

    def _embedded_step(self, config: guide.Config) -> nn.Module:
        return EmbeddedStep(self._unet(), config)

    def _guided_step(self) -> nn.Module:
        return GuidedStep(self._unet(), self._recipe.guidance.rescale)

    def reduced(self, guides: Mapping[str, GuideFile]) -> tuple[StableDiffusion, dict[str, GuideFile]]:
        """See `Family.reduced`."""
        text, unet, vae = (self._configs[part] for part in ("text_encoder", "unet", "vae"))
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
        blocks = {"layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 64}
        small = copy.copy(self)
        small._configs = {
            "text_encoder": text | narrow,
            "unet": unet | blocks | {"block_out_channels": _few_channels(unet)},
            "vae": vae | {"layers_per_block": 1, "block_out_channels": _few_channels(vae)},
        }
        return small, {phase: _fitted(item, small._configs["unet"]) for phase, item in guides.items()}

    def weight_name(self, name: str) -> str:
        if match := _VAE_ATTENTION.fullmatch(name):
            return f"{match[1]}{_OLD_VAE_NAMES[match[2]]}{match[3]}"
        # Until transformers 5 the modules of CLIPTextModel lay one level deeper.
        return f"text_model.{name}"

    def scheduler_config(self) -> dict[str, Any]:
        folder = self._model / "scheduler"
        config = read_json(folder / "scheduler_config.json", f"{folder}: missing, with its scheduler_config.json")
        if self._recipe.scheduler:
            config["_class_name"] = self._recipe.scheduler
        if str(config.get("_class_name")).startswith("FlowMatch"):
            raise ModelError(
                f"{self._model}: the scheduler is a {config['_class_name']}, and flow matching has another target than "
                "the noise or velocity of Stable Diffusion; take a diffusion scheduler such as DDIMScheduler"
            )
        # StableDiffusionPipeline corrects these two in every scheduler it is given; old configurations rely on it.
        return config | {"steps_offset": 1, "clip_sample": False}

    def image(self) -> Image:
        recipe, unet = self._recipe, self._configs["unet"]
        scale = 2 ** (len(self._configs["vae"]["block_out_channels"]) - 1)
        multiple = scale * 2 ** (len(unet["block_out_channels"]) - 1)
        for key in ("height", "width"):
            size = getattr(recipe, key)
            if size % multiple:
                near = max(multiple, round(size / multiple) * multiple)
                raise RecipeError(f"{key}: {size} is not a multiple of {multiple}, as this model needs; try {near}")
        return Image(recipe.height, recipe.width, unet["in_channels"], scale)

    def tokenizers(self) -> dict[str, tuple[str, int, int]]:
        try:
            tokenizer = CLIPTokenizer.from_pretrained(self._model / "tokenizer", local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{self._model / 'tokenizer'}: not a readable CLIP tokenizer: {error}") from None
        length = self._configs["text_encoder"]["max_position_embeddings"]
        return {"tokenizer": (tokenizer.backend_tokenizer.to_str(), length, tokenizer.pad_token_id)}


def _few_channels(config: Mapping[str, Any]) -> list[int]:
    """As few as the group norms allow, and equal where the model's are."""
    channels = config["block_out_channels"]
    sizes = sorted(set(channels))
    return [(1 + sizes.index(size)) * config.get("norm_num_groups", 32) for size in channels]


def _fitted(item: GuideFile, unet: Mapping[str, Any]) -> GuideFile:
    channels = guide.blocks(item.config.kind, unet)
    config = guide.Config(item.config.kind, channels, dict.fromkeys(channels, 8), unet["cross_attention_dim"])
    return GuideFile(item.file, config, {})

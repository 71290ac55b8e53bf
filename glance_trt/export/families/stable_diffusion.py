"""Stable Diffusion 1.x and 2.x: CLIP text encoder, UNet2DConditionModel, AutoencoderKL.

PyTorch is imported where a module is built: what a model folder says of itself is known without it.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from glance_trt.bundle import DType, Image, Port
from glance_trt.errors import ModelError, RecipeError
from glance_trt.export.families import read_json
from glance_trt.export.source import Source
from glance_trt.recipe import Recipe

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import nn

    from glance_trt.export.guide import Config, GuideFile

# UNet2DConditionModel's upsampler takes another path from a batch of 64 on (a workaround for a bfloat16 kernel that
# counted in 32 bits); guidance doubles the batch, so 31 images are what one traced graph can promise.
_MAX_BATCH = 31

# What early diffusers versions, and so the published files of Stable Diffusion 1, call the VAE's attention.
_OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_VAE_ATTENTION = re.compile(rf"(decoder\.mid_block\.attentions\.\d+\.)({'|'.join(_OLD_VAE_NAMES)})(\.\w+)")


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
                self._text_encoder,
                (Port("input_ids", "int64", ("batch", length), "tokens.tokenizer"),),
                (Port("prompt_embeds", "float32", embeds),),
                "encoder.",
                {"batch": 2},
                {"batch": _MAX_BATCH},
            ),
            "denoiser": step(self._guided_step, guided) if cfg else step(self._step, plain),
            **{f"denoiser.{phase}": by_config[str(item.config)] for phase, item in (guides or {}).items()},
            "decoder": Source(
                "decoder",
                self._decoder,
                (Port("latents", "float32", latents, "latents"),),
                (Port("images", "uint8", pixels),),
                "vae.",
                sizes,
                limits,
            ),
        }

    def _unet(self) -> UNet2DConditionModel:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_config(self._configs["unet"])

    def _step(self) -> nn.Module:
        from glance_trt.export.modules import Step

        return Step(self._unet())

    def _embedded_step(self, config: Config) -> nn.Module:
        from glance_trt.export.modules import EmbeddedStep

        return EmbeddedStep(self._unet(), config)

    def _guided_step(self) -> nn.Module:
        from glance_trt.export.modules import GuidedStep

        return GuidedStep(self._unet(), self._recipe.guidance.rescale)

    def _text_encoder(self) -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel

        from glance_trt.export.modules import TextEncoder

        return TextEncoder(CLIPTextModel(CLIPTextConfig(**self._configs["text_encoder"])))

    def _decoder(self) -> nn.Module:
        from diffusers import AutoencoderKL

        from glance_trt.export.modules import Decoder

        return Decoder(AutoencoderKL.from_config(self._configs["vae"]))

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

    def dtype(self, kind: str, wanted: DType) -> DType:
        """See `Family.dtype`: all of this family's parts compute in float16.

        A VAE's force_upcast is not asked: diffusers writes it into every new configuration, and its Stable Diffusion
        pipeline, unlike that of SDXL, does not heed it.
        """
        return wanted

    def files(self) -> list[Path]:
        """See `Family.files`."""
        configs = [self._model / part / "config.json" for part in self.components.values()]
        tokenizer = sorted(path for path in (self._model / "tokenizer").glob("*") if path.is_file())
        return [self._model / "model_index.json", *configs, self._scheduler_file(), *tokenizer]

    def weight_name(self, name: str) -> str:
        if match := _VAE_ATTENTION.fullmatch(name):
            return f"{match[1]}{_OLD_VAE_NAMES[match[2]]}{match[3]}"
        # Until transformers 5 the modules of CLIPTextModel lay one level deeper.
        return f"text_model.{name}"

    def scheduler_config(self) -> dict[str, Any]:
        file = self._scheduler_file()
        config = read_json(file, f"{file.parent}: missing, with its {file.name}")
        if self._recipe.scheduler:
            config["_class_name"] = self._recipe.scheduler
        if str(config.get("_class_name")).startswith("FlowMatch"):
            raise ModelError(
                f"{self._model}: the scheduler is a {config['_class_name']}, and flow matching has another target than "
                "the noise or velocity of Stable Diffusion; take a diffusion scheduler such as DDIMScheduler"
            )
        # StableDiffusionPipeline corrects these two in every scheduler it is given; old configurations rely on it.
        return config | {"steps_offset": 1, "clip_sample": False}

    def _scheduler_file(self) -> Path:
        return self._model / "scheduler" / "scheduler_config.json"

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
        from transformers import CLIPTokenizer

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
    from glance_trt.export import guide

    channels = guide.blocks(item.config.kind, unet)
    config = guide.Config(item.config.kind, channels, dict.fromkeys(channels, 8), unet["cross_attention_dim"])
    return guide.GuideFile(item.file, config, {})

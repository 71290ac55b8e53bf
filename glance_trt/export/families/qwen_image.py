"""Qwen-Image: Qwen2.5-VL as text encoder, QwenImageTransformer2DModel, AutoencoderKLQwenImage."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from glance_trt.bundle import DType, Port
from glance_trt.errors import ModelError, RecipeError
from glance_trt.export.families import TokenizerSource
from glance_trt.export.families.adapter import Adapter
from glance_trt.export.model import Model
from glance_trt.export.source import Source
from glance_trt.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from glance_trt.export.guide import GuideFile

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""What QwenImagePipeline puts a prompt into."""

DROPPED = 34
"""Tokens of it that stand before the prompt. What the text encoder makes of them is dropped."""

_PROMPT_TOKENS = 512  # diffusers' default
_VARIANTS = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope", "zero_cond_t")


class QwenImage(Adapter):
    """See `glance_trt.export.families.Family`."""

    name = "qwen-image"
    parts: ClassVar[Mapping[str, str | None]] = {
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
    }
    most_tokens = 1024

    def __init__(self, model: Model, recipe: Recipe) -> None:
        if recipe.decoder:
            raise RecipeError("decoder: QwenImagePipeline takes no AutoencoderTiny; leave it out")
        if recipe.guidance.rescale:
            raise RecipeError("guidance.rescale: Qwen-Image rescales the guided prediction by itself; leave it out")
        super().__init__(model, recipe)
        self.prompt_tokens = recipe.prompt_tokens or _PROMPT_TOKENS
        transformer, vae = self.configs["transformer"], self.configs["vae"]
        if variant := next((key for key in _VARIANTS if transformer.get(key)), None):
            raise ModelError(
                f"{model.path('transformer')}: {variant} is on, as in models that edit or make layers, which are not "
                "supported"
            )
        channels = 4 * vae["z_dim"]
        if transformer["in_channels"] != channels or vae.get("input_channels", 3) != 3:
            raise ModelError(
                f"{model.folder}: the transformer takes {transformer['in_channels']} channels and the VAE images of "
                f"{vae.get('input_channels', 3)}; expected {channels}, four times the VAE's z_dim, and 3"
            )
        if self._text().get("use_sliding_window"):
            raise ModelError(f"{model.path('text_encoder')}: use_sliding_window is on, which is not supported")

    def sources(self, guides: Mapping[str, GuideFile] | None = None) -> dict[str, Source]:
        """See `Family.sources`."""
        length = self.prompt_tokens
        conditions = [
            Port("prompt_embeds", "float32", ("batch", length, self._text()["hidden_size"])),
            Port("prompt_embeds_mask", "int64", ("batch", length)),
        ]
        encoder = self.text_encoder("text_encoder", self._text_encoder, conditions, DROPPED + length, masked=True)
        builds = {"decoder": self._decoder, "encoder": self._encoder}
        vae = {kind: dataclasses.replace(item, build=builds[kind]) for kind, item in self.autoencoder().items()}
        return {"text_encoder": encoder, "denoiser": self.step(self._step, conditions), **vae}

    def _text_encoder(self) -> nn.Module:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel

        from glance_trt.export.families.qwen_image_modules import TextEncoder

        return TextEncoder(Qwen2_5_VLTextModel(Qwen2_5_VLConfig(**self.configs["text_encoder"]).text_config), DROPPED)

    def _step(self) -> nn.Module:
        from diffusers import QwenImageTransformer2DModel

        from glance_trt.export.families.qwen_image_modules import QwenImageStep

        transformer = QwenImageTransformer2DModel.from_config(self.configs["transformer"])
        return QwenImageStep(transformer, self.recipe.guidance.mode)

    def _decoder(self) -> nn.Module:
        from diffusers import AutoencoderKLQwenImage

        from glance_trt.export.families.qwen_image_modules import Decoder

        return Decoder(AutoencoderKLQwenImage.from_config(self.configs["vae"]))

    def _encoder(self) -> nn.Module:
        from diffusers import AutoencoderKLQwenImage

        from glance_trt.export.families.qwen_image_modules import Encoder

        return Encoder(AutoencoderKLQwenImage.from_config(self.configs["vae"]))

    def reduced(self, guides: Mapping[str, GuideFile]) -> tuple[QwenImage, dict[str, GuideFile]]:
        """See `Family.reduced`."""
        text = self._text()
        hidden = 2 * (text["hidden_size"] // text["num_attention_heads"])  # two heads of the model's own size
        narrow = {"hidden_size": hidden, "intermediate_size": 128, "vocab_size": 64, "pad_token_id": None}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "layer_types": None}
        small = copy.copy(self)
        small.configs = {
            "text_encoder": {"text_config": text | narrow | heads},
            "transformer": self.configs["transformer"]
            | {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": hidden},
            "vae": self.configs["vae"] | {"base_dim": 16, "num_res_blocks": 1},
        }
        return small, {}

    def _text(self) -> dict[str, Any]:
        """The configuration of the text encoder's language model, which older files do not set apart."""
        config = self.configs["text_encoder"]
        return dict(config.get("text_config") or config)

    def aliases(self, name: str) -> Iterable[str]:
        """See `Family.aliases`: where transformers has put Qwen2.5-VL's language model over time."""
        return [f"{prefix}.{name}" for prefix in ("model.language_model", "model", "language_model.model")]

    def dtype(self, kind: str, wanted: DType) -> DType:
        """See `Family.dtype`: both transformers were trained in bfloat16, and overflow in float16."""
        return "bfloat16" if wanted == "float16" and kind in ("text_encoder", "denoiser") else wanted

    def latent_channels(self) -> int:
        """See `Adapter.latent_channels`."""
        return int(self.configs["vae"]["z_dim"])

    def latent_scale(self) -> int:
        """See `Adapter.latent_scale`."""
        return int(2 ** len(self.configs["vae"]["temperal_downsample"]))

    def tokenizers(self) -> dict[str, TokenizerSource]:
        """See `Family.tokenizers`."""
        length = DROPPED + self.prompt_tokens
        return {"tokenizer": self.tokenizer("tokenizer", length, template=TEMPLATE, kind="Qwen2Tokenizer")}

"""What the adapters of most families share: parts found by name, ports, sizes, and a scheduler's configuration.

PyTorch is imported where a module is built: what a model says of itself is known without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from glance_trt.bundle import DType, Image, Port
from glance_trt.errors import ModelError, RecipeError
from glance_trt.export.families import TokenizerSource
from glance_trt.export.families import autoencoder as autoencoders
from glance_trt.export.model import Model
from glance_trt.export.source import Source
from glance_trt.recipe import Recipe
from glance_trt.schedule import is_flow_matching
from glance_trt.schema import PROMPT

if TYPE_CHECKING:
    from torch import nn

    from glance_trt.export.guide import GuideFile

MAX_BATCH = 31
"""UNet2DConditionModel's upsampler takes another path from a batch of 64 on (a workaround for a bfloat16 kernel that
counted in 32 bits); guidance doubles the batch, so 31 images are what one traced graph can promise."""

_LARGEST = 4096  # latents along a side
_NOT_READ = ("feature_extractor", "image_encoder", "safety_checker")
"""Parts that diffusers' pipelines may have, and that have no say in an image made from a prompt."""


class Adapter:
    """See `glance_trt.export.families.Family`.

    text_encoders: the parts that encode prompts; those that model_index.json leaves out are left out. multiple: of
    latents along a side, what the denoiser takes.
    """

    name: str
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    denoiser: ClassVar[str] = "transformer"
    parts: ClassVar[Mapping[str, str | None]]
    """Parts that each model of the family has, with their classes where others would be other models."""
    schedulers: ClassVar[Literal["diffusion", "flow matching"]] = "flow matching"
    multiple: int = 2
    takes_scale = False
    """Whether the denoiser itself takes the guidance scale."""
    most_tokens: ClassVar[int | None] = None
    """Of a prompt, where the recipe may choose."""
    takes_guides = False
    """Whether guides (`glance_trt.export.guide`) fit the denoiser."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self._check_index()
        encoders = [part for part in self.text_encoders if model.has(part)]
        self.components = {part: part for part in encoders} | {"denoiser": self.denoiser, "decoder": "vae"}
        self.configs = {part: model.config(part) for part in dict.fromkeys(self.components.values())}
        if recipe.from_image:
            self.components["encoder"] = "vae"
        self._check_guidance()
        self._check_prompt_tokens()
        self.tiny_decoder: dict[str, Any] = {}
        if recipe.decoder:
            self.components["decoder"] = "decoder"
            self.tiny_decoder = model.config("decoder")
            autoencoders.check_tiny(recipe.decoder, self.tiny_decoder, self.latent_channels(), self.latent_scale())

    def _check_index(self) -> None:
        """That the pipeline has the parts that its images are made with, of the right classes, and no others."""
        folder, found = self.model.folder, self.model.classes()
        tokenizers = [_tokenizer_of(part) for part in self.text_encoders]
        known = sorted({*self.parts, *self.text_encoders, *tokenizers, "scheduler"})
        if strange := sorted(found.keys() - {*known, *_NOT_READ}):
            raise ModelError(f"{folder}: {strange[0]} is no part of {self.name}, which has {', '.join(known)}")
        for part, kind in self.parts.items():
            if part not in found:
                raise ModelError(f"{folder}: model_index.json has no {part}")
            if kind not in (None, found[part]):
                raise ModelError(f"{folder}: the {part} is a {found[part]}; expected a {kind}")

    def _check_guidance(self) -> None:
        for i, phase in enumerate(self.recipe.phases):
            if phase.guide and not self.takes_guides:
                raise RecipeError(f"phases[{i}].guide: guides are for UNets, and this model is a {self.name}")
            if self.recipe.guidance.mode == "embedded" and not (phase.guide or self.takes_scale):
                raise RecipeError(
                    f"phases[{i}].guide: missing; guidance.mode embedded needs one in every phase, for this model "
                    "takes no guidance scale itself"
                )

    def _check_prompt_tokens(self) -> None:
        wanted = self.recipe.prompt_tokens
        if wanted and self.most_tokens is None:
            raise RecipeError("prompt_tokens: this model's text encoder leaves no choice; leave the key out")
        if wanted and self.most_tokens and wanted > self.most_tokens:
            raise RecipeError(f"prompt_tokens: {wanted}; this model takes at most {self.most_tokens}")

    def files(self) -> list[Path]:
        """See `Family.files`. Raises `ModelError` where a tokenizer is missing."""
        parts = dict.fromkeys((*self.configs, self.components["decoder"], "scheduler"))
        configs = [self.model.config_file(part) for part in parts]
        folders = {part: self.model.path(_tokenizer_of(part)) for part in self.text_encoders}
        if missing := [folder for part, folder in folders.items() if part in self.components and not folder.is_dir()]:
            raise ModelError(f"{missing[0]}: missing, with its tokenizer.json; copy or download it too")
        tokenizers = [path for folder in folders.values() for path in sorted(folder.glob("*")) if path.is_file()]
        return [self.model.folder / "model_index.json", *configs, *tokenizers]

    def dtype(self, kind: str, wanted: DType) -> DType:
        """See `Family.dtype`: all parts compute in what is wanted."""
        return wanted

    def aliases(self, name: str) -> Iterable[str]:
        """See `Family.aliases`: those of an AutoencoderKL, and of a text encoder."""
        # Until transformers 5 the modules of CLIPTextModel lay one level deeper.
        return [*autoencoders.aliases(name), f"text_model.{name}", name.removeprefix("text_model.")]

    def scheduler_config(self) -> dict[str, Any]:
        """See `Family.scheduler_config`."""
        config = self.model.config("scheduler")
        if self.recipe.scheduler:
            config["_class_name"] = self.recipe.scheduler
        if is_flow_matching(config) != (self.schedulers == "flow matching"):
            better = {"diffusion": "DDIMScheduler", "flow matching": "FlowMatchEulerDiscreteScheduler"}
            raise ModelError(
                f"{self.model.folder}: the scheduler is a {config.get('_class_name')}, and this model was trained for "
                f"{self.schedulers}; take one such as {better[self.schedulers]}"
            )
        return config

    def image_tokens(self, height: int, width: int) -> int | None:
        """See `Family.image_tokens`: a token is a patch of two by two latents."""
        unit = 2 * self.latent_scale()
        return (height // unit) * (width // unit)

    def image(self) -> Image:
        """See `Family.image`."""
        recipe, scale, unit = self.recipe, self.latent_scale(), self.size_unit()
        largest = unit * self.limits()["h"]
        sides = {"height": [recipe.height], "width": [recipe.width], "tile": [recipe.tile] if recipe.tile else []}
        sides |= {f"sizes[{i}]": [*size] for i, size in enumerate(recipe.sizes)} | {"sides": [*recipe.sides]}
        for key, values in sides.items():
            for value in values:
                if value % unit:
                    near = max(unit, round(value / unit) * unit)
                    raise RecipeError(f"{key}: {value} is not a multiple of {unit}, as this model needs; try {near}")
                if value > largest:
                    raise RecipeError(f"{key}: {value} is more than {largest}, the largest side for this model")
        if recipe.sides and self.scheduler_config().get("use_dynamic_shifting"):
            raise RecipeError("sides: this model's schedule depends on the image's size; list the sizes under 'sizes'")
        return Image(
            recipe.height,
            recipe.width,
            self.latent_channels(),
            scale,
            recipe.sizes,
            (*recipe.sides, unit) if recipe.sides else (),
            (recipe.tile, round(recipe.tile / 4 / unit) * unit) if recipe.tile else (),
        )

    def size_unit(self) -> int:
        """See `Family.size_unit`."""
        return self.latent_scale() * self.multiple

    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.configs["vae"]["latent_channels"])

    def latent_scale(self) -> int:
        """Pixels per latent along each side."""
        return autoencoders.scale(self.configs["vae"])

    def latents(self) -> tuple[int | str, ...]:
        """The shape of the latents, as of a port."""
        return ("batch", self.latent_channels(), f"{self.multiple}*h", f"{self.multiple}*w")

    def sizes(self) -> dict[str, int]:
        """Of a port's dimensions, examples to trace with."""
        return {"batch": 2, "h": 3, "w": 5}

    def limits(self) -> dict[str, int]:
        """Of a port's dimensions, the largest."""
        side = _LARGEST // self.multiple
        return {"batch": MAX_BATCH, "h": side, "w": side}

    def step(self, build: Callable[[], nn.Module], conditions: Sequence[Port], *, guided: bool | None = None) -> Source:
        """The source of a sampling step. conditions: ports without source, named as text encoders put them out.
        guided: that it takes the guidance scale; by default, where the recipe's guidance has one."""
        mode = self.recipe.guidance.mode
        takes_scale = mode != "none" if guided is None else guided
        scale = (Port("guidance_scale", "float32", (), "guidance_scale"),) if takes_scale else ()
        own = [Port(port.name, port.dtype, port.shape, f"condition.{port.name}") for port in conditions]
        negative = [
            Port(f"negative_{port.name}", port.dtype, port.shape, f"negative.{port.name}") for port in conditions
        ]
        inputs = (
            Port("latents", "float32", self.latents(), "latents"),
            Port("timestep", "float32", (), "table.timestep"),
            Port("coefficients", "float32", (3,), "table.coefficients"),
            *scale,
            *own,
            *(negative if mode == "cfg" and not guided else ()),
        )
        outputs = (Port("latents_out", "float32", self.latents()),)
        return Source("denoiser", build, inputs, outputs, "denoiser.", self.sizes(), self.limits())

    def steps(
        self,
        build: Callable[..., nn.Module],
        conditions: Sequence[Port],
        guides: Mapping[str, GuideFile] | None,
    ) -> dict[str, Source]:
        """The sources of the denoiser, where guides fit it; `build` takes the config of one."""
        # Phases with guides of one shape share a trace.
        by_config = {
            str(item.config): self.step(functools.partial(build, item.config), conditions, guided=True)
            for item in (guides or {}).values()
        }
        guided = {f"denoiser.{phase}": by_config[str(item.config)] for phase, item in (guides or {}).items()}
        return {"denoiser": self.step(build, conditions), **guided}

    def text_encoder(
        self, kind: str, build: Callable[[], nn.Module], outputs: Sequence[Port], length: int, *, masked: bool = False
    ) -> Source:
        """The source of a text encoder, whose tokenizer is named like it: ``text_encoder_2``, ``tokenizer_2``."""
        tokenizer = _tokenizer_of(kind)
        inputs = [Port("input_ids", "int64", ("batch", length), f"tokens.{tokenizer}")]
        if masked:
            inputs.append(Port("attention_mask", "int64", ("batch", length), f"mask.{tokenizer}"))
        sizes, limits = {"batch": 2}, {"batch": MAX_BATCH}
        return Source(kind, build, tuple(inputs), tuple(outputs), "encoder.", sizes, limits)

    def autoencoder(self) -> dict[str, Source]:
        """The sources of the decoder, and where the recipe wants images made from others, of the encoder: those of an
        AutoencoderKL, or for the decoder of the recipe's AutoencoderTiny."""
        config = self.configs["vae"]
        factor = self.size_unit()
        pixels = ("batch", f"{factor}*h", f"{factor}*w", 3)
        latents, images = Port("latents", "float32", self.latents(), "latents"), Port("images", "uint8", pixels)
        sizes, limits = self.sizes(), self.limits()
        found = {
            "decoder": Source(
                "decoder",
                functools.partial(autoencoders.decoder, self.tiny_decoder or config),
                (latents,),
                (images,),
                "vae.",
                sizes,
                limits,
            )
        }
        if "encoder" in self.components:
            inputs = (Port("image", "uint8", pixels, "image"), Port("noise", "float32", self.latents(), "noise"))
            found["encoder"] = Source(
                "encoder",
                functools.partial(autoencoders.encoder, config),
                inputs,
                (Port("latents", "float32", self.latents()),),
                "vae.",
                sizes,
                limits,
            )
        return found

    def tokenizer(
        self, part: str, max_length: int, *, template: str = PROMPT, kind: str = "CLIPTokenizer"
    ) -> TokenizerSource:
        """A tokenizer of the model. kind: its class in transformers. Raises `ModelError`."""
        import transformers

        folder = self.model.path(part)
        try:
            found = getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{folder}: not a readable {kind}: {error}") from None
        return TokenizerSource(found.backend_tokenizer.to_str(), max_length, found.pad_token_id, template)


def _tokenizer_of(text_encoder: str) -> str:
    """The part that cuts prompts for a text encoder."""
    return text_encoder.replace("text_encoder", "tokenizer")


def fitted(guides: Mapping[str, GuideFile], unet: Mapping[str, Any]) -> dict[str, GuideFile]:
    """Narrow guides of the same kinds for another UNet, without tensors."""
    from glance_trt.export import guide

    found = {}
    for phase, item in guides.items():
        channels = guide.blocks(item.config.kind, unet)
        config = guide.Config(item.config.kind, channels, dict.fromkeys(channels, 8), unet["cross_attention_dim"])
        found[phase] = guide.GuideFile(item.file, config, {})
    return found

"""One adapter per model family: all that glance-trt knows of a family is in that one file.

An adapter is plain data, which can be sent to another process, and importing it does not import PyTorch.
`glance_trt.export.families.adapter` has what most of them share.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from glance_trt.bundle import DType, Image
from glance_trt.errors import ModelError
from glance_trt.export import model as models
from glance_trt.export.model import Model
from glance_trt.export.source import Source
from glance_trt.progress import Progress, silent
from glance_trt.recipe import Recipe
from glance_trt.schema import PROMPT

if TYPE_CHECKING:
    from glance_trt.export.guide import GuideFile

T = TypeVar("T")

ADAPTERS = {
    "StableDiffusionPipeline": "stable_diffusion.StableDiffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl.StableDiffusionXL",
    "StableDiffusion3Pipeline": "stable_diffusion_3.StableDiffusion3",
    "FluxPipeline": "flux.Flux",
    "QwenImagePipeline": "qwen_image.QwenImage",
}
"""By the class that model_index.json names: the adapter's module here, and its class."""


@dataclass(frozen=True)
class TokenizerSource:
    """A ``tokenizer.json``, as text; the other fields are as in `glance_trt.bundle.Tokenizer`."""

    text: str
    max_length: int
    pad_token_id: int
    template: str = PROMPT


class Family(Protocol):
    """What the export asks of a family's adapter."""

    name: str
    model: Model
    components: dict[str, str]
    """The part of the model from which each kind of graph takes its weights: ``denoiser``, ``decoder``, the text
    encoders, and ``encoder`` where the recipe wants images made from others."""

    def sources(self, guides: Mapping[str, GuideFile] | None = None) -> dict[str, Source]:
        """The graphs to trace, by the same names; the denoiser's is one whole sampling step. A phase that has a guide
        has its own, ``denoiser.<phase>``."""

    def reduced(self, guides: Mapping[str, GuideFile]) -> tuple[Family, dict[str, GuideFile]]:
        """A small model of the same blocks, without weights: the same kinds of graphs with few channels, layers and
        heads. The guides fit it, and have no tensors."""

    def dtype(self, kind: str, wanted: DType) -> DType:
        """What a component is to compute in where a target wants ``float32``, ``float16`` or ``bfloat16``: another
        dtype where in that one the model is known to fail."""

    def files(self) -> list[Path]:
        """The files of the model that decide what is built, besides weights: configurations and tokenizers."""

    def aliases(self, name: str) -> Iterable[str]:
        """Other names that a parameter of the traced module may have in weights files."""

    def scheduler_config(self) -> dict[str, Any]:
        """The model's scheduler configuration, with the recipe's choice of class."""

    def image_tokens(self, height: int, width: int) -> int | None:
        """The length of the token sequence of an image, where a schedule depends on it."""

    def size_unit(self) -> int:
        """What sides of images are multiples of, pixels."""

    def image(self) -> Image:
        """The recipe's image sizes, checked. Raises `RecipeError`."""

    def tokenizers(self) -> dict[str, TokenizerSource]:
        """By the name that inputs of text encoders refer to."""


def source_of(sources: Mapping[str, Source], graph: str) -> Source:
    """Of what `Family.sources` returns, that of a bundle's graph, such as ``denoiser.slow``."""
    return sources.get(graph) or sources[graph.partition(".")[0]]


def stored(family: Family, names: Iterable[str], tensors: Mapping[str, T], place: Path) -> dict[str, T]:
    """Of a part's tensors, those of a traced module's parameters, under whichever name a weights file has them.

    place: of the weights. Raises `ModelError` where there is none for a parameter.
    """
    found, lacking = {}, []
    for name in names:
        known = next((known for known in (name, *family.aliases(name)) if known in tensors), None)
        if known is None:
            lacking.append(name)
        else:
            found[name] = tensors[known]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ModelError(f"{place}: its weights lack {lacking[0]}{more}")
    return found


def from_recipe(recipe: Recipe, folder: Path, progress: Progress = silent, *, whole: bool = True) -> Family:
    """The adapter for a recipe's model; `folder` is the recipe's. progress and whole are as in `models.find`. Raises
    `ModelError` and `RecipeError`."""
    return open_model(models.find(recipe, folder, progress, whole=whole), recipe)


def open_model(model: Model, recipe: Recipe) -> Family:
    """The adapter for a model. Raises `ModelError` where it is unsupported, `RecipeError` where the recipe asks what it
    cannot do."""
    found = model.index().get("_class_name")
    if not isinstance(found, str):
        raise ModelError(f"{model.folder}: model_index.json has no _class_name; supported: {', '.join(ADAPTERS)}")
    if found not in ADAPTERS:
        raise ModelError(f"{model.folder}: {found} is not supported; supported pipelines: {', '.join(ADAPTERS)}")
    module, _, name = ADAPTERS[found].partition(".")
    adapter = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return adapter(model, recipe)  # type: ignore[no-any-return]

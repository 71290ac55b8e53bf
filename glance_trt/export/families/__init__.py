"""One adapter per model family: all that glance-trt knows of a family is in that one file.

An adapter is plain data, which can be sent to another process, and importing it does not import PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from glance_trt.bundle import DType, Image
from glance_trt.errors import ModelError
from glance_trt.export.source import Source
from glance_trt.recipe import Recipe

if TYPE_CHECKING:
    from glance_trt.export.guide import GuideFile


class Family(Protocol):
    """What the export asks of a family's adapter."""

    name: str
    components: ClassVar[dict[str, str]]
    """The model's folder from which each graph takes its weights: ``denoiser``, ``text_encoder``, ``decoder``."""

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

    def weight_name(self, name: str) -> str:
        """The name that a parameter of the traced module may have in older weights files."""

    def scheduler_config(self) -> dict[str, Any]:
        """The model's scheduler configuration, with the recipe's choice of class."""

    def image(self) -> Image:
        """The recipe's image size, checked. Raises `RecipeError`."""

    def tokenizers(self) -> dict[str, tuple[str, int, int]]:
        """By the text encoder's input: tokenizer.json's text, the maximum length, the padding token."""


def source_of(sources: Mapping[str, Source], graph: str) -> Source:
    """Of what `Family.sources` returns, that of a bundle's graph, such as ``denoiser.slow``."""
    return sources.get(graph) or sources[graph.partition(".")[0]]


def open_model(model: Path, recipe: Recipe) -> Family:
    """The adapter for a model folder in diffusers' layout. Raises `ModelError` where it is none, or unsupported."""
    from glance_trt.export.families.stable_diffusion import StableDiffusion

    supported = {"StableDiffusionPipeline": StableDiffusion}
    if not model.is_dir():
        what = "a file" if model.exists() else "no such folder"
        raise ModelError(f"{model}: {what}; a model is a folder in diffusers' layout, nothing is downloaded")
    found = read_json(
        model / "model_index.json", f"{model}: not a diffusers pipeline folder, it has no model_index.json"
    )
    name = found.get("_class_name")
    if name not in supported:
        raise ModelError(f"{model}: {name} is not supported; supported pipelines: {', '.join(supported)}")
    return supported[name](model, recipe)


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """A JSON object; raises `ModelError` with `missing` if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(missing) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value

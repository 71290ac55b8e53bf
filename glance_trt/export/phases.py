"""What a recipe's phases add to the base model: the LoRA and guide files that they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from glance_trt.errors import LoraError, RecipeError
from glance_trt.export import lora
from glance_trt.export.families import Family
from glance_trt.export.lora import Lora, Pair
from glance_trt.export.weights import TensorRef
from glance_trt.manifest import TEXT_ENCODER
from glance_trt.recipe import Recipe

if TYPE_CHECKING:
    from glance_trt.export.guide import GuideFile


def loras(recipe: Recipe, folder: Path, tensors: Mapping[str, Mapping[str, TensorRef]]) -> dict[str, Lora | None]:
    """Each phase's LoRA for a model of these tensors by component, or nothing. Raises `LoraError`."""
    texts = {kind: refs for kind, refs in tensors.items() if TEXT_ENCODER.fullmatch(kind)}
    return {
        phase.name: lora.read(folder / phase.lora.file, tensors["denoiser"], phase.lora.scale, texts)
        if phase.lora
        else None
        for phase in recipe.phases
    }


def encoders(loras: Mapping[str, Lora | None]) -> dict[str, dict[str, Pair]]:
    """What the phases' LoRAs change in the text encoders, by kind and weight.

    A prompt is encoded once for all phases. Raises `LoraError` where two of them differ in that.
    """
    found = [item for item in loras.values() if item and item.encoders]
    for other in found[1:]:
        if _contents(other) != _contents(found[0]):
            raise LoraError(
                f"{other.file}: changes the text encoders in another way than {found[0].file}, and a prompt is encoded "
                "once for all phases; remove the text encoders' tensors from one of the two"
            )
    return found[0].encoders if found else {}


def _contents(item: Lora) -> dict[tuple[str, str], tuple[float, bytes, bytes]]:
    return {
        (kind, name): (pair.scale, pair.down.read_bytes(), pair.up.read_bytes())
        for kind, pairs in item.encoders.items()
        for name, pair in pairs.items()
    }


def guides(recipe: Recipe, folder: Path, family: Family) -> dict[str, GuideFile]:
    """The guides of the phases that have one. Raises `LoraError`."""
    from glance_trt.export import guide

    config = family.model.config(family.components["denoiser"])
    return {phase.name: guide.read(folder / phase.guide, config) for phase in recipe.phases if phase.guide}


def scales(recipe: Recipe, guides: Mapping[str, GuideFile]) -> tuple[float, ...]:
    """The lowest and the highest guidance scale that all guides were trained for; nothing where none says.

    Raises `RecipeError` where the recipe's own is outside.
    """
    known = {phase: item.config.scales for phase, item in guides.items() if item.config.scales}
    for phase, (low, high) in known.items():
        if not low <= recipe.guidance.scale <= high:
            raise RecipeError(
                f"guidance.scale: {recipe.guidance.scale:g} is outside {low:g} to {high:g}, which the guide of phase "
                f"{phase} was trained for"
            )
    return (max(low for low, _ in known.values()), min(high for _, high in known.values())) if known else ()

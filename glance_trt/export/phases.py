"""What a recipe's phases add to the base model: the LoRA and guide files that they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from glance_trt.errors import RecipeError
from glance_trt.export import lora
from glance_trt.export.families import Family, read_json
from glance_trt.export.lora import Lora
from glance_trt.export.weights import TensorRef
from glance_trt.recipe import Recipe

if TYPE_CHECKING:
    from glance_trt.export.guide import GuideFile


def loras(recipe: Recipe, folder: Path, tensors: Mapping[str, TensorRef]) -> dict[str, Lora | None]:
    """Each phase's LoRA for a denoiser of these tensors, or nothing. Raises `LoraError`."""
    return {
        phase.name: lora.read(folder / phase.lora.file, tensors, phase.lora.scale) if phase.lora else None
        for phase in recipe.phases
    }


def guides(recipe: Recipe, folder: Path, family: Family) -> dict[str, GuideFile]:
    """The guides of the phases that have one. Raises `LoraError`."""
    from glance_trt.export import guide

    component = folder / recipe.model / family.components["denoiser"]
    config = read_json(component / "config.json", f"{component}: missing, with its config.json")
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

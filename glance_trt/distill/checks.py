"""What can be told to be wrong with a recipe's training before PyTorch is loaded, which takes seconds."""

from __future__ import annotations

from glance_trt.errors import RecipeError
from glance_trt.recipe import Distill, Recipe

SIZE_MULTIPLE = 8
"""Of images, in pixels; what diffusers' pipeline asks for."""


def settings_of(recipe: Recipe) -> Distill:
    """How a recipe is to be distilled. Raises `RecipeError` where it does not say, or says what cannot be."""
    settings = recipe.distill
    if settings is None:
        raise RecipeError(
            "distill: missing; training needs at least a prompt there, such as 'distill: {prompt: a cat}'"
        )
    for key in ("height", "width"):
        if getattr(recipe, key) % SIZE_MULTIPLE:
            raise RecipeError(f"{key}: {getattr(recipe, key)} is not a multiple of {SIZE_MULTIPLE}")
    learns_guidance = settings.method == "guidance" or any(phase.guide for phase in recipe.phases)
    if learns_guidance and recipe.teacher_guidance.mode == "none":
        raise RecipeError("distill.guidance.mode: none holds no guidance to learn; give the teacher's, cfg")
    for i, phase in enumerate(recipe.phases):
        if phase.guide is not None and settings.method == "ground-truth":
            raise RecipeError(f"phases[{i}].guide: ground truth holds no guidance to learn; use another distill.method")
        if phase.guide is not None and not settings.scales[0] <= recipe.guidance.scale <= settings.scales[1]:
            raise RecipeError(
                f"guidance.scale: {recipe.guidance.scale:g} is not among the scales that the guides would learn, "
                f"distill.scales, {settings.scales[0]:g} to {settings.scales[1]:g}"
            )
        if phase.guide is not None and settings.guide == "embedding" and phase.lora is None:
            raise RecipeError(f"phases[{i}]: an embedding of the scale acts through a LoRA; name one, or another guide")
        if phase.lora and not phase.guide and recipe.guidance.mode == "cfg" and settings.method != "ground-truth":
            raise RecipeError(
                f"guidance.mode: cfg would guide twice what distill.method {settings.method} teaches the LoRA of phase "
                f"{phase.name}; set it to none, and distill.guidance to the teacher's"
            )
    if not any(phase.lora or phase.guide for phase in recipe.phases):
        raise RecipeError("phases: none names a lora or a guide file, so there is nothing to train")
    return settings

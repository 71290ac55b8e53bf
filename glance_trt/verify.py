"""Compares a bundle's engines with PyTorch: each graph, and whole images made by diffusers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glance_trt import preflight, recipe
from glance_trt.build import schedules
from glance_trt.bundle import Bundle
from glance_trt.errors import ParityError
from glance_trt.progress import Progress, silent
from glance_trt.prompts import read_prompts
from glance_trt.recipe import Recipe
from glance_trt.runtime.pipeline import Pipeline, choose_target

PSNR = {"float32": 50.0, "float16": 35.0, "bfloat16": 35.0}
"""Of a whole image against diffusers in float32, in decibels, the least that is accepted, by the engines' dtype."""


@dataclass(frozen=True)
class Comparison:
    """The largest difference per graph, and the PSNR of each image in decibels."""

    graphs: Sequence[Any]
    psnr: list[float]


def compare(
    bundle: Bundle,
    recipe_name: str,
    *,
    prompts: Sequence[str] = (),
    images: int | None = None,
    target: str | None = None,
    device: int = 0,
    trust: bool = False,
    progress: Progress = silent,
) -> Comparison:
    """Compare with the model and the LoRAs of a recipe. target, device and trust: as in `Pipeline.open`.

    Image i is made of prompt i with the seed i, from 0 on; after the last prompt comes the first again. prompts: by
    default those that the recipe distils with. images: how many, by default one of each prompt given, or 2. Raises
    `ParityError` where a graph or an image differs too much, or where the recipe has another schedule or guidance, and
    `TargetError` where there is too little memory for the model in float32, which is what is compared with.
    """
    # What cannot be is said before PyTorch is loaded, which takes seconds.
    target = choose_target(bundle, target, device)
    for module in ("torch", "diffusers", "peft"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    from glance_trt.export import inputs, parity, phases
    from glance_trt.export.reference import DiffusersReference

    plan, folder = recipe.load_of(recipe_name, bundle.manifest.name)
    made_from = inputs.read(plan, folder, progress)
    family = made_from.family
    if any(item not in bundle.manifest.schedules.values() for item in schedules(family, plan).values()):
        raise ParityError(f"schedule: {recipe_name} compiles to other steps than the bundle's")
    wanted, given = plan.guidance, bundle.manifest.guidance
    if (wanted.scale, wanted.negative_prompt) != (given.scale, given.negative_prompt):
        raise ParityError(
            f"guidance: scale {wanted.scale:g} and negative prompt {wanted.negative_prompt!r} in {recipe_name}, "
            f"{given.scale:g} and {given.negative_prompt!r} in the bundle"
        )
    guides = phases.guides(plan, folder, family)
    count = images if images is not None else len(prompts) or 2
    preflight.check_memory(preflight.comparing(made_from.parts(), count), preflight.free_memory())
    with Pipeline.open(bundle, target, device=device, trust=trust) as pipeline:
        engines = bundle.manifest.engines[pipeline.target]
        graphs = {name: str(engine.dtype or engines.dtype) for name, engine in engines.graphs.items()}
        least = PSNR[engines.dtype]
        reference = parity.Reference(family, made_from.loras, made_from.encoders, guides)
        results = parity.check(pipeline.runner, graphs, reference, family.sources(guides), progress)
        prompts = prompts or _prompts(plan, folder)
        found = []
        if count:
            by_diffusers = DiffusersReference(plan, folder)
            progress("images", 0, count)
            for seed in range(count):
                prompt = prompts[seed % len(prompts)]
                expected = by_diffusers.generate(prompt, [seed])[0]
                found.append(psnr(np.asarray(pipeline.generate(prompt, seed=seed)[0]), expected))
                if found[-1] < least:
                    raise ParityError(
                        f"image {seed + 1}: {found[-1]:.1f} dB from diffusers, expected {least:g} or more"
                    )
                progress("images", seed + 1, count)
    return Comparison(results, found)


def _prompts(plan: Recipe, folder: Path) -> list[str]:
    if plan.distill and plan.distill.prompts:
        return read_prompts(folder / plan.distill.prompts)
    return [(plan.distill and plan.distill.prompt) or "a photograph"]


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 images, decibels; 99 for equal ones."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))

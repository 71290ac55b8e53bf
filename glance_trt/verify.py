"""Compares a bundle's CPU engines with PyTorch: each graph, and whole images made by diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glance_trt import recipe
from glance_trt.bundle import Bundle
from glance_trt.progress import Progress, silent
from glance_trt.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Comparison:
    """The largest difference per graph, and the PSNR of each image in decibels."""

    graphs: Sequence[Any]
    psnr: list[float]


def compare(bundle: Bundle, recipe_name: str, images: int, progress: Progress = silent) -> Comparison:
    """Compare with the model and the LoRAs of a recipe. Raises `ParityError` where a graph differs too much."""
    from glance_trt.export import lora, parity
    from glance_trt.export.families import open_model
    from glance_trt.export.reference import DiffusersReference
    from glance_trt.export.weights import component_tensors

    plan, folder = recipe.load(recipe_name)
    model = folder / plan.model
    family = open_model(model, plan)
    tensors = component_tensors(model / family.components["denoiser"])
    loras = {
        phase.name: lora.read(folder / phase.lora.file, tensors, phase.lora.scale) if phase.lora else None
        for phase in plan.phases
    }
    with Pipeline.open(bundle) as pipeline:
        dtype = bundle.manifest.engines[pipeline.target].dtype
        graphs = dict.fromkeys(bundle.manifest.graphs, str(dtype))
        reference = parity.Reference(family, model, loras)
        results = parity.check(pipeline.runner, graphs, reference, family.sources(), progress)
        prompt = plan.distill.prompt if plan.distill else "a photograph"
        found = []
        if images:
            by_diffusers = DiffusersReference(plan, folder)
            progress("images", 0, images)
            for seed in range(images):
                expected = by_diffusers.generate(prompt, [seed])[0]
                found.append(psnr(np.asarray(pipeline.generate(prompt, seed=seed)[0]), expected))
                progress("images", seed + 1, images)
    return Comparison(results, found)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 images, decibels; 99 for equal ones."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))

"""What an image asks of a runner: the calls of graphs, and the values that they take, by name.

Values that are the same for every step are called as the graphs' inputs' sources are, such as ``guidance_scale`` and
``condition.prompt_embeds``. Those of step i, counted from 0 in the schedule, are ``timestep.i`` and ``coefficients.i``;
it takes ``latents.i`` and puts out ``latents.i+1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from glance_trt.manifest import Manifest
from glance_trt.runtime.chain import Call
from glance_trt.runtime.settings import Settings

Values = dict[str, Any]
"""Arrays, by name."""

PIXELS = "pixels"
"""What the decoder puts out."""


def of_image(manifest: Manifest, settings: Settings) -> list[Call]:
    """The graphs of a whole image: its steps, and the decoder unless that is to run in tiles."""
    steps = of_steps(manifest, settings)
    if is_tiled(manifest, settings.height, settings.width):
        return steps
    return [*steps, of_graph(manifest, "decoder", PIXELS, steps[-1].outputs[0][1])]


def of_steps(manifest: Manifest, settings: Settings) -> list[Call]:
    """The steps that run."""
    steps = manifest.schedules[settings.schedule].steps
    return [
        of_graph(manifest, f"denoiser.{steps[i].phase}", f"latents.{i + 1}", f"latents.{i}", i)
        for i in range(first_step(manifest, settings), len(steps))
    ]


def of_graph(manifest: Manifest, graph: str, output: str, latents: str = "", step: int = 0) -> Call:
    """A graph, from the named latents to the named output."""

    def value(source: str) -> str:
        kind, _, rest = source.partition(".")
        return latents if kind == "latents" else f"{rest}.{step}" if kind == "table" else source

    item = manifest.graphs[graph]
    return Call(
        graph, tuple((port.name, value(port.source)) for port in item.inputs), ((item.outputs[0].name, output),)
    )


def values(manifest: Manifest, conditions: Sequence[Values], settings: Settings) -> Values:
    """All that the calls of a batch take, but the latents. conditions: of each of its images, [1, ...]."""
    found: Values = {name: np.concatenate([own[name] for own in conditions]) for name in conditions[0]}
    found["guidance_scale"] = np.array(settings.guidance_scale, np.float32)
    for i, step in enumerate(manifest.schedules[settings.schedule].steps):
        found[f"timestep.{i}"] = np.array(step.timestep, np.float32)
        found[f"coefficients.{i}"] = np.array(step.coefficients, np.float32)
    return found


def first_step(manifest: Manifest, settings: Settings) -> int:
    """The first one that runs, counted from 0 in the schedule."""
    return len(manifest.schedules[settings.schedule].steps) - settings.steps


def first_latents(manifest: Manifest, settings: Settings) -> str:
    """The latents that it takes."""
    return f"latents.{first_step(manifest, settings)}"


def is_tiled(manifest: Manifest, height: int, width: int) -> bool:
    """Whether images of this size are decoded in tiles."""
    tile = manifest.image.tile
    return bool(tile) and max(height, width) > tile[0]

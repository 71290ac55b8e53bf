"""What an image is made with: a user's wishes, checked against what a bundle can do and filled in from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glance_trt import limits
from glance_trt.errors import InputError
from glance_trt.manifest import Manifest
from glance_trt.runtime.images import as_image

Size = tuple[int, int]
"""Height and width, pixels."""
Picture = Image.Image | NDArray[np.uint8]
"""An image to start from: of PIL, or [H, W, 3] uint8."""

DEFAULT_STRENGTH = 0.8


class Wishes(TypedDict, total=False):
    """What a user may ask for; what is left out, or None, is taken from the bundle."""

    negative_prompt: str | None
    """What the image should not show."""
    guidance_scale: float | None
    schedule: str | None
    """Its name: one that fits the size, by default the first that does."""
    height: int | None
    """Pixels; with the width, a size that the bundle can make."""
    width: int | None
    image: Picture | None
    """To start from. It is resized to the size; where none is given, to its own, rounded down, if that can be made."""
    strength: float | None
    """How much of the schedule runs from the image, above 0 and at most 1, by default 0.8; see `steps_of`."""


@dataclass(frozen=True)
class Settings:
    """What a prompt is denoised with, once the bundle's defaults are filled in.

    schedule: its name. steps: how many run, the last ones of the schedule. guidance_scale: 1 and negative_prompt: ''
    where the schedule's graphs take none. height, width: pixels. image: to start from, RGB and of this size. strength:
    how much of the schedule runs from there, 0 to 1; 1 without an image.
    """

    schedule: str
    steps: int
    guidance_scale: float
    negative_prompt: str
    height: int
    width: int
    image: Image.Image | None = None
    strength: float = 1.0


def settle(
    manifest: Manifest,
    *,
    negative_prompt: str | None = None,
    guidance_scale: float | None = None,
    schedule: str | None = None,
    height: int | None = None,
    width: int | None = None,
    image: Picture | None = None,
    strength: float | None = None,
) -> Settings:
    """What a bundle makes of `Wishes`. Raises `InputError`."""
    picture = None if image is None else _picture(manifest, image)
    size = _size(manifest, picture, height, width)
    name = _schedule(manifest, schedule, size)
    kinds = source_kinds(manifest, name)
    scale, negative = 1.0, ""
    if "guidance_scale" in kinds:
        scale = _scale(manifest, guidance_scale)
    elif guidance_scale is not None:
        raise InputError("guidance scale: this bundle was built without guidance; leave it out")
    if "negative" in kinds:
        negative = manifest.guidance.negative_prompt if negative_prompt is None else negative_prompt
    elif negative_prompt is not None:
        raise InputError("negative prompt: this bundle takes none, it evaluates no second prompt; leave it out")
    steps = len(manifest.schedules[name].steps)
    if picture is None:
        if strength is not None:
            raise InputError("strength: says how far to go from an image, and there is none; give one, or leave it out")
        return Settings(name, steps, scale, negative, *size)
    strength = DEFAULT_STRENGTH if strength is None else strength
    steps = steps_of(steps, strength, rounded_up=manifest.schedules[name].strength_rounding == "up")
    # As diffusers' VaeImageProcessor does with an image of PIL.
    fitted = picture.resize(size[::-1], Image.Resampling.LANCZOS)
    return Settings(name, steps, scale, negative, *size, fitted, float(strength))


def steps_of(steps: int, strength: float, *, rounded_up: bool = False) -> int:
    """How many steps of a schedule run from an image, the last ones: ``steps * strength``, rounded.

    Both ways round as pipelines of diffusers do in `get_timesteps`, in floating point as they do: those of Stable
    Diffusion and SDXL down, those of Stable Diffusion 3, FLUX and Qwen-Image up. Raises `InputError` where none runs.
    """
    if not _is_float32(strength) or not 0 <= strength <= 1:
        raise InputError(f"strength: expected a number above 0, at most 1, got {strength!r}")
    if rounded_up:
        count = steps - int(max(steps - min(steps * strength, steps), 0))
    else:
        count = min(int(steps * strength), steps)
    if count < 1:
        least = "anything above 0" if rounded_up else f"{math.ceil(1000 / steps) / 1000:g} or more"
        raise InputError(f"strength: {strength:g} runs none of the {steps} steps; give {least}")
    return count


def source_kinds(manifest: Manifest, schedule: str) -> set[str]:
    """What the graphs of a schedule are fed: the kinds of their inputs' sources, such as ``negative``."""
    phases = {step.phase for step in manifest.schedules[schedule].steps}
    ports = [port for phase in phases for port in manifest.graphs[f"denoiser.{phase}"].inputs]
    return {port.source.partition(".")[0] for port in ports}


def _picture(manifest: Manifest, image: Picture) -> Image.Image:
    if "encoder" not in manifest.graphs:
        raise InputError(
            "image: this bundle makes images from text alone; build it from a recipe that says 'from_image: true'"
        )
    return as_image(image)


def _size(manifest: Manifest, picture: Image.Image | None, height: int | None, width: int | None) -> Size:
    """The size that was asked for, or the picture's where it can be made, or else the bundle's usual one."""
    usual = (manifest.image.height, manifest.image.width)
    if picture:
        # diffusers rounds down to what its VAE needs; a multiple of sides may be larger, for the denoiser's sake.
        for multiple in (manifest.image.latent_scale, *manifest.image.sides[2:]):
            near = (picture.height - picture.height % multiple, picture.width - picture.width % multiple)
            if manifest.image.takes(*near):
                usual = near
                break
    for name, side in (("height", height), ("width", width)):
        if side is not None and (isinstance(side, bool) or not isinstance(side, (int, np.integer))):
            raise InputError(f"{name}: expected a whole number of pixels, got {side!r}")
    size = (usual[0] if height is None else int(height), usual[1] if width is None else int(width))
    if not manifest.image.takes(*size):
        raise InputError(
            f"size: {_shown(size)} (height x width); this bundle makes {_sizes(manifest)}. The nearest is "
            f"{_shown(_nearest(manifest, size))}"
        )
    return size


def _schedule(manifest: Manifest, name: str | None, size: Size) -> str:
    schedules = manifest.schedules
    if name is None:
        return next(name for name, schedule in schedules.items() if schedule.fits(*size))
    if name not in schedules:
        raise InputError(f"schedule {name!r}: this bundle has {', '.join(schedules)}")
    if not schedules[name].fits(*size):
        theirs = ", ".join(map(_shown, schedules[name].sizes))
        fitting = ", ".join(other for other, schedule in schedules.items() if schedule.fits(*size))
        raise InputError(
            f"schedule {name!r}: is for {theirs} (height x width), and the size is {_shown(size)}; for that there is "
            f"{fitting}"
        )
    return name


def _scale(manifest: Manifest, wanted: float | None) -> float:
    scale, bounds = manifest.guidance.scale if wanted is None else wanted, manifest.guidance.range
    if not _is_float32(scale):
        raise InputError(f"guidance scale: expected a finite number, got {scale!r}")
    if bounds and not bounds[0] <= scale <= bounds[1]:
        raise InputError(
            f"guidance scale: {scale:g} is outside {bounds[0]:g} to {bounds[1]:g}, which the guide in this bundle was "
            "trained for"
        )
    return float(scale)


def _nearest(manifest: Manifest, size: Size) -> tuple[int, ...]:
    image = manifest.image
    candidates: list[tuple[int, ...]] = [(image.height, image.width), *image.sizes]
    if image.sides:
        low, high, multiple = image.sides
        candidates.append(tuple(min(max(round(side / multiple) * multiple, low), high) for side in size))
    # By ratios, so that it is about of the same shape.
    return min(candidates, key=lambda to: sum(abs(math.log(max(a, 1) / b)) for a, b in zip(size, to, strict=True)))


def _sizes(manifest: Manifest) -> str:
    image = manifest.image
    listed = ", ".join(map(_shown, dict.fromkeys([(image.height, image.width), *image.sizes])))
    if not image.sides:
        return listed
    low, high, multiple = image.sides
    return f"{listed}, and any sides from {low} to {high} that are multiples of {multiple}"


def _shown(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))


def _is_float32(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(-limits.FLOAT32 <= value <= limits.FLOAT32)

"""Targets: which engines to build, for what hardware, and for what sizes. One YAML file each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glance_trt import limits, recipe, strict
from glance_trt.errors import RecipeError

Backend = Literal["onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"]
Provider = Literal["cuda", "tensorrt", "nv_tensorrt_rtx"]
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]
Ranges = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""An optimisation profile of a graph: for each input with named dimensions, its smallest, usual and largest shape."""

_MOST_MIB = limits.INT64 >> 20


@dataclass(frozen=True)
class Profile:
    """What an engine takes, and is best at: the smallest, the usual and the largest value of each.

    batch: images at once. height, width: of the images, pixels; without them, the recipe's.
    """

    batch: tuple[int, ...] = (1, 1, 4)
    height: tuple[int, ...] = ()
    width: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key, most in (("batch", limits.INT32), ("height", limits.IMAGE_SIDE), ("width", limits.IMAGE_SIDE)):
            value = getattr(self, key)
            if value == () and key != "batch":
                continue
            if not (len(value) == 3 and 1 <= value[0] <= value[1] <= value[2] <= most):
                raise strict.Mismatch(
                    f"{key}: expected [smallest, usual, largest], rising, from 1 to {most}; got {list(value)}"
                )


@dataclass(frozen=True)
class Target:
    """Where engines are to run, and what they may be given there. Memory is in MiB.

    What only some backends have is refused for the others. ``docs/recipes.md`` explains every field.
    """

    name: str
    backend: Backend
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    compute_capabilities: tuple[str, ...] = ()
    """Such as ``"8.9"``; for TensorRT-RTX, which compiles for all of them into one plan."""
    profiles: tuple[Profile, ...] = ()
    """Optimisation profiles; without any, one of 1 to 4 images of the recipe's size."""
    workspace: int | None = None
    """The most memory that a layer may use while it runs."""
    weight_streaming: bool = False
    """Build engines whose weights need not all be on the GPU."""
    weight_streaming_budget: int | None = None
    """Of the weights, what stays on the GPU; without it, what TensorRT thinks best."""
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    optimization_level: int | None = None
    """How much time to spend on faster engines, 0 to 5; without it, TensorRT's own 3."""
    timing_cache: bool = False
    """Keep what was measured while building, in the user's cache folder, for the next build."""
    provider: Provider = "cuda"
    """What ONNX Runtime runs on."""

    def __post_init__(self) -> None:
        limits.check_name("name", self.name)
        for field in dataclasses.fields(self):
            given = getattr(self, field.name) != field.default
            if given and field.name in _ONLY and self.backend not in (backends := _ONLY[field.name]):
                raise strict.Mismatch(f"{field.name}: {self.backend} has none; it is for {' and '.join(backends)}")
        for key, least, most in (
            ("workspace", 1, _MOST_MIB),
            ("weight_streaming_budget", 0, _MOST_MIB),
            ("optimization_level", 0, 5),
        ):
            if (value := getattr(self, key)) is not None:
                limits.check_range(key, value, least, most)
        if self.weight_streaming_budget is not None and not self.weight_streaming:
            raise strict.Mismatch("weight_streaming_budget: is for engines that were built with weight_streaming: true")
        self._check_capabilities()

    def _check_capabilities(self) -> None:
        for i, capability in enumerate(self.compute_capabilities):
            if not re.fullmatch(r"\d+\.\d", capability):
                raise strict.Mismatch(
                    f'compute_capabilities[{i}]: expected one such as "8.9", got {strict.shown(capability)}'
                )
        limits.check_distinct("compute_capabilities", self.compute_capabilities)
        if self.backend == "tensorrt-rtx":
            if not self.compute_capabilities:
                raise strict.Mismatch(
                    'compute_capabilities: missing; a TensorRT-RTX plan needs at least one, such as "8.9"'
                )
            if "7.5" in self.compute_capabilities and self.dtype != "float16":
                raise strict.Mismatch(
                    f"dtype: TensorRT-RTX multiplies matrices on compute capability 7.5 in float16, not in {self.dtype}"
                )
        older = [capability for capability in self.compute_capabilities if float(capability) < 8]
        if self.hardware_compatibility == "ampere_plus" and older:
            raise strict.Mismatch(
                f"compute_capabilities: hardware_compatibility: ampere_plus begins at 8.0; got {', '.join(older)}"
            )


_PLANS = ("tensorrt", "tensorrt-rtx")
_ONLY = {
    "compute_capabilities": _PLANS,
    "profiles": _PLANS,
    "workspace": _PLANS,
    "weight_streaming": _PLANS,
    "weight_streaming_budget": _PLANS,
    # Of the following, TensorRT-RTX 1.7 ignores the first, gives the same plan at every level of the second, wants a
    # library for the third that it does not come with (libnvinfer_lean), and measures nothing that could be kept.
    "hardware_compatibility": ("tensorrt",),
    "optimization_level": ("tensorrt",),
    "version_compatible": ("tensorrt",),
    "timing_cache": ("tensorrt",),
    "provider": ("onnxruntime-gpu",),
}
"""By field: the backends that have it."""


def load_all(names: Sequence[str], folder: Path | None = None) -> list[Target]:
    """Read several; one that is asked for twice counts once. folder: of the recipe that names them, if one does.

    Raises `RecipeError` where two have one name.
    """
    found: dict[str, Target] = {}
    for name in dict.fromkeys(names):
        target = load(str(folder / name) if folder and (folder / name).is_file() else name)
        if target.name in found:
            raise RecipeError(f"{name}: a second target of the name {target.name!r}; engines in a bundle go by it")
        found[target.name] = target
    return list(found.values())


def load(name: str) -> Target:
    """Read a target: a YAML file, or the name of a shipped one. Raises `RecipeError`."""
    return recipe.read_yaml(Target, recipe.find(name, "target"))

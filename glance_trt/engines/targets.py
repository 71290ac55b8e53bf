"""Targets: which engines to build, for what hardware. One YAML file each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from glance_trt import recipe, strict
from glance_trt.errors import RecipeError

Backend = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class Target:
    """Where engines are to run, and what they may be given there."""

    name: str
    backend: Backend
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    compute_capabilities: tuple[str, ...] = ()
    """Such as ``"8.9"``; for TensorRT-RTX, which compiles for all of them into one plan."""
    min_batch: int = 1
    opt_batch: int = 1
    max_batch: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise strict.Mismatch("min_batch, opt_batch, max_batch: expected 1 <= min <= opt <= max")
        if self.backend == "tensorrt-rtx" and not self.compute_capabilities:
            raise strict.Mismatch(
                'compute_capabilities: missing; a TensorRT-RTX plan needs at least one, such as "8.9"'
            )


def load_all(names: Sequence[str]) -> list[Target]:
    """Read several; one that is asked for twice counts once. Raises `RecipeError` where two have one name."""
    found: dict[str, Target] = {}
    for name in dict.fromkeys(names):
        target = load(name)
        if target.name in found:
            raise RecipeError(f"{name}: a second target of the name {target.name!r}; engines in a bundle go by it")
        found[target.name] = target
    return list(found.values())


def load(name: str) -> Target:
    """Read a target: a YAML file, or the name of a shipped one. Raises `RecipeError`."""
    return recipe.read_yaml(Target, recipe.find(name, "target"))

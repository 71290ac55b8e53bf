"""Recipes: what to deploy, and how its phase experts are trained. One YAML file per model."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from glance_trt import limits, strict
from glance_trt.errors import RecipeError

if TYPE_CHECKING:
    import yaml

Sampler = Literal["consistent", "released"]
T = TypeVar("T")


@dataclass(frozen=True)
class Lora:
    """A LoRA to fuse. `scale` multiplies ``B @ A``; nothing means alpha / rank where the file has an alpha, else 1."""

    file: str
    scale: float | None = None


@dataclass(frozen=True)
class Phase:
    """A stretch of the denoising: its 1-based steps on the teacher's grid, and the LoRA that runs them.

    Without a LoRA, the base model runs them.
    """

    name: str
    steps: tuple[int, ...]
    lora: Lora | None = None


@dataclass(frozen=True)
class Guidance:
    """How guidance is computed. ``cfg``: two evaluations per step, mixed by `scale`, optionally rescaled
    (arXiv 2305.08891, section 3.4); ``none``: one evaluation, without guidance."""

    mode: Literal["none", "cfg"] = "cfg"
    scale: float = 5.0
    rescale: float = 0.0
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise strict.Mismatch(f"rescale: expected 0 to 1, got {self.rescale}")


@dataclass(frozen=True)
class Distill:
    """Training of the phase experts. The defaults are the paper's (arXiv 2512.02899) for its FLUX base, which names
    the attention projections that Stable Diffusion has too."""

    prompt: str
    image: str | None = None
    """The image of the pair, of the recipe's size; nothing: the base model samples one for `prompt`."""
    rank: int = 16
    alpha: float = 64.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    steps: int = 60
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    batch_size: int = 1
    caption_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("rank", "alpha", "steps", "learning_rate", "batch_size"):
            if not getattr(self, key) > 0:
                raise strict.Mismatch(f"{key}: expected a positive number, got {getattr(self, key)}")
        if not self.targets:
            raise strict.Mismatch("targets: expected at least one layer, such as to_q")
        if self.weight_decay < 0:
            raise strict.Mismatch(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        if not 0 <= self.caption_dropout <= 1:
            raise strict.Mismatch(f"caption_dropout: expected a probability from 0 to 1, got {self.caption_dropout}")
        if not 0 <= self.seed < 2**63:
            raise strict.Mismatch(f"seed: expected a whole number from 0 to 2**63 - 1, got {self.seed}")


@dataclass(frozen=True)
class Recipe:
    """A model to deploy. Paths are relative to the recipe's own folder."""

    name: str
    model: str
    phases: tuple[Phase, ...]
    height: int
    width: int
    teacher_steps: int = 50
    sampler: Sampler = "consistent"
    scheduler: str | None = None
    """Name of the diffusers scheduler to take instead of the model's own, such as ``DDIMScheduler``."""
    guidance: Guidance = field(default_factory=Guidance)
    engines: tuple[str, ...] = ("cpu",)
    distill: Distill | None = None

    def __post_init__(self) -> None:
        limits.check_name("name", self.name)
        if not self.phases:
            raise strict.Mismatch("phases: a recipe needs at least one phase")
        names = [phase.name for phase in self.phases]
        for i, phase in enumerate(self.phases):
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,16}", phase.name):
                raise strict.Mismatch(f"phases[{i}].name: {strict.shown(phase.name)} is not 1 to 16 of A-Z a-z 0-9 _ -")
            if names.index(phase.name) != i:
                raise strict.Mismatch(f"phases[{i}].name: {phase.name!r} stands twice")
        for key in ("height", "width", "teacher_steps"):
            if getattr(self, key) < 1:
                raise strict.Mismatch(f"{key}: expected a positive number, got {strict.shown(getattr(self, key))}")


def load(path: str | Path) -> tuple[Recipe, Path]:
    """Read a recipe: a YAML file, or the name of a shipped one. Returns it with the folder its paths are relative to.

    Raises `RecipeError`, whose text names the file and the key path.
    """
    file = find(str(path), "recipe")
    return read_yaml(Recipe, file), file.parent


def find(name: str, kind: Literal["recipe", "target"]) -> Path:
    """The YAML file `name`, or the shipped recipe or target of that name. Raises `RecipeError`."""
    shipped = shipped_files(kind)
    if os.path.isfile(name):
        return Path(name)
    if name in shipped:
        return shipped[name]
    raise RecipeError(f"{name}: no such file, and no shipped {kind} of that name ({', '.join(shipped) or 'none'})")


def shipped_files(kind: Literal["recipe", "target"]) -> dict[str, Path]:
    """Shipped recipes or targets by name: package data in a wheel, the top-level folders in a checkout."""
    package = Path(__file__).parent
    folder = {"recipe": "export", "target": "engines"}[kind]
    for place in (package / "shipped" / folder, package.parent / folder):
        if files := sorted(place.glob("*.yaml")):
            return {file.stem: file for file in files}
    return {}


def read_yaml(schema: type[T], file: Path) -> T:
    """Read a YAML file into a dataclass. Raises `RecipeError`, whose text names the file and the key path."""
    import yaml

    try:
        return strict.read(schema, yaml.load(file.read_text(encoding="utf-8"), Loader=_loader()))
    except OSError as error:
        raise RecipeError(f"{file}: {error.strerror}") from None
    except strict.Mismatch as error:
        raise RecipeError(f"{file}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no such day as 2001-99-99
        raise RecipeError(f"{file}: not valid YAML: {error}") from None


@functools.cache
def _loader() -> type[yaml.SafeLoader]:
    """PyYAML's safe loader, which also refuses a key that stands twice, and reads 5e-4 as a number (YAML 1.2)."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
            return node

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("+-0123456789")
    )
    return Loader

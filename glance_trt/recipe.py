"""Recipes: what to deploy, and how its phase experts are trained. One YAML file per model."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from glance_trt import limits, strict
from glance_trt.errors import InputError, LoraError, ModelError, RecipeError

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

    Without a LoRA, the base model runs them. `guide` is a file of additional weights that take the guidance scale, so
    that one evaluation gives a guided prediction (`glance_trt.export.guide`).
    """

    name: str
    steps: tuple[int, ...]
    lora: Lora | None = None
    guide: str | None = None


@dataclass(frozen=True)
class Guidance:
    """How guidance is computed. ``cfg``: two evaluations per step, mixed by `scale`, optionally rescaled
    (arXiv 2305.08891, section 3.4); ``none``: one evaluation, without guidance or with a fixed one that a LoRA has
    learned; ``embedded``: one evaluation, in which each phase's guide takes the scale, or the model itself does."""

    mode: Literal["none", "cfg", "embedded"] = "cfg"
    scale: float = 5.0
    rescale: float = 0.0
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise strict.Mismatch(f"rescale: expected 0 to 1, got {self.rescale}")


@dataclass(frozen=True)
class Distill:
    """Training of what the phases name: their LoRAs, their guides, or both at once.

    The defaults are those of Glance (arXiv 2512.02899) for its FLUX base, whose attention projections Stable Diffusion
    has too.
    """

    method: Literal["ground-truth", "guidance", "trajectory"] = "ground-truth"
    """``ground-truth``: the base model's own target, at the phase's knots (Glance). ``guidance``: the base model's
    guided prediction, at all timesteps (arXiv 2312.06899; with a guide, arXiv 2406.01954). ``trajectory``: the states
    that the guided teacher reaches from the same noise, at the phase's knots."""
    prompt: str | None = None
    prompts: str | None = None
    """A file with a caption per line, instead of `prompt`."""
    image: str | None = None
    """The image of `prompt`, of the recipe's size; nothing: the base model samples it."""
    images: str | None = None
    """A folder of such images, each with its caption in a .txt file of the same name, instead of `prompt`."""
    samples: int | None = None
    """How many images or trajectories the base model samples, the prompts taken in turns; nothing: one per prompt."""
    guidance: Guidance | None = None
    """The teacher's. Nothing: the recipe's own, computed in two evaluations where that is embedded."""
    scales: tuple[float, ...] = (2.0, 9.0)
    """The range of guidance scales that a guide is trained over."""
    guide: Literal["embedding", "tiny", "full"] = "embedding"
    """What a phase's guide is: an embedding of the scale, added to that of the time, for a LoRA to act upon; or
    adapters behind the middle and decoder blocks, ``tiny`` with at most 1 % of the base's parameters."""
    on_policy: bool = True
    """Trajectories: train on the states that the experts themselves reach, not on the teacher's."""
    rank: int = 16
    alpha: float = 64.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    steps: int = 60
    learning_rate: float = 5e-4
    decay: Literal["none", "linear"] = "none"
    """Of the learning rate, over all steps."""
    weight_decay: float = 0.01
    batch_size: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in; weights, losses and the optimizer are float32."""
    caption_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        given = [key for key in ("prompt", "prompts", "images") if getattr(self, key) is not None]
        if len(given) != 1:
            raise strict.Mismatch(f"expected one of prompt, prompts and images, got {', '.join(given) or 'none'}")
        if self.prompt is not None and not self.prompt.strip():
            raise strict.Mismatch("prompt: empty; say what the image shows")
        if self.image is not None and self.prompt is None:
            raise strict.Mismatch("image: belongs to a prompt; several images go into a folder, named by images")
        if self.method == "trajectory" and (self.image is not None or self.images is not None):
            raise strict.Mismatch("method: trajectory needs prompts only; leave the images out")
        if self.samples is not None and (self.image is not None or self.images is not None):
            raise strict.Mismatch("samples: the images are given; leave one of the two out")
        for key in ("rank", "alpha", "steps", "learning_rate", "batch_size", "samples"):
            if (value := getattr(self, key)) is not None and not value > 0:
                raise strict.Mismatch(f"{key}: expected a positive number, got {value}")
        if len(self.scales) != 2 or not 0 <= self.scales[0] < self.scales[1]:
            found = list(self.scales)
            raise strict.Mismatch(f"scales: expected the lowest and the highest one, 0 or more, got {found}")
        if self.guidance and self.guidance.mode == "embedded":
            raise strict.Mismatch("guidance.mode: the teacher's is cfg or none")
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
    """A folder in diffusers' layout, the id of one on the Hugging Face Hub, or a checkpoint in one file."""
    phases: tuple[Phase, ...]
    height: int
    width: int
    revision: str | None = None
    """Of a model on the Hub: a branch, a tag or a commit; nothing: the newest."""
    config: str | None = None
    """Of a model in one file: a folder in diffusers' layout, or the id of one on the Hub, with its configurations."""
    sizes: tuple[tuple[int, ...], ...] = ()
    """Further image sizes, each [height, width]."""
    sides: tuple[int, ...] = ()
    """The lowest and the highest of further heights and widths, for models whose schedule is the same at every size."""
    prompt_tokens: int | None = None
    """The most tokens of a prompt, for text encoders that leave it open, such as T5; nothing: as diffusers has it."""
    decoder: str | None = None
    """An AutoencoderTiny to decode with, instead of the model's own VAE."""
    tile: int | None = None
    """Decode images that are larger, pixels, in overlapping tiles of this size."""
    from_image: bool = False
    """Whether images can be made from others: puts the VAE's encoder into the bundle."""
    teacher_steps: int = 50
    sampler: Sampler = "consistent"
    scheduler: str | None = None
    """Name of the diffusers scheduler to take instead of the model's own, such as ``DDIMScheduler``."""
    guidance: Guidance = field(default_factory=Guidance)
    """Of phases without a guide; one with a guide is ``embedded`` in any case."""
    engines: tuple[str, ...] = ("cpu",)
    examples: tuple[str, ...] = ()
    """Prompts; the build's report shows an image of each."""
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
            if phase.guide is not None and self.guidance.mode == "none":
                raise strict.Mismatch(f"phases[{i}].guide: takes a guidance scale, and guidance.mode is none")
        limits.check_range("height", self.height, 1, limits.IMAGE_SIDE)
        limits.check_range("width", self.width, 1, limits.IMAGE_SIDE)
        limits.check_sizes("sizes", self.sizes)
        if self.sides and not (len(self.sides) == 2 and 1 <= self.sides[0] <= self.sides[1] <= limits.IMAGE_SIDE):
            raise strict.Mismatch(f"sides: expected the lowest and the highest one, got {list(self.sides)}")
        for key, most in (("prompt_tokens", limits.PROMPT_TOKENS), ("tile", limits.IMAGE_SIDE)):
            if (value := getattr(self, key)) is not None:
                limits.check_range(key, value, 1, most)
        limits.check_range("teacher_steps", self.teacher_steps, 1, limits.SCHEDULE_STEPS)
        if not self.engines:
            raise strict.Mismatch("engines: a recipe needs at least one, such as cpu")

    @property
    def teacher_guidance(self) -> Guidance:
        """What distillation learns from: ``distill.guidance``, or else the recipe's own, in two evaluations where that
        is embedded."""
        if self.distill and self.distill.guidance:
            return self.distill.guidance
        return self.guidance if self.guidance.mode == "none" else replace(self.guidance, mode="cfg")


def load(path: str | Path) -> tuple[Recipe, Path]:
    """Read a recipe: a YAML file, or the name of a shipped one. Returns it with the folder its paths are relative to.

    Raises `RecipeError`, whose text names the file and the key path.
    """
    file = find(str(path), "recipe")
    return read_yaml(Recipe, file), file.parent


def load_of(path: str | Path, bundle: str) -> tuple[Recipe, Path]:
    """Read the recipe that a bundle of this name is compared with, as `load`. Raises `InputError` for another's."""
    plan, folder = load(path)
    if plan.name != bundle:
        raise InputError(
            f"--against: {path} is the recipe of {plan.name}, the bundle is {bundle}; give the recipe that it was "
            "built from"
        )
    return plan, folder


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let every `RecipeError` from within begin with the recipe's file, also one that knows only a key of it. Where a
    model or a LoRA is not there for a shipped recipe, its errors say that it is for copying."""
    try:
        yield
    except RecipeError as error:
        text = str(error)
        raise RecipeError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from None
    except (ModelError, LoraError) as error:
        file = find(str(path), "recipe").resolve()
        if file not in (shipped.resolve() for shipped in shipped_files("recipe").values()):
            raise
        text = f"{path} is a shipped recipe; copy {file} to where your model and LoRAs are, and give the copy"
        raise type(error)(f"{error}\n{text}") from None


def find(name: str, kind: Literal["recipe", "target"]) -> Path:
    """The YAML file `name`, or the shipped recipe or target of that name. Raises `RecipeError`."""
    shipped = shipped_files(kind)
    if os.path.isfile(name):
        return Path(name)
    if name in shipped:
        return shipped[name]
    if os.path.isdir(name):
        raise RecipeError(f"{name}: a folder; a {kind} is a YAML file")
    text = f"{name}: no such file, and no shipped {kind} of that name ({', '.join(shipped) or 'none'})"
    hint = strict.did_you_mean(name, shipped, cutoff=0.75)  # by which gpu is not close to cpu
    raise RecipeError("; ".join(filter(None, (text, hint))))


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
        reason = str(error).replace('"<unicode string>"', file.name)
        raise RecipeError(f"{file}: not valid YAML: {reason}") from None


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

"""The parts of a bundle's manifest: what a graph, an engine, a schedule or a file is said to be.

Each part checks what can be said of it alone; what must hold between the parts is checked by `manifest.Manifest`.
``docs/bundle-format.md`` explains every field.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from glance_trt import limits, strict

DType = Literal["float32", "float16", "bfloat16", "int64", "uint8"]
GuidanceMode = Literal["none", "cfg", "embedded"]

PROMPT = "{}"
"""Where a prompt goes in a tokenizer's template."""

_COMPUTE_DTYPES = ("float32", "float16", "bfloat16")
_DIMENSION = re.compile(r"[!-~]{1,64}")


@dataclass(frozen=True)
class FileEntry:
    """One file: its size in bytes, its SHA-256, and a text by which a build knows what it was made from."""

    size: int
    sha256: str
    key: str = ""

    def __post_init__(self) -> None:
        limits.check_range("size", self.size, 0, limits.INT64)
        limits.check_sha256("sha256", self.sha256)


@dataclass(frozen=True)
class Port:
    """An input or output tensor of a graph. A dimension is a number, or the name of one that may vary.

    `source` says what the runtime feeds an input with: ``tokens.<tokenizer>``, ``mask.<tokenizer>``,
    ``condition.<output>``, ``negative.<output>``, ``latents``, ``table.timestep``, ``table.coefficients``,
    ``guidance_scale``, ``image`` or ``noise``.
    """

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    source: str = ""

    def __post_init__(self) -> None:
        limits.check_name("name", self.name)
        limits.check_range("shape: rank", len(self.shape), 0, limits.TENSOR_RANK)
        for i, size in enumerate(self.shape):
            if isinstance(size, int):
                limits.check_range(f"shape[{i}]", size, 1, limits.INT32)
            elif not _DIMENSION.fullmatch(size):
                raise strict.Mismatch(f"shape[{i}]: {strict.shown(size)} is not 1 to 64 of ASCII without spaces")
        limits.check_elements("shape", [size for size in self.shape if isinstance(size, int)])


@dataclass(frozen=True)
class Graph:
    """A portable ONNX graph: one file per compute dtype, all over the same weights files."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    files: dict[str, str]
    weights: tuple[str, ...] = ()
    guidance: GuidanceMode = "none"

    def __post_init__(self) -> None:
        for key, ports in (("inputs", self.inputs), ("outputs", self.outputs)):
            if not ports:
                raise strict.Mismatch(f"{key}: empty")
            limits.check_distinct(key, [port.name for port in ports])
        for i, port in enumerate(self.outputs):
            if port.source:
                raise strict.Mismatch(f"outputs[{i}].source: an output has none")
        for dtype in self.files:
            _check_compute_dtype("files", dtype)


@dataclass(frozen=True)
class Engine:
    """What a target made of one graph: its file, the weights files that this file refers to, and what it computes in,
    where that is not the dtype of all its target's engines."""

    file: str
    weights: tuple[str, ...] = ()
    dtype: DType | None = None

    def __post_init__(self) -> None:
        if self.dtype:
            _check_compute_dtype("dtype", self.dtype)


@dataclass(frozen=True)
class EngineSet:
    """The engines of one target, by graph name. `requires` names what must be present to run them, with versions.

    weight_streaming_budget: of the weights of engines that were built for weight streaming, what stays on the GPU, MiB.
    """

    backend: Literal["onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"]
    dtype: DType
    graphs: dict[str, Engine]
    requires: dict[str, str] = field(default_factory=dict)
    weight_streaming_budget: int | None = None

    def __post_init__(self) -> None:
        _check_compute_dtype("dtype", self.dtype)
        if self.weight_streaming_budget is not None:
            limits.check_range("weight_streaming_budget", self.weight_streaming_budget, 0, limits.INT32)

    def files(self) -> list[str]:
        """The files of all its engines, with the weights that they refer to; one that several share, several times."""
        return [file for engine in self.graphs.values() for file in (engine.file, *engine.weights)]


@dataclass(frozen=True)
class Tokenizer:
    """A ``tokenizer.json`` of the tokenizers library, what a prompt is put into before, and how the tokens are cut and
    padded."""

    file: str
    max_length: int
    pad_token_id: int
    template: str = PROMPT

    def __post_init__(self) -> None:
        limits.check_range("max_length", self.max_length, 1, limits.PROMPT_TOKENS)
        limits.check_range("pad_token_id", self.pad_token_id, 0, limits.INT32)
        if self.template.count(PROMPT) != 1:
            raise strict.Mismatch(f"template: {strict.shown(self.template)} does not hold {PROMPT} once")


@dataclass(frozen=True)
class Step:
    """One denoising step: the phase whose graph runs, the timestep it is told, and its coefficients.

    mix: what an image's latents and what noise are multiplied with where a run starts at this step from an image; empty
    in bundles that start from noise alone.
    """

    phase: str
    timestep: float
    coefficients: tuple[float, ...]
    mix: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        limits.check_float32("timestep", self.timestep)
        for i, value in enumerate(self.coefficients):
            limits.check_float32(f"coefficients[{i}]", value)
        if len(self.mix) not in (0, 2):
            raise strict.Mismatch(f"mix: expected two numbers, got {len(self.mix)}")
        for i, value in enumerate(self.mix):
            limits.check_float32(f"mix[{i}]", value)


@dataclass(frozen=True)
class Schedule:
    """A table of steps. Starting noise is multiplied by `initial_noise_scale`.

    sizes: the (height, width) of the images that it is for; empty where it is for all. strength_rounding: which way the
    number of its steps is rounded that run from an image; model families differ in it.
    """

    steps: tuple[Step, ...]
    coefficients: tuple[str, ...] = ("c_in", "a", "b")
    initial_noise_scale: float = 1.0
    sizes: tuple[tuple[int, ...], ...] = ()
    strength_rounding: Literal["down", "up"] = "down"

    def __post_init__(self) -> None:
        if not self.steps:
            raise strict.Mismatch("steps: a schedule needs at least one step")
        limits.check_range("steps: their number", len(self.steps), 1, limits.SCHEDULE_STEPS)
        for i, name in enumerate(self.coefficients):
            limits.check_name(f"coefficients[{i}]", name)
        limits.check_distinct("coefficients", self.coefficients)
        for i, step in enumerate(self.steps):
            if len(step.coefficients) != len(self.coefficients):
                raise strict.Mismatch(
                    f"steps[{i}].coefficients: expected {len(self.coefficients)} numbers "
                    f"({', '.join(self.coefficients)}), got {len(step.coefficients)}"
                )
        limits.check_float32("initial_noise_scale", self.initial_noise_scale)
        limits.check_sizes("sizes", self.sizes)

    def fits(self, height: int, width: int) -> bool:
        """Whether it is for images of this size."""
        return not self.sizes or (height, width) in self.sizes


@dataclass(frozen=True)
class Image:
    """The sizes of the images, pixels, and the latents they are decoded from.

    height, width: what an image has unless another size is asked for. sizes: further (height, width). sides: lowest,
    highest and multiple; any height and width of that range will do as well. tile: side and overlap; what is larger
    than the side is decoded in overlapping tiles. Empty where there are none.
    """

    height: int
    width: int
    latent_channels: int
    latent_scale: int
    """Pixels per latent, along each side."""
    sizes: tuple[tuple[int, ...], ...] = ()
    sides: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key in ("height", "width", "latent_channels", "latent_scale"):
            limits.check_range(key, getattr(self, key), 1, limits.IMAGE_SIDE)
        for key in ("height", "width"):
            self._check_side(key, getattr(self, key))
        limits.check_sizes("sizes", self.sizes)
        for i, size in enumerate(self.sizes):
            for side in size:
                self._check_side(f"sizes[{i}]", side)
        if self.sides:
            if len(self.sides) != 3 or not 1 <= self.sides[0] <= self.sides[1] <= limits.IMAGE_SIDE:
                raise strict.Mismatch(f"sides: expected [lowest, highest, multiple], got {list(self.sides)}")
            low, high, multiple = self.sides
            if multiple < 1 or multiple % self.latent_scale or low % multiple or high % multiple:
                raise strict.Mismatch(
                    f"sides: {multiple} is not a multiple of latent_scale, {self.latent_scale}, that divides the others"
                )
        if self.tile:
            if len(self.tile) != 2 or not 0 <= self.tile[1] < self.tile[0] <= limits.IMAGE_SIDE:
                raise strict.Mismatch(f"tile: expected [side, overlap], got {list(self.tile)}")
            for pixels in self.tile:
                self._check_side("tile", pixels)
        largest = self.sides[1] if self.sides else self.latent_scale
        for height, width in ((self.height, self.width), (largest, largest), *self.sizes):
            limits.check_elements("latent_channels", self.latents_of(height, width))

    def _check_side(self, key: str, pixels: int) -> None:
        if pixels % self.latent_scale:
            raise strict.Mismatch(f"{key}: expected a multiple of latent_scale, {self.latent_scale}; got {pixels}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of the latents of an image of the usual size."""
        return self.latents_of(self.height, self.width)

    def latents_of(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, H, W] of the latents of an image of this size."""
        return self.latent_channels, height // self.latent_scale, width // self.latent_scale

    def described(self) -> str:
        """The sizes, for people: ``1024 x 1024, 768 x 1344 (height x width)``."""
        text = ", ".join(f"{height} x {width}" for height, width in ((self.height, self.width), *self.sizes))
        text += " (height x width)"
        return f"{text}, sides from {self.sides[0]} to {self.sides[1]} by {self.sides[2]}" if self.sides else text

    def takes(self, height: int, width: int) -> bool:
        """Whether images of this size can be made."""
        if (height, width) == (self.height, self.width) or (height, width) in self.sizes:
            return True
        if not self.sides:
            return False
        low, high, multiple = self.sides
        return all(low <= side <= high and side % multiple == 0 for side in (height, width))


@dataclass(frozen=True)
class Guidance:
    """The guidance scale and negative prompt that are used when none is given. range: the lowest and the highest scale
    that the guides inside were trained for; empty where there are none, or they do not say."""

    scale: float = 1.0
    negative_prompt: str = ""
    range: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        limits.check_float32("scale", self.scale)
        for i, bound in enumerate(self.range):
            limits.check_float32(f"range[{i}]", bound)
        if self.range and not (len(self.range) == 2 and self.range[0] <= self.scale <= self.range[1]):
            raise strict.Mismatch(f"range: expected a low and a high number around the scale, got {list(self.range)}")


@dataclass(frozen=True)
class LoraSource:
    """A LoRA that was fused into a phase. `alpha` is what its file says, or nothing where it says nothing."""

    phase: str
    file: str
    sha256: str
    scale: float
    alpha: float | None = None

    def __post_init__(self) -> None:
        limits.check_sha256("sha256", self.sha256)


@dataclass(frozen=True)
class GuideSource:
    """A guide, weights that take the guidance scale, which was added to a phase."""

    phase: str
    file: str
    sha256: str
    kind: str

    def __post_init__(self) -> None:
        limits.check_sha256("sha256", self.sha256)


@dataclass(frozen=True)
class Provenance:
    """Where a bundle comes from: the base model, the LoRAs and guides, and the versions of the tools that made it."""

    model: str
    loras: tuple[LoraSource, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    guides: tuple[GuideSource, ...] = ()


def _check_compute_dtype(path: str, dtype: str) -> None:
    if dtype not in _COMPUTE_DTYPES:
        raise strict.Mismatch(f"{path}: got {strict.shown(dtype)}, expected one of {', '.join(_COMPUTE_DTYPES)}")

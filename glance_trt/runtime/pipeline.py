"""Text to images from a bundle: tokens, noise, a loop over the schedule's table, and the decoder."""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glance_trt import limits
from glance_trt.bundle import Bundle
from glance_trt.errors import InputError, TargetError
from glance_trt.prompts import PromptTruncated
from glance_trt.runtime.noise import initial_latents
from glance_trt.runtime.runners import Runner, open_runner
from glance_trt.runtime.tokenizing import Tokenizer

Arrays = dict[str, NDArray[Any]]
Values = dict[tuple[str, str], NDArray[Any]]
"""By the two parts of a port's source, such as ``("condition", "prompt_embeds")``."""

_CACHED_PROMPTS = 64
_DEFAULT_BATCH = 4
_MOST_THREADS = 512
_SHOWN_TEXT = 200  # characters of a cut prompt that a warning shows


@dataclass(frozen=True)
class Settings:
    """What a prompt is denoised with, once the bundle's defaults are filled in.

    schedule: its name. guidance_scale: 1 and negative_prompt: '' where the schedule's graphs take none.
    """

    schedule: str
    steps: int
    guidance_scale: float
    negative_prompt: str


@dataclass(frozen=True)
class StepResult:
    """After one denoising step: its 1-based index, its phase, the latents and the step's wall-clock time.

    latents [B, C, H, W] float32; the caller may keep them, the next step writes a new array.
    """

    index: int
    phase: str
    latents: NDArray[np.float32]
    milliseconds: float


class OnStep(Protocol):
    """Called after every step of `Pipeline.generate`."""

    def __call__(self, result: StepResult) -> None: ...


class Pipeline:
    """A bundle, opened for one target. Use it as a context manager, or `close` it, to release the engines.

    One pipeline may be used from several threads at once: what it keeps between calls are its engines, which are
    thread-safe, and a cache of prompt embeddings, which is locked.
    """

    def __init__(self, bundle: Bundle, target: str, runner: Runner) -> None:
        self.bundle, self.target = bundle, target
        self.runner = runner
        manifest = bundle.manifest
        self._tokenizers = {
            name: Tokenizer(bundle.path(item.file), max_length=item.max_length, pad_token_id=item.pad_token_id)
            for name, item in manifest.tokenizers.items()
        }
        self._sources = {
            graph: [(port.name, *port.source.partition(".")[::2]) for port in item.inputs]
            for graph, item in manifest.graphs.items()
        }
        self._embeddings: OrderedDict[bytes, Arrays] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, bundle: str | Path | Bundle, target: str | None = None, *, threads: int | None = None) -> Pipeline:
        """Open a bundle and check the files that `target` needs.

        target: one of the bundle's; by default the first that runs here. threads: for engines that run on the CPU, by
        default as many as there are cores. Raises `BundleError`, `TargetError` or `InputError`.
        """
        if threads is not None and not 1 <= threads <= _MOST_THREADS:
            raise InputError(f"threads: expected 1 to {_MOST_THREADS}, got {threads}")
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        engines = bundle.manifest.engines
        have = ", ".join(engines) or "none"
        if target is None:
            target = next((name for name, item in engines.items() if item.backend == "onnxruntime"), None)
            if target is None:
                raise TargetError(
                    f"{bundle.directory}: this version runs ONNX Runtime engines only, and the bundle has {have}; "
                    "build it with the engine cpu too"
                )
        if target not in engines:
            raise TargetError(f"target {target!r}: this bundle has engines for {have}")
        bundle.check(bundle.manifest.engine_files(target))
        return cls(bundle, target, open_runner(bundle, target, threads=threads))

    def generate(
        self,
        prompt: str,
        *,
        seed: int = 0,
        count: int = 1,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        schedule: str | None = None,
        batch_size: int = _DEFAULT_BATCH,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """`count` images of the prompt; image i starts from the noise of ``seed + i``, whatever the batch size.

        What is not given is taken from the bundle. A prompt that is too long is cut, with a `PromptTruncated` warning.
        Raises `InputError`.
        """
        for name, number in (("count", count), ("batch_size", batch_size)):
            if not isinstance(number, (int, np.integer)) or number < 1:
                raise InputError(f"{name}: expected a whole number, at least 1, got {number!r}")
        settings = self.settings(negative_prompt=negative_prompt, guidance_scale=guidance_scale, schedule=schedule)
        latents = self._noise(settings, seed, count)
        conditions = self._conditions(prompt, settings)
        images: list[Image.Image] = []
        for start in range(0, count, batch_size):
            for result in self._denoise(latents[start : start + batch_size], conditions, settings):
                if on_step:
                    on_step(result)
            images += [Image.fromarray(pixels) for pixels in self.decode(result.latents)]
        return images

    def steps(
        self,
        prompt: str,
        *,
        seed: int = 0,
        count: int = 1,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        schedule: str | None = None,
    ) -> Iterator[StepResult]:
        """Denoise a batch of `count` images, one step at a time; arguments as in `generate`."""
        settings = self.settings(negative_prompt=negative_prompt, guidance_scale=guidance_scale, schedule=schedule)
        latents = self._noise(settings, seed, count)
        return self._denoise(latents, self._conditions(prompt, settings), settings)

    def settings(
        self,
        *,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        schedule: str | None = None,
    ) -> Settings:
        """What `generate` makes of these arguments. Raises `InputError`."""
        manifest = self.bundle.manifest
        name = next(iter(manifest.schedules)) if schedule is None else schedule
        if name not in manifest.schedules:
            raise InputError(f"schedule {name!r}: this bundle has {', '.join(manifest.schedules)}")
        kinds = self._kinds(name)
        scale, negative = 1.0, ""
        if "guidance_scale" in kinds:
            scale = manifest.guidance.scale if guidance_scale is None else guidance_scale
            if not _is_float32(scale):
                raise InputError(f"guidance scale: expected a finite number, got {scale!r}")
            if (bounds := manifest.guidance.range) and not bounds[0] <= scale <= bounds[1]:
                raise InputError(
                    f"guidance scale: {scale:g} is outside {bounds[0]:g} to {bounds[1]:g}, which the guide in this "
                    "bundle was trained for"
                )
        elif guidance_scale is not None:
            raise InputError("guidance scale: this bundle was built without guidance; leave it out")
        if "negative" in kinds:
            negative = manifest.guidance.negative_prompt if negative_prompt is None else negative_prompt
        elif negative_prompt is not None:
            raise InputError("negative prompt: this bundle takes none, it evaluates no second prompt; leave it out")
        return Settings(name, len(manifest.schedules[name].steps), float(scale), negative)

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """latents [B, C, H, W] float32 to pixels [B, height, width, 3] uint8."""
        return self._run("decoder", {("latents", ""): latents})

    def encode(self, prompt: str, *, name: str = "prompt") -> Arrays:
        """The text encoder's outputs for one prompt, by name, each [1, ...]; shared and therefore read-only.

        `name` is what errors and warnings call the prompt. Raises `InputError`.
        """
        feeds: Arrays = {}
        for port, _, tokenizer in self._sources["text_encoder"]:
            try:
                encoded = self._tokenizers[tokenizer].encode(prompt)
            except InputError as error:
                raise InputError(str(error).replace("prompt", name, 1)) from None
            if encoded.dropped:
                limit = self.bundle.manifest.tokenizers[tokenizer].max_length
                cut = encoded.dropped.strip()
                cut = cut if len(cut) <= _SHOWN_TEXT else f"{cut[: _SHOWN_TEXT - 3]}..."
                text = f"{name}: longer than the {limit} tokens of the text encoder; cut: {cut!r}"
                warnings.warn(text, PromptTruncated, stacklevel=2)
            feeds[port] = encoded.ids[np.newaxis]
        key = b"".join(ids.tobytes() for ids in feeds.values())
        with self._lock:
            if key in self._embeddings:
                self._embeddings.move_to_end(key)
                return self._embeddings[key]
        result = self.runner.run("text_encoder", feeds)
        for value in result.values():
            value.flags.writeable = False
        with self._lock:
            self._embeddings[key] = result
            if len(self._embeddings) > _CACHED_PROMPTS:
                self._embeddings.popitem(last=False)
        return result

    def close(self) -> None:
        """Release the engines."""
        self.runner.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _kinds(self, schedule: str) -> set[str]:
        """What the graphs of a schedule are fed: the kinds of their inputs' sources."""
        phases = {step.phase for step in self.bundle.manifest.schedules[schedule].steps}
        return {kind for phase in phases for _, kind, _ in self._sources[f"denoiser.{phase}"]}

    def _conditions(self, prompt: str, settings: Settings) -> Values:
        """The values that stay the same over the steps, for one image."""
        if isinstance(prompt, str) and not prompt.strip():
            raise InputError("prompt: empty; say what the image should show")
        values = {("condition", name): value for name, value in self.encode(prompt).items()}
        if "negative" in self._kinds(settings.schedule):
            encoded = self.encode(settings.negative_prompt, name="negative prompt")
            values |= {("negative", name): value for name, value in encoded.items()}
        return values

    def _noise(self, settings: Settings, seed: int, count: int) -> NDArray[np.float32]:
        scale = self.bundle.manifest.schedules[settings.schedule].initial_noise_scale
        return initial_latents(self.bundle.manifest.image.latent_shape, seed, count) * np.float32(scale)

    def _denoise(self, latents: NDArray[np.float32], conditions: Values, settings: Settings) -> Iterator[StepResult]:
        values = {source: np.repeat(value, len(latents), axis=0) for source, value in conditions.items()}
        values["guidance_scale", ""] = np.array(settings.guidance_scale, np.float32)
        table = self.bundle.manifest.schedules[settings.schedule]
        for index, step in enumerate(table.steps, start=1):
            start = time.perf_counter()
            values["latents", ""] = latents
            values["table", "timestep"] = np.array(step.timestep, np.float32)
            values["table", "coefficients"] = np.array(step.coefficients, np.float32)
            latents = self._run(f"denoiser.{step.phase}", values)
            yield StepResult(index, step.phase, latents, (time.perf_counter() - start) * 1e3)

    def _run(self, graph: str, values: Values) -> NDArray[Any]:
        feeds = {name: values[kind, rest] for name, kind, rest in self._sources[graph]}
        return next(iter(self.runner.run(graph, feeds).values()))


def _is_float32(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(-limits.FLOAT32 <= value <= limits.FLOAT32)

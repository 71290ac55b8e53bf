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
from glance_trt.requirements import unrunnable
from glance_trt.runtime.chain import Call, by_graph
from glance_trt.runtime.noise import initial_latents
from glance_trt.runtime.runners import ChainRunner, open_runner
from glance_trt.runtime.tokenizing import Tokenizer

Values = dict[str, NDArray[Any]]
"""By the names that `Pipeline._calls` gives them, such as ``condition.prompt_embeds`` and ``timestep.3``."""

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

    def __init__(self, bundle: Bundle, target: str, runner: ChainRunner, *, low_memory: bool = False) -> None:
        self.bundle, self.target = bundle, target
        self.runner, self._low_memory = runner, low_memory
        manifest = bundle.manifest
        self._tokenizers = {
            name: Tokenizer(bundle.path(item.file), max_length=item.max_length, pad_token_id=item.pad_token_id)
            for name, item in manifest.tokenizers.items()
        }
        self._sources = {
            graph: [(port.name, *port.source.partition(".")[::2]) for port in item.inputs]
            for graph, item in manifest.graphs.items()
        }
        self._embeddings: OrderedDict[bytes, dict[str, NDArray[Any]]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        target: str | None = None,
        *,
        threads: int | None = None,
        device: int = 0,
        stream: object | None = None,
        trust: bool = False,
        low_memory: bool = False,
    ) -> Pipeline:
        """Open a bundle and check the files that `target` needs.

        target: one of the bundle's; by default the first that runs here. threads: for engines that run on the CPU, by
        default as many as there are cores. device: the GPU, as CUDA counts them. stream: the CUDA stream that engines
        run in, any object with ``__cuda_stream__``; by default one of the pipeline's own. trust: open plans that were
        not built here. low_memory: hold the engines of one phase at a time; `generate` then takes all images through
        one phase before the next. Raises `BundleError`, `TargetError` or `InputError`.
        """
        if threads is not None and not 1 <= threads <= _MOST_THREADS:
            raise InputError(f"threads: expected 1 to {_MOST_THREADS}, got {threads}")
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        target = _choose(bundle, target, device)
        bundle.check(bundle.manifest.engine_files(target))
        runner = open_runner(
            bundle, target, threads=threads, device=device, stream=stream, trust=trust, one_at_a_time=low_memory
        )
        return cls(bundle, target, runner, low_memory=low_memory)

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
        batches = [latents[start : start + batch_size] for start in range(0, count, batch_size)]
        if on_step:
            pixels = [self._watched(batch, conditions, settings, on_step) for batch in batches]
        else:
            pixels = self._chained(batches, conditions, settings)
        return [Image.fromarray(image) for batch in pixels for image in batch]

    def pixels(
        self,
        prompt: str,
        *,
        seed: int = 0,
        count: int = 1,
        latents: Any = None,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        schedule: str | None = None,
    ) -> Any:
        """A batch of images [B, height, width, 3] uint8, left where the engines run; other libraries take it by DLPack.

        latents: to start from in place of the seed's noise, [B, C, H, W] float32, of NumPy or any library with DLPack.
        On a GPU the result is ready when the pipeline's stream comes to what is enqueued next; consumers that follow
        the DLPack protocol wait for that. The other arguments are as in `generate`.
        """
        settings = self.settings(negative_prompt=negative_prompt, guidance_scale=guidance_scale, schedule=schedule)
        calls, values = self.prepare(prompt, settings, seed=seed, count=count, latents=latents)
        return self.runner.chain(calls, values, ["pixels"], on_device=True).values["pixels"]

    def prepare(
        self, prompt: str, settings: Settings, *, seed: int = 0, count: int = 1, latents: Any = None
    ) -> tuple[list[Call], dict[str, Any]]:
        """What `runner.chain` takes for a batch of images: the calls of a whole image, from ``latents.0`` to
        ``pixels``, and the values that they start from. latents: as in `pixels`."""
        start = self._noise(settings, seed, count) if latents is None else latents
        shape = tuple(start.shape)
        if len(shape) != 4 or shape[1:] != self.bundle.manifest.image.latent_shape:
            expected = ", ".join(map(str, self.bundle.manifest.image.latent_shape))
            raise InputError(f"latents: expected [B, {expected}], got {list(shape)}")
        values = self._values(shape[0], self._conditions(prompt, settings), settings)
        return self._calls(settings.schedule), values | {"latents.0": start}

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
        return self._run(self._call("decoder", "pixels", "latents"), {"latents": latents})

    def encode(self, prompt: str, *, name: str = "prompt") -> dict[str, NDArray[Any]]:
        """The text encoder's outputs for one prompt, by name, each [1, ...]; shared and therefore read-only.

        `name` is what errors and warnings call the prompt. Raises `InputError`.
        """
        feeds: dict[str, NDArray[Any]] = {}
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
        """The text encoder's outputs, for one image."""
        if isinstance(prompt, str) and not prompt.strip():
            raise InputError("prompt: empty; say what the image should show")
        values = {f"condition.{name}": value for name, value in self.encode(prompt).items()}
        if "negative" in self._kinds(settings.schedule):
            encoded = self.encode(settings.negative_prompt, name="negative prompt")
            values |= {f"negative.{name}": value for name, value in encoded.items()}
        return values

    def _noise(self, settings: Settings, seed: int, count: int) -> NDArray[np.float32]:
        scale = self.bundle.manifest.schedules[settings.schedule].initial_noise_scale
        return initial_latents(self.bundle.manifest.image.latent_shape, seed, count) * np.float32(scale)

    def _values(self, batch: int, conditions: Values, settings: Settings) -> Values:
        """All that the calls of a schedule take, but the latents."""
        values = {name: np.repeat(value, batch, axis=0) for name, value in conditions.items()}
        values["guidance_scale"] = np.array(settings.guidance_scale, np.float32)
        for i, step in enumerate(self.bundle.manifest.schedules[settings.schedule].steps):
            values[f"timestep.{i}"] = np.array(step.timestep, np.float32)
            values[f"coefficients.{i}"] = np.array(step.coefficients, np.float32)
        return values

    def _calls(self, schedule: str) -> list[Call]:
        """The graphs of a whole image: the steps of a schedule, from ``latents.0`` on, and the decoder."""
        steps = self.bundle.manifest.schedules[schedule].steps
        calls = [
            self._call(f"denoiser.{step.phase}", f"latents.{i + 1}", f"latents.{i}", i) for i, step in enumerate(steps)
        ]
        return [*calls, self._call("decoder", "pixels", f"latents.{len(steps)}")]

    def _call(self, graph: str, output: str, latents: str, step: int = 0) -> Call:
        def name(kind: str, rest: str) -> str:
            if kind == "latents":
                return latents
            return f"{rest}.{step}" if kind == "table" else f"{kind}.{rest}" if rest else kind

        inputs = tuple((port, name(kind, rest)) for port, kind, rest in self._sources[graph])
        return Call(graph, inputs, ((self.bundle.manifest.graphs[graph].outputs[0].name, output),))

    def _chained(
        self, batches: list[NDArray[np.float32]], conditions: Values, settings: Settings
    ) -> list[NDArray[np.uint8]]:
        """Batches of noise to pixels, nothing leaving the engines' device in between, or with `low_memory` only where
        the phase changes."""
        values = {size: self._values(size, conditions, settings) for size in {len(batch) for batch in batches}}
        calls, first = self._calls(settings.schedule), "latents.0"
        found: list[NDArray[Any]] = list(batches)
        for part in by_graph(calls) if self._low_memory else [calls]:
            last = part[-1].outputs[0][1]
            found = [
                self.runner.chain(part, values[len(batch)] | {first: batch}, [last]).values[last] for batch in found
            ]
            first = last
        return found

    def _watched(
        self, latents: NDArray[np.float32], conditions: Values, settings: Settings, on_step: OnStep
    ) -> NDArray[np.uint8]:
        for result in self._denoise(latents, conditions, settings):
            on_step(result)
        return self.decode(result.latents)

    def _denoise(self, latents: NDArray[np.float32], conditions: Values, settings: Settings) -> Iterator[StepResult]:
        values = self._values(len(latents), conditions, settings)
        steps = self.bundle.manifest.schedules[settings.schedule].steps
        for i, (step, call) in enumerate(zip(steps, self._calls(settings.schedule), strict=False)):
            start = time.perf_counter()
            latents = self._run(call, values | {f"latents.{i}": latents})
            yield StepResult(i + 1, step.phase, latents, (time.perf_counter() - start) * 1e3)

    def _run(self, call: Call, values: Values) -> NDArray[Any]:
        feeds = {port: values[name] for port, name in call.inputs}
        return self.runner.run(call.graph, feeds)[call.outputs[0][0]]


def _choose(bundle: Bundle, target: str | None, device: int) -> str:
    """The target to run: the one asked for, or the first that runs here. Raises `TargetError`."""
    engines = bundle.manifest.engines
    if target is None:
        reasons = {}
        for name, item in engines.items():
            if (reason := unrunnable(item.backend, item.requires, device)) is None:
                return name
            reasons[name] = reason
        listed = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items()) or " none"
        raise TargetError(f"{bundle.directory}: none of its targets runs here:{listed}")
    if target not in engines:
        raise TargetError(f"target {target!r}: this bundle has engines for {', '.join(engines) or 'none'}")
    return target


def _is_float32(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(-limits.FLOAT32 <= value <= limits.FLOAT32)

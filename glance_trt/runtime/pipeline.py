"""Text to images from a bundle: tokens, noise, a loop over the schedule's table, and the decoder."""

from __future__ import annotations

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

from glance_trt.bundle import Bundle, Schedule
from glance_trt.errors import InputError, TargetError
from glance_trt.runtime.noise import initial_latents
from glance_trt.runtime.runners import Runner, open_runner
from glance_trt.runtime.tokenizing import Tokenizer

Arrays = dict[str, NDArray[Any]]

_CACHED_PROMPTS = 64
_DEFAULT_BATCH = 4


class PromptTruncated(UserWarning):
    """A prompt was longer than the text encoder takes; the message shows what was cut."""


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
    thread-safe, and a cache of prompt embeddings, whose entries are replaced whole.
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
        self._guided = {
            graph: any(kind == "guidance_scale" for _, kind, _ in sources) for graph, sources in self._sources.items()
        }
        self._embeddings: OrderedDict[str, Arrays] = OrderedDict()

    @classmethod
    def open(cls, bundle: str | Path | Bundle, target: str | None = None, *, threads: int | None = None) -> Pipeline:
        """Open a bundle and check the files that `target` needs.

        target: one of the bundle's; by default the first that runs here. threads: for engines that run on the CPU, by
        default as many as there are cores. Raises `BundleError` or `TargetError`.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        engines = bundle.manifest.engines
        if target is None:
            target = next((name for name, item in engines.items() if item.backend == "onnxruntime"), None)
            if target is None:
                raise TargetError(f"{bundle.directory}: no engine that runs here; build one with --engine cpu")
        if target not in engines:
            have = ", ".join(engines) or "none"
            raise TargetError(f"target {target!r}: this bundle has engines for {have}; build it with --engine {target}")
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
        if count < 1 or batch_size < 1:
            raise InputError(f"count and batch_size: expected at least 1, got {count} and {batch_size}")
        images: list[Image.Image] = []
        for start in range(0, count, batch_size):
            steps = self.steps(
                prompt,
                seed=seed + start,
                count=min(batch_size, count - start),
                negative_prompt=negative_prompt,
                guidance_scale=guidance_scale,
                schedule=schedule,
            )
            for result in steps:
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
        table = self._schedule(schedule)
        values = self._conditions(prompt, negative_prompt, guidance_scale, table, count)
        latents = initial_latents(self.bundle.manifest.image.latent_shape, seed, count)
        latents *= np.float32(table.initial_noise_scale)
        return self._denoise(latents, values, table)

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """latents [B, C, H, W] float32 to pixels [B, height, width, 3] uint8."""
        return self._run("decoder", {("latents", ""): latents})

    def encode(self, prompt: str) -> Arrays:
        """The text encoder's outputs for one prompt, by name, each [1, ...]. The arrays are shared: do not write."""
        if (known := self._embeddings.get(prompt)) is not None:
            return known
        feeds: Arrays = {}
        for name, kind, tokenizer in self._sources["text_encoder"]:
            assert kind == "tokens"
            encoded = self._tokenizers[tokenizer].encode(prompt)
            if encoded.dropped:
                limit = self.bundle.manifest.tokenizers[tokenizer].max_length
                warnings.warn(
                    f"prompt: longer than the {limit} tokens of the text encoder; cut: {encoded.dropped!r}",
                    PromptTruncated,
                    stacklevel=2,
                )
            feeds[name] = encoded.ids[np.newaxis]
        result = self.runner.run("text_encoder", feeds)
        self._embeddings[prompt] = result
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

    def _schedule(self, name: str | None) -> Schedule:
        schedules = self.bundle.manifest.schedules
        if name is not None and name not in schedules:
            raise InputError(f"schedule {name!r}: this bundle has {', '.join(schedules)}")
        return self.bundle.manifest.schedule(name)

    def _conditions(
        self, prompt: str, negative: str | None, scale: float | None, table: Schedule, count: int
    ) -> dict[tuple[str, str], NDArray[Any]]:
        """Every value that stays the same over the steps, by source."""
        defaults = self.bundle.manifest.guidance
        guided = any(self._guided[f"denoiser.{step.phase}"] for step in table.steps)
        if not guided and (negative is not None or scale is not None):
            raise InputError("guidance: this bundle was built without it; it takes no guidance scale and no negative prompt")
        if isinstance(prompt, str) and not prompt.strip():
            raise InputError("prompt: empty; say what the image should show")
        values: dict[tuple[str, str], NDArray[Any]] = {
            ("condition", name): np.repeat(value, count, axis=0) for name, value in self.encode(prompt).items()
        }
        if guided:
            scale = defaults.scale if scale is None else scale
            if not np.isfinite(scale):
                raise InputError(f"guidance scale: expected a finite number, got {scale}")
            values["guidance_scale", ""] = np.array(scale, np.float32)
            encoded = self.encode(defaults.negative_prompt if negative is None else negative)
            values |= {("negative", name): np.repeat(value, count, axis=0) for name, value in encoded.items()}
        return values

    def _denoise(
        self, latents: NDArray[np.float32], values: dict[tuple[str, str], NDArray[Any]], table: Schedule
    ) -> Iterator[StepResult]:
        for index, step in enumerate(table.steps, start=1):
            start = time.perf_counter()
            values["latents", ""] = latents
            values["table", "timestep"] = np.array(step.timestep, np.float32)
            values["table", "coefficients"] = np.array(step.coefficients, np.float32)
            latents = self._run(f"denoiser.{step.phase}", values)
            yield StepResult(index, step.phase, latents, (time.perf_counter() - start) * 1e3)

    def _run(self, graph: str, values: dict[tuple[str, str], NDArray[Any]]) -> NDArray[Any]:
        feeds = {name: values[kind, rest] for name, kind, rest in self._sources[graph]}
        return next(iter(self.runner.run(graph, feeds).values()))

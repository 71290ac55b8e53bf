"""Prompts to images by a bundle: conditions, a start, a loop over the schedule's table, and the decoder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glance_trt.bundle import Bundle
from glance_trt.errors import InputError, TargetError
from glance_trt.requirements import unrunnable
from glance_trt.runtime import calls, starting, tiling
from glance_trt.runtime.calls import Values
from glance_trt.runtime.chain import Call, by_graph
from glance_trt.runtime.noise import check_seed
from glance_trt.runtime.prompting import Embeddings, TextEncoders, Tokens
from glance_trt.runtime.runners import ChainRunner, open_runner
from glance_trt.runtime.settings import Settings, Wishes, settle, source_kinds

if TYPE_CHECKING:
    from typing import Unpack  # since Python 3.11; only type checkers come here

_DEFAULT_BATCH = 4
_AT_ONCE = 64
"""Images that go through one phase before the next where memory is low: their conditions and latents are kept."""
_MOST_THREADS = 512


@dataclass(frozen=True)
class Request:
    """An image that is wanted. name: what errors and warnings call its prompt."""

    prompt: str
    seed: int = 0
    name: str = "prompt"


@dataclass(frozen=True)
class StepResult:
    """After one denoising step: its 1-based index in the schedule, its phase, the latents and the step's wall-clock
    time.

    latents [B, C, H, W] float32; the caller may keep them, the next step writes a new array. Where they were left on a
    GPU they are no NumPy array, but one with DLPack.
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
        self._text = TextEncoders(bundle)

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
        not built here. low_memory: hold one engine at a time; up to 64 images then go through one phase before the
        next, and the text encoders are gone by then. Raises `BundleError`, `TargetError` or `InputError`.
        """
        if threads is not None and not 1 <= threads <= _MOST_THREADS:
            raise InputError(f"threads: expected 1 to {_MOST_THREADS}, got {threads}")
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        target = choose_target(bundle, target, device)
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
        batch_size: int = _DEFAULT_BATCH,
        on_step: OnStep | None = None,
        **wishes: Unpack[Wishes],
    ) -> list[Image.Image]:
        """`count` images of the prompt; image i starts from the noise of ``seed + i``, whatever the batch size.

        wishes: negative_prompt, guidance_scale, schedule, height, width, and for images from an image, image and
        strength; `settings.Wishes` explains them. A prompt that is too long is cut, with a `PromptTruncated` warning.
        Raises `InputError`.
        """
        requests = [Request(prompt, one) for one in starting.seeds_from(seed, count)]
        return list(self.draw(requests, self.settings(**wishes), batch_size=batch_size, on_step=on_step))

    def draw(
        self,
        requests: Sequence[Request],
        settings: Settings,
        *,
        batch_size: int = _DEFAULT_BATCH,
        on_step: OnStep | None = None,
    ) -> Iterator[Image.Image]:
        """Images of any prompts and seeds, in order, each batch as soon as it is made.

        All prompts and seeds are checked first: what is wrong with one is raised, as an `InputError`, before anything
        runs.
        """
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise InputError(f"batch_size: expected a whole number, at least 1, got {batch_size!r}")
        seeds = [check_seed(request.seed) for request in requests]
        tokens: list[Tokens] = []
        for (prompt, name), same in groupby(requests, key=lambda request: (request.prompt, request.name)):
            tokens += [self._tokenize(prompt, name)] * len(list(same))
        return self._draw(tokens, self._negative(settings), seeds, settings, int(batch_size), on_step)

    def pixels(
        self, prompt: str, *, seed: int = 0, count: int = 1, latents: Any = None, **wishes: Unpack[Wishes]
    ) -> Any:
        """A batch of images [B, height, width, 3] uint8, left where the engines run; other libraries take it by DLPack.

        latents: to start from in place of the seed's noise, [B, C, H, W] float32, of NumPy or any library with DLPack.
        On a GPU the result is ready when the pipeline's stream comes to what is enqueued next; consumers that follow
        the DLPack protocol wait for that. Images that are decoded in tiles are blended on the host, and left there. The
        other arguments are as in `generate`.
        """
        settings = self.settings(**wishes)
        chain, values = self.prepare(prompt, settings, seed=seed, count=count, latents=latents)
        last = chain[-1].outputs[0][1]
        found = self.runner.chain(chain, values, [last], on_device=last == calls.PIXELS).values[last]
        return found if last == calls.PIXELS else self.decode(found)

    def prepare(
        self, prompt: str, settings: Settings, *, seed: int = 0, count: int = 1, latents: Any = None
    ) -> tuple[list[Call], Values]:
        """What `runner.chain` takes for a batch of images: the calls of a whole image, to ``pixels``, and the values
        that they start from. latents: as in `pixels`. Where images are decoded in tiles, the last calls are the steps,
        and what they put out is for `decode`."""
        tokens, negative = self._tokenize(prompt), self._negative(settings)
        if latents is None:
            start = self._start(settings, starting.seeds_from(seed, count))
        elif settings.image is not None:
            raise InputError("latents: to start from, and an image as well; give one of them")
        else:
            start = latents
        shape, expected = tuple(start.shape), self._latent_shape(settings)
        if len(shape) != 4 or shape[1:] != expected:
            raise InputError(f"latents: expected [B, {', '.join(map(str, expected))}], got {list(shape)}")
        manifest = self.bundle.manifest
        values = calls.values(manifest, self._conditions([tokens] * shape[0], negative), settings)
        return calls.of_image(manifest, settings), values | {calls.first_latents(manifest, settings): start}

    def steps(
        self,
        prompt: str,
        *,
        seed: int = 0,
        count: int = 1,
        latents: Any = None,
        on_device: bool = False,
        **wishes: Unpack[Wishes],
    ) -> Iterator[StepResult]:
        """Denoise a batch of `count` images, one step at a time.

        on_device: leave the latents of each step where the engines run, as `pixels` leaves its images; on a GPU, a
        step's milliseconds are then those of its launch. The other arguments are as in `pixels`.
        """
        settings = self.settings(**wishes)
        _, values = self.prepare(prompt, settings, seed=seed, count=count, latents=latents)
        return self._denoise(calls.of_steps(self.bundle.manifest, settings), values, on_device=on_device)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run one engine.

        inputs: by the names that ``bundle.manifest.graphs`` has for its ports, arrays of NumPy, or of any library with
        DLPack or ``__cuda_array_interface__``. The outputs are left where the engines run, as by `pixels`. Raises
        `InputError` and `TargetError`.
        """
        graphs = self.bundle.manifest.graphs
        if graph not in graphs:
            raise InputError(f"graph {graph!r}: this bundle has {', '.join(graphs)}")
        outputs = {port.name: f"output.{port.name}" for port in graphs[graph].outputs}
        call = Call(graph, tuple((name, name) for name in inputs), tuple(outputs.items()))
        found = self.runner.chain([call], inputs, [*outputs.values()], on_device=True).values
        return {port: found[name] for port, name in outputs.items()}

    def settings(self, **wishes: Unpack[Wishes]) -> Settings:
        """What `generate` makes of these arguments. Raises `InputError`."""
        return settle(self.bundle.manifest, **wishes)

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """latents [B, C, H, W] float32 to pixels [B, height, width, 3] uint8, in tiles where the images are large."""
        manifest, scale = self.bundle.manifest, self.bundle.manifest.image.latent_scale
        call = calls.of_graph(manifest, "decoder", calls.PIXELS, "latents")

        def decode(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
            return self._run(call, {"latents": latents})

        if not calls.is_tiled(manifest, *(side * scale for side in latents.shape[2:])):
            return decode(latents)
        side, overlap = manifest.image.tile
        return tiling.decode(latents, decode, scale=scale, side=side, overlap=overlap)

    def encode(self, prompt: str, *, name: str = "prompt") -> Embeddings:
        """The text encoders' outputs for one prompt, by name, each [1, ...]; shared and therefore read-only.

        `name` is what errors and warnings call the prompt. Raises `InputError`.
        """
        return self._text.encode([self._text.tokenize(prompt, name)], self.runner.run)[0]

    def close(self) -> None:
        """Release the engines."""
        self.runner.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _tokenize(self, prompt: str, name: str = "prompt") -> Tokens:
        if isinstance(prompt, str) and not prompt.strip():
            raise InputError(f"{name}: empty; say what the image should show")
        return self._text.tokenize(prompt, name)

    def _negative(self, settings: Settings) -> Tokens | None:
        """The negative prompt, where a graph of the schedule takes it."""
        if "negative" not in source_kinds(self.bundle.manifest, settings.schedule):
            return None
        return self._text.tokenize(settings.negative_prompt, "negative prompt")

    def _conditions(self, tokens: Sequence[Tokens], negative: Tokens | None) -> list[Values]:
        """Of each image, what the text encoders put out, [1, ...]."""
        found = self._text.encode([*tokens, *([negative] if negative else [])], self.runner.run)
        shared = {f"negative.{name}": value for name, value in found.pop().items()} if negative else {}
        return [{f"condition.{name}": value for name, value in own.items()} | shared for own in found]

    def _start(self, settings: Settings, seeds: Sequence[int]) -> NDArray[np.float32]:
        """The latents of images [B, C, H, W] before the first step that runs."""
        manifest = self.bundle.manifest
        schedule, shape = manifest.schedules[settings.schedule], self._latent_shape(settings)
        if settings.image is None:
            return starting.from_noise(shape, seeds) * np.float32(schedule.initial_noise_scale)
        call, given = calls.of_graph(manifest, "encoder", "encoded"), {"image": np.asarray(settings.image)[np.newaxis]}
        return starting.from_image(
            lambda noise: self._run(call, given | {"noise": noise}),
            shape,
            seeds,
            schedule.steps[calls.first_step(manifest, settings)].mix,
            posterior=any(name == "noise" for _, name in call.inputs),
        )

    def _draw(
        self,
        tokens: Sequence[Tokens],
        negative: Tokens | None,
        seeds: Sequence[int],
        settings: Settings,
        batch_size: int,
        on_step: OnStep | None,
    ) -> Iterator[Image.Image]:
        manifest, chain = self.bundle.manifest, calls.of_image(self.bundle.manifest, settings)
        # Where one engine is held at a time, it is worth opening for many images only.
        parts = list(by_graph(chain)) if self._low_memory else [chain]
        at_once = batch_size * (max(_AT_ONCE // batch_size, 1) if self._low_memory else 1)
        for start in range(0, len(seeds), at_once):
            conditions = self._conditions(tokens[start : start + at_once], negative)
            latents = self._start(settings, seeds[start : start + at_once])
            batches = [slice(i, i + batch_size) for i in range(0, len(latents), batch_size)]
            found, given = [latents[batch] for batch in batches], calls.first_latents(manifest, settings)
            for part in parts:
                for i, batch in enumerate(batches):
                    values = calls.values(manifest, conditions[batch], settings) | {given: found[i]}
                    found[i] = self._advance(part, values, on_step)
                given = part[-1].outputs[0][1]
            for pixels in found if given == calls.PIXELS else map(self.decode, found):
                yield from map(Image.fromarray, pixels)

    def _advance(self, part: Sequence[Call], values: Values, on_step: OnStep | None) -> Any:
        """Run calls on a batch; what the last one puts out. Nothing leaves the engines' device in between, unless there
        is someone to look at it."""
        last = part[-1].outputs[0][1]
        if on_step is None:
            return self.runner.chain(part, values, [last]).values[last]
        for result in self._denoise([call for call in part if call.graph != "decoder"], values):
            on_step(result)
        return self._run(part[-1], values) if last == calls.PIXELS else values[last]

    def _denoise(self, steps: Sequence[Call], values: Values, *, on_device: bool = False) -> Iterator[StepResult]:
        """Run steps one by one; the latents after each are added to `values`."""
        for call in steps:
            start, name = time.perf_counter(), call.outputs[0][1]
            if on_device:
                given = {value: values[value] for _, value in call.inputs}
                latents = self.runner.chain([call], given, [name], on_device=True).values[name]
            else:
                latents = self._run(call, values)
            values[name] = latents
            milliseconds = (time.perf_counter() - start) * 1e3
            yield StepResult(int(name.partition(".")[2]), call.graph.partition(".")[2], latents, milliseconds)

    def _run(self, call: Call, values: Values) -> NDArray[Any]:
        feeds = {port: values[name] for port, name in call.inputs}
        return self.runner.run(call.graph, feeds)[call.outputs[0][0]]

    def _latent_shape(self, settings: Settings) -> tuple[int, int, int]:
        return self.bundle.manifest.image.latents_of(settings.height, settings.width)


def choose_target(bundle: Bundle, target: str | None, device: int) -> str:
    """The target to run: the one asked for, if it runs here, or the first that does. Raises `TargetError`."""
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
        raise TargetError(
            f"target {target!r}: this bundle has engines for {', '.join(engines) or 'none'}; add them with: "
            "glance-trt compile BUNDLE --engine TARGET"
        )
    if reason := unrunnable(engines[target].backend, engines[target].requires, device):
        raise TargetError(f"{target}: {reason}")
    return target

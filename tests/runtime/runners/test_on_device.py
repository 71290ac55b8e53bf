"""Chains of engines on a device: the images are those of the host's runner, whatever stays on the device between.

The device is the host's memory (tests/models/host_device.py) and the engines are ONNX Runtime's over bound addresses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glance_trt.bundle import Bundle
from glance_trt.errors import InputError, TargetError
from glance_trt.runtime.pipeline import Pipeline, Request
from glance_trt.runtime.runners.device import Binding, Engine, NotCaptured
from glance_trt.runtime.runners.on_device import DeviceRunner
from glance_trt.runtime.runners.onnxruntime_device import OnnxRuntimeEngine

from ...models import rich
from ...models.host_device import HostDevice

PROMPT = "a large red circle"
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)


class Capturable:
    """An engine of ONNX Runtime that says it may be captured, which on the host it may, and uses scratch memory."""

    def __init__(self, engine: OnnxRuntimeEngine, device: HostDevice, scratch: int) -> None:
        self._engine, self._device, self._scratch = engine, device, scratch
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> Binding:
        inner, device, size = self._engine.bind(shapes), self._device, self._scratch * shapes.get("latents", (1,))[0]

        class Bound:
            outputs, scratch = inner.outputs, size

            def capturable(self) -> bool:
                return True

            def enqueue(self, addresses: Mapping[str, int], scratch: int) -> None:
                def run() -> None:
                    device.bytes_at(scratch, size)[:] = 7  # fails where the memory is too small
                    inner.enqueue(addresses, scratch)

                device.later(run)

            def close(self) -> None:
                device.counts["bindings closed"] += 1

        device.counts["bindings"] += 1
        return Bound()

    def close(self) -> None:
        self._device.counts["engines"] -= 1


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


def open_pipeline(bundle: Path, device: HostDevice, *, scratch: int = 100, low_memory: bool = False) -> Pipeline:
    opened = Bundle.open(bundle)
    files = {name: engine.file for name, engine in opened.manifest.engines["cpu"].graphs.items()}

    def open_engine(graph: str) -> Engine:
        engine = OnnxRuntimeEngine(opened.path(files[graph]), name=graph, provider="CPUExecutionProvider")
        device.counts["engines"] += 1
        device.counts["opened"] += 1
        device.counts["most engines"] = max(device.counts["most engines"], device.counts["engines"])
        return Capturable(engine, device, scratch)

    runner = DeviceRunner(device, open_engine, files, one_at_a_time=low_memory)
    return Pipeline(opened, "cpu", runner, low_memory=low_memory)


@pytest.fixture
def on_device(tiny_bundle: Path, device: HostDevice) -> Iterator[Pipeline]:
    with open_pipeline(tiny_bundle, device) as pipeline:
        yield pipeline


@pytest.fixture
def on_host(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        yield pipeline


def pixels(pipeline: Pipeline, **arguments: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipeline.generate(PROMPT, **arguments)])


def encode(pipeline: Pipeline) -> None:
    """Run the text encoder for both prompts, which are kept: so that only images are counted."""
    for prompt in (PROMPT, pipeline.bundle.manifest.guidance.negative_prompt):
        pipeline.encode(prompt)


def test_images_are_those_of_the_host_s_runner(on_device: Pipeline, on_host: Pipeline) -> None:
    for arguments in (
        {"seed": 1},
        {"seed": 2, "count": 5, "batch_size": 2},
        {"seed": 3, "guidance_scale": 1.5, "negative_prompt": "a star"},
        {"seed": 4, "schedule": "short", "count": 3},
        {"seed": 1},
    ):
        assert np.array_equal(pixels(on_device, **arguments), pixels(on_host, **arguments)), arguments


def test_steps_are_those_of_the_host_s_runner(on_device: Pipeline, on_host: Pipeline) -> None:
    found, expected = (list(pipeline.steps(PROMPT, seed=5, count=2)) for pipeline in (on_device, on_host))
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.latents, other.latents)
    assert np.array_equal(on_device.decode(found[-1].latents), on_host.decode(found[-1].latents))


def test_from_the_second_image_on_all_is_one_launch(on_device: Pipeline, device: HostDevice) -> None:
    encode(on_device)
    device.counts.clear()
    first = pixels(on_device, seed=1)
    assert (device.counts["captures"], device.counts["launches"]) == (0, 0)
    assert device.counts["copies"] == 2, "one for all that goes in, one for what comes out"
    for _ in range(3):
        device.counts["copies"] = 0
        assert np.array_equal(pixels(on_device, seed=1), first)
        assert device.counts["copies"] == 1, "what goes in; what comes out is in the captured graph"
    assert (device.counts["captures"], device.counts["launches"]) == (1, 3)


def test_every_size_of_a_batch_has_its_own_graph(on_device: Pipeline, device: HostDevice) -> None:
    encode(on_device)
    device.counts.clear()
    for _ in range(3):
        pixels(on_device, count=3, batch_size=2)
    on_device.generate(PROMPT, count=2, guidance_scale=9.0)
    launches = {"captures": 2, "launches": 5}
    assert {name: device.counts[name] for name in launches} == launches


def test_growing_scratch_memory_does_not_leave_graphs_with_the_old_address(
    on_device: Pipeline, on_host: Pipeline, device: HostDevice
) -> None:
    encode(on_device)
    device.counts.clear()
    for count in (1, 1, 1, 4, 1, 4, 4, 1):
        found = pixels(on_device, seed=8, count=count)
        assert np.array_equal(found, pixels(on_host, seed=8, count=count)), count
    assert device.counts["captures"] == 3, "of one image twice, since four needed more"


def test_work_that_cannot_be_captured_is_run_all_the_same(
    on_device: Pipeline, on_host: Pipeline, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_enqueue: object) -> None:
        raise NotCaptured("not today")

    encode(on_device)
    monkeypatch.setattr(device, "capture", refuse)
    expected = pixels(on_host, seed=1)
    assert np.array_equal(pixels(on_device, seed=1), expected)
    with pytest.warns(UserWarning, match=r"^not captured as one graph, which costs time between steps: not today$"):
        assert np.array_equal(pixels(on_device, seed=1), expected)
    assert np.array_equal(pixels(on_device, seed=1), expected), "without a second warning"


def test_everything_is_freed(tiny_bundle: Path, device: HostDevice) -> None:
    with open_pipeline(tiny_bundle, device) as pipeline:
        for count in range(1, 13):  # more sizes than are kept
            pixels(pipeline, count=count, batch_size=count)
        assert device.counts["blocks"] < 40
    assert [device.counts[name] for name in ("blocks", "events", "engines", "closed")] == [0, 0, 0, 1]
    assert device.counts["bindings"] == device.counts["bindings closed"]
    with pytest.raises(TargetError, match=r"the pipeline is closed; open the bundle again"):
        pipeline.generate(PROMPT)


def test_low_memory_holds_one_engine_and_takes_all_images_through_it(
    tiny_bundle: Path, device: HostDevice, on_host: Pipeline
) -> None:
    with open_pipeline(tiny_bundle, device, low_memory=True) as pipeline:
        found = pixels(pipeline, seed=3, count=5, batch_size=2)
        opened = device.counts["opened"]
    assert np.array_equal(found, pixels(on_host, seed=3, count=5, batch_size=2))
    assert device.counts["most engines"] == 1
    assert opened == 4, "each once: text encoder, slow, fast and decoder, whatever the number of batches"


def test_times_are_by_graph(on_device: Pipeline) -> None:
    calls, values = on_device.prepare(PROMPT, on_device.settings(), seed=3)
    found = on_device.runner.chain(calls, values, ["latents.2", "pixels"])
    assert list(found.milliseconds) == ["denoiser.slow", "denoiser.fast", "decoder"]
    assert all(time > 0 for time in found.milliseconds.values())
    steps = list(on_device.steps(PROMPT, seed=3))
    assert np.array_equal(found.values["latents.2"], steps[1].latents)
    assert np.array_equal(found.values["pixels"], on_device.decode(steps[-1].latents))


def test_pixels_stay_on_the_device_and_latents_may_come_from_there(on_device: Pipeline, on_host: Pipeline) -> None:
    noise = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)

    class Foreign:
        shape = noise.shape

        def __dlpack__(self, **options: Any) -> object:
            return noise.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return noise.__dlpack_device__()

    expected = on_host.pixels(PROMPT, latents=noise)
    for given in (noise, Foreign()):
        for pipeline in (on_device, on_host):
            found = pipeline.pixels(PROMPT, latents=given)
            assert np.array_equal(np.from_dlpack(found), expected)
    kept = np.from_dlpack(on_device.pixels(PROMPT, seed=1))
    copy = kept.copy()
    on_device.pixels(PROMPT, seed=2)
    assert np.array_equal(kept, copy), "the caller's own, not the next image's"
    assert np.array_equal(copy, pixels(on_host, seed=1))
    with pytest.raises(InputError, match=r"^latents: expected \[B, 3, 4, 6\], got \[2, 4, 4, 6\]$"):
        on_device.pixels(PROMPT, latents=np.zeros((2, 4, 4, 6), np.float32))


def test_steps_leave_their_latents_on_the_device(on_device: Pipeline, on_host: Pipeline) -> None:
    noise = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    for given in ({"seed": 3}, {"latents": noise}):
        expected = list(on_host.steps(PROMPT, **given))
        found = list(on_device.steps(PROMPT, on_device=True, **given))
        assert [(step.index, step.phase) for step in found] == [(step.index, step.phase) for step in expected]
        for step, same in zip(found, expected, strict=True):
            assert not isinstance(step.latents, np.ndarray)
            assert np.array_equal(np.from_dlpack(step.latents), same.latents)


def test_one_engine_takes_what_another_left_on_the_device(on_device: Pipeline, on_host: Pipeline) -> None:
    *_, last = on_device.steps(PROMPT, seed=3, on_device=True)
    shared = on_device.run("decoder", {"latents": last.latents})
    assert list(shared) == ["images"]
    assert np.array_equal(np.from_dlpack(shared["images"]), pixels(on_host, seed=3))
    *_, last = on_host.steps(PROMPT, seed=3)
    for pipeline in (on_device, on_host):
        (found,) = pipeline.run("decoder", {"latents": last.latents}).values()
        assert np.array_equal(np.from_dlpack(found), pixels(on_host, seed=3))
        with pytest.raises(InputError, match=r"^graph 'nothing': this bundle has text_encoder, "):
            pipeline.run("nothing", {})
        with pytest.raises(InputError, match="decoder"):
            pipeline.run("decoder", {})
        with pytest.raises(InputError, match=r"list"):
            pipeline.run("decoder", {"latents": [1.0]})


@pytest.mark.parametrize("wishes", [{}, {"height": 12, "width": 8}, {"image": PICTURE, "strength": 0.6}])
def test_sizes_masks_and_images_from_images_are_those_of_the_host_s_runner(
    rich_bundle: Path, device: HostDevice, wishes: dict[str, Any]
) -> None:
    with open_pipeline(rich_bundle, device) as on_device, Pipeline.open(rich_bundle, threads=1) as on_host:
        for _ in range(3):  # the third is captured
            found = pixels(on_device, seed=1, count=2, **wishes)
            assert np.array_equal(found, pixels(on_host, seed=1, count=2, **wishes))
        assert np.array_equal(np.from_dlpack(on_device.pixels(PROMPT, seed=1, count=2, **wishes)), found)


def test_images_in_tiles_come_from_the_device_as_arrays_of_the_host(tmp_path: Path, device: HostDevice) -> None:
    image = dataclasses.replace(rich.IMAGE, tile=(16, 4))
    bundle = rich.make_bundle(tmp_path / "tiled.bundle", image=image)
    with open_pipeline(bundle, device) as on_device, Pipeline.open(bundle, threads=1) as on_host:
        wishes: dict[str, Any] = {"height": 20, "width": 24}
        for _ in range(3):
            found = pixels(on_device, seed=1, count=2, **wishes)
            assert np.array_equal(found, pixels(on_host, seed=1, count=2, **wishes))
        shared = on_device.pixels(PROMPT, seed=1, count=2, **wishes)
        assert isinstance(shared, np.ndarray)
        assert np.array_equal(shared, found)
        assert not isinstance(on_device.pixels(PROMPT, seed=1), np.ndarray), "one that is not tiled stays there"


def test_low_memory_holds_one_of_several_text_encoders_and_none_beside_the_denoiser(
    rich_bundle: Path, device: HostDevice
) -> None:
    requests = [Request(f"a star {i}", i) for i in range(5)]
    with open_pipeline(rich_bundle, device, low_memory=True) as pipeline:
        found = [image.tobytes() for image in pipeline.draw(requests, pipeline.settings(), batch_size=2)]
        assert device.counts["most engines"] == 1
        assert device.counts["opened"] == 5, "two text encoders, slow, fast and decoder, each once"
    with Pipeline.open(rich_bundle, threads=1) as on_host:
        assert found == [image.tobytes() for image in on_host.draw(requests, on_host.settings())]


def test_images_that_are_asked_for_before_the_last_is_done_do_not_mix(on_device: Pipeline, on_host: Pipeline) -> None:
    found = [on_device.pixels(PROMPT, seed=seed) for seed in range(6)]
    for seed, image in enumerate(found):
        assert np.array_equal(np.from_dlpack(image), pixels(on_host, seed=seed)), seed


def test_what_does_not_fit_is_refused_by_name(on_device: Pipeline) -> None:
    run = on_device.runner.run
    good = np.zeros((1, 3, 4, 6), np.float32)
    with pytest.raises(InputError, match=r"^decoder: input 'latents' is missing; this engine takes latents$"):
        run("decoder", {})
    with pytest.raises(InputError, match=r"^decoder: got 'other', which is no input; this engine takes latents$"):
        run("decoder", {"latents": good, "other": good})
    with pytest.raises(InputError, match=r"^decoder: got latents float64; this engine takes float32$"):
        run("decoder", {"latents": good.astype(np.float64)})
    with pytest.raises(InputError, match=r"^decoder: got latents \(1,3,4,7\); this engine takes \(batch,3,4,6\)$"):
        run("decoder", {"latents": np.zeros((1, 3, 4, 7), np.float32)})
    with pytest.raises(TargetError, match=r"^denoiser\.middle: no such engine; this target has text_encoder, "):
        run("denoiser.middle", {})


def test_inputs_that_disagree_in_a_dimension_are_refused(on_device: Pipeline) -> None:
    calls, values = on_device.prepare(PROMPT, on_device.settings(), count=2)
    with pytest.raises(InputError, match=r"^denoiser\.slow: got prompt_embeds \(2,8,3\), which differs in batch$"):
        on_device.runner.chain(calls, values | {"latents.0": values["latents.0"][:1]}, ["pixels"])


def test_calls_from_several_threads_take_turns(on_device: Pipeline, on_host: Pipeline) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: pixels(on_device, seed=seed), range(12)))
    for seed, image in enumerate(found):
        assert np.array_equal(image, pixels(on_host, seed=seed))


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_an_error_and_no_silent_fallback(tiny_bundle: Path) -> None:
    with pytest.raises(TargetError, match=r"^decoder: ONNX Runtime [\d.]+ could not start its CUDAExecutionProvider$"):
        OnnxRuntimeEngine(tiny_bundle / "decoder.onnx", name="decoder", provider="CUDAExecutionProvider")

"""The pipeline is the loop over the table that numpy computes; a seed gives one image, whatever the batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray

from glance_trt.bundle import Bundle, GuidanceMode
from glance_trt.errors import BundleError, GlanceError, InputError, TargetError
from glance_trt.prompts import PromptTruncated
from glance_trt.runtime.noise import SEED_MAX, randn
from glance_trt.runtime.pipeline import Pipeline
from glance_trt.runtime.settings import Settings

from ..models import tiny
from .recorder import Recorder

PROMPT = "a large red circle"


@pytest.fixture
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle, threads=1) as opened:
        yield opened


def embeds(prompt: str) -> tiny.Floats:
    """[1, LENGTH, 3], by the tokenizers library's own truncation and padding."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny.TOKENIZER))
    tokenizer.enable_truncation(tiny.LENGTH)
    tokenizer.enable_padding(length=tiny.LENGTH, pad_id=1)
    return tiny.encode(np.array([tokenizer.encode(prompt).ids]))


def loop(
    prompt: str, negative: str, scale: float, seed: int, count: int = 1, schedule: str = "default"
) -> list[tiny.Floats]:
    """The latents after each step, in numpy."""
    table = tiny.SCHEDULES[schedule]
    noise = np.stack([randn((3, tiny.HEIGHT, tiny.WIDTH), seed + i) for i in range(count)])
    x = noise * np.float32(table.initial_noise_scale)
    found = []
    for step in table.steps:
        x = tiny.denoise(step.phase, x, step.timestep, step.coefficients, embeds(prompt), embeds(negative), scale)
        found.append(x)
    return found


def arrays(images: list[Any]) -> NDArray[np.uint8]:
    return np.stack([np.asarray(image) for image in images])


# --- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["default", "short"])
def test_steps_equal_a_loop_over_the_table_in_numpy(pipeline: Pipeline, schedule: str) -> None:
    expected = loop(PROMPT, "a star", 2.5, seed=7, count=3, schedule=schedule)
    arguments: dict[str, Any] = {"negative_prompt": "a star", "guidance_scale": 2.5, "schedule": schedule}
    found = list(pipeline.steps(PROMPT, seed=7, count=3, **arguments))
    assert [result.index for result in found] == list(range(1, len(expected) + 1))
    assert [result.phase for result in found] == [step.phase for step in tiny.SCHEDULES[schedule].steps]
    for result, latents in zip(found, expected, strict=True):
        assert result.latents.dtype == np.float32
        assert 0 < result.milliseconds < 60_000
        np.testing.assert_allclose(result.latents, latents, rtol=0, atol=2e-6)


def test_images_are_the_decoded_last_latents(pipeline: Pipeline) -> None:
    expected = tiny.decode(loop(PROMPT, tiny.GUIDANCE.negative_prompt, tiny.GUIDANCE.scale, seed=7, count=2)[-1])
    images = pipeline.generate(PROMPT, seed=7, count=2)
    assert [(image.mode, image.size) for image in images] == [("RGB", (tiny.WIDTH, tiny.HEIGHT))] * 2
    difference = np.abs(arrays(images).astype(int) - expected)
    assert difference.max() <= 1  # where float32 rounds to the other side of a half
    assert (difference == 0).mean() > 0.95


def test_generate_is_deterministic_for_a_seed(pipeline: Pipeline, tiny_bundle: Path) -> None:
    first = arrays(pipeline.generate(PROMPT, seed=7, count=2))
    np.testing.assert_array_equal(first, arrays(pipeline.generate(PROMPT, seed=7, count=2)))
    with Pipeline.open(str(tiny_bundle), "cpu") as another:
        np.testing.assert_array_equal(first, arrays(another.generate(PROMPT, seed=7, count=2)))
    assert (first != arrays(pipeline.generate(PROMPT, seed=9, count=2))).any()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_image_i_of_a_batch_is_the_image_of_seed_plus_i(pipeline: Pipeline, batch_size: int) -> None:
    images = pipeline.generate(PROMPT, seed=-3, count=5, batch_size=batch_size)
    alone = [pipeline.generate(PROMPT, seed=-3 + i)[0] for i in range(5)]
    np.testing.assert_array_equal(arrays(images), arrays(alone))


def test_batches_have_the_asked_size_and_the_prompt_is_encoded_once(pipeline: Pipeline) -> None:
    recorder = Recorder(pipeline)
    reported: list[tuple[int, int]] = []
    arguments: dict[str, Any] = {"count": 5, "batch_size": 2, "schedule": "short"}
    pipeline.generate(PROMPT, **arguments, on_step=lambda step: reported.append((step.index, len(step.latents))))
    sizes = [(graph, len(inputs["latents"])) for graph, inputs in recorder.calls if "latents" in inputs]
    assert sizes == [(graph, size) for size in (2, 2, 1) for graph in ("denoiser.fast", "decoder")]
    assert reported == [(1, 2), (1, 2), (1, 1)]
    assert [graph for graph, _ in recorder.calls].count("text_encoder") == 2  # the prompt, the negative prompt


def test_callers_may_keep_latents_and_change_them_between_steps(pipeline: Pipeline) -> None:
    kept = list(pipeline.steps(PROMPT, seed=1))
    again = []
    for result in pipeline.steps(PROMPT, seed=1):
        again.append(result.latents.copy())
        if result.index == 2:
            result.latents[:] = 0
    np.testing.assert_array_equal(kept[1].latents, again[1])
    assert (kept[2].latents != again[2]).any()


# --- conditions -----------------------------------------------------------------------------------------------------


def test_negative_prompt_and_guidance_scale_reach_every_step(pipeline: Pipeline) -> None:
    recorder = Recorder(pipeline)
    pipeline.generate(PROMPT, count=2, negative_prompt="a pink star", guidance_scale=1.75)
    steps = [inputs for graph, inputs in recorder.calls if graph.startswith("denoiser.")]
    assert len(steps) == 4
    for inputs in steps:
        assert inputs["guidance_scale"] == np.float32(1.75)
        np.testing.assert_array_equal(inputs["prompt_embeds"], np.repeat(embeds(PROMPT), 2, axis=0))
        np.testing.assert_array_equal(inputs["negative_prompt_embeds"], np.repeat(embeds("a pink star"), 2, axis=0))


def test_what_is_not_given_comes_from_the_bundle(pipeline: Pipeline) -> None:
    guidance, size = (tiny.GUIDANCE.scale, tiny.GUIDANCE.negative_prompt), (tiny.HEIGHT, tiny.WIDTH)
    assert pipeline.settings() == Settings("default", 4, *guidance, *size)
    given = pipeline.settings(negative_prompt="", guidance_scale=1, schedule="short")
    assert given == Settings("short", 1, 1.0, "", *size)
    defaults = {"guidance_scale": tiny.GUIDANCE.scale, "negative_prompt": tiny.GUIDANCE.negative_prompt}
    explicit = pipeline.generate(PROMPT, seed=0, schedule="default", **defaults)
    np.testing.assert_array_equal(arrays(pipeline.generate(PROMPT)), arrays(explicit))


@pytest.mark.parametrize("guidance", ["none", "embedded"])
def test_bundle_without_guidance_refuses_what_would_have_no_effect(guidance: GuidanceMode, tmp_path: Path) -> None:
    with Pipeline.open(tiny.make_bundle(tmp_path / "bundle", guidance=guidance)) as pipeline:
        with pytest.raises(
            InputError, match=r"^negative prompt: this bundle takes none, it evaluates no second prompt; leave it out$"
        ):
            pipeline.generate(PROMPT, negative_prompt="a star")
        if guidance == "none":
            with pytest.raises(InputError, match=r"^guidance scale: this bundle was built without guidance"):
                pipeline.generate(PROMPT, guidance_scale=2)
            assert pipeline.settings() == Settings("default", 4, 1.0, "", tiny.HEIGHT, tiny.WIDTH)
        else:
            weak, strong = (pipeline.generate(PROMPT, guidance_scale=scale)[0] for scale in (0, 4))
            assert weak != strong
        assert pipeline.generate(PROMPT)[0] == pipeline.generate(PROMPT)[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompt": ""}, r"prompt: empty; say what the image should show"),
        ({"prompt": " \t\n\u3000"}, r"prompt: empty; say what the image should show"),
        ({"prompt": None}, r"prompt: got NoneType; a prompt is text"),
        ({"prompt": b"bytes"}, r"prompt: got bytes; a prompt is text"),
        ({"prompt": ["a", "b"]}, r"prompt: got list; a prompt is text"),
        (
            {"prompt": "a \udcff"},
            r"prompt: got the surrogate U\+DCFF at character 2; a prompt is text that UTF-8 can hold",
        ),
        ({"negative_prompt": 3}, r"negative prompt: got int; a prompt is text"),
        ({"negative_prompt": "\ud800"}, r"negative prompt: got the surrogate U\+D800 at character 0.*"),
        ({"schedule": "fast"}, r"schedule 'fast': this bundle has default, short"),
        ({"schedule": ""}, r"schedule '': this bundle has default, short"),
        ({"guidance_scale": float("nan")}, r"guidance scale: expected a finite number, got nan"),
        ({"guidance_scale": float("-inf")}, r"guidance scale: expected a finite number, got -inf"),
        ({"guidance_scale": 1e39}, r"guidance scale: expected a finite number, got 1e\+39"),
        ({"guidance_scale": "7"}, r"guidance scale: expected a finite number, got '7'"),
        ({"seed": SEED_MAX + 1}, r"seed: got 18446744073709551616; a seed is a whole number from .*"),
        ({"seed": SEED_MAX, "count": 2}, r"seed: got 18446744073709551616; a seed is a whole number from .*"),
        ({"seed": 0.5}, r"seed: got float; a seed is a whole number from .*"),
        ({"seed": "7"}, r"seed: got str; a seed is a whole number from .*"),
        ({"count": 0}, r"count.*: .*at least 1.*"),
        ({"count": -1}, r"count.*: .*at least 1.*"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("method", ["generate", "steps"])
def test_bad_argument_is_refused_before_any_step(
    pipeline: Pipeline, method: str, arguments: dict[str, Any], text: str
) -> None:
    recorder = Recorder(pipeline)
    with pytest.raises(InputError, match=f"^{text}$"):
        getattr(pipeline, method)(**{"prompt": PROMPT} | arguments)
    assert not [graph for graph, _ in recorder.calls if graph != "text_encoder"]


def test_late_seed_out_of_range_is_refused_before_the_first_batch(pipeline: Pipeline) -> None:
    recorder = Recorder(pipeline)
    with pytest.raises(InputError, match=r"^seed: got 18446744073709551616; "):
        pipeline.generate(PROMPT, seed=SEED_MAX - 1, count=3, batch_size=1)
    assert not [graph for graph, _ in recorder.calls if graph == "decoder"]


@pytest.mark.parametrize(
    ("name", "value", "shown"), [("batch_size", 0, "0"), ("count", "2", "'2'"), ("count", 1.5, "1.5")]
)
def test_counts_are_whole_numbers_from_one(pipeline: Pipeline, name: str, value: Any, shown: str) -> None:
    with pytest.raises(InputError, match=rf"^{name}: expected a whole number, at least 1, got {shown}$"):
        pipeline.generate(PROMPT, **{name: value})


def test_too_long_prompt_warns_with_what_was_cut_every_time_and_counts_as_the_cut_one(pipeline: Pipeline) -> None:
    whole = "a large red circle left of a small blue star "
    for _ in range(2):  # the second time from the cache
        with pytest.warns(PromptTruncated) as caught:
            images = pipeline.generate(whole, count=3, batch_size=1)
        (text,) = (str(warning.message) for warning in caught)
        assert text == "prompt: longer than the 8 tokens of the text encoder; cut: 'a small blue star'"
    assert images == pipeline.generate("a large red circle left of", count=3)
    with pytest.warns(PromptTruncated, match=r"^negative prompt: longer than .*; cut: 'a small blue star'$"):
        pipeline.generate(PROMPT, negative_prompt=whole)


def test_warning_shows_the_beginning_of_a_long_cut(pipeline: Pipeline) -> None:
    with pytest.warns(PromptTruncated) as caught:
        pipeline.encode("red " * 5000)
    assert len(str(caught[0].message)) < 300
    assert str(caught[0].message).endswith("...'")


def test_embeddings_are_kept_for_the_latest_prompts_and_cannot_be_written(pipeline: Pipeline) -> None:
    recorder = Recorder(pipeline)
    for i in range(100):
        pipeline.encode(f"circle {i}")
        pipeline.encode("a star")  # is used all the time and stays
    assert len(recorder.calls) == 101
    result = pipeline.encode("a star")
    np.testing.assert_array_equal(result["prompt_embeds"], embeds("a star"))
    with pytest.raises(ValueError, match="read-only"):
        result["prompt_embeds"][:] = 0
    pipeline.encode("circle 0")
    assert len(recorder.calls) == 102


# --- several threads, opening and closing ---------------------------------------------------------------------------


def test_four_threads_get_what_one_gets(pipeline: Pipeline, tiny_bundle: Path) -> None:
    jobs = [(f"a {color} star {i}", i) for i in range(40) for color in ("red", "blue")]  # more prompts than are cached

    def draw(source: Pipeline, job: tuple[str, int]) -> bytes:
        return source.generate(job[0], seed=job[1], count=2)[1].tobytes()

    expected = [draw(pipeline, job) for job in jobs]
    start = threading.Barrier(4)
    with Pipeline.open(tiny_bundle, threads=1) as shared, ThreadPoolExecutor(4) as pool:

        def work(turn: int) -> list[bytes]:
            start.wait()  # so that all four open the engines
            order = jobs[turn * 20 :] + jobs[: turn * 20]
            found = dict(zip(order, (draw(shared, job) for job in order), strict=True))
            return [found[job] for job in jobs]

        assert all(found == expected for found in pool.map(work, range(4)))


def test_closed_pipeline_says_so(tiny_bundle: Path) -> None:
    with Pipeline.open(tiny_bundle) as pipeline:
        pipeline.generate(PROMPT)
        steps = pipeline.steps(PROMPT)
        next(steps)
    with pytest.raises(GlanceError, match=r"closed; open the bundle again"):
        pipeline.generate("a star")
    with pytest.raises(GlanceError, match=r"closed; open the bundle again"):
        next(steps)
    pipeline.close()


def test_closes_after_an_error(tiny_bundle: Path) -> None:
    with pytest.raises(InputError), Pipeline.open(tiny_bundle) as pipeline:
        pipeline.generate("")
    with pytest.raises(GlanceError, match=r"closed; open the bundle again"):
        pipeline.generate(PROMPT)


def test_target_is_one_that_the_bundle_has_and_this_version_runs(tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(TargetError, match=r"^target 'rtx': this bundle has engines for cpu; add them with: "):
        Pipeline.open(tiny_bundle, "rtx")
    cpu = Bundle.open(tiny_bundle).manifest.engines["cpu"]
    rtx = replace(cpu, backend="tensorrt-rtx")
    both = tiny.make_bundle(tmp_path / "both", engines={"rtx": rtx, "cpu": cpu})
    with Pipeline.open(both) as pipeline:
        assert pipeline.target == "cpu"
    with pytest.raises(TargetError, match=r"^rtx: "):
        Pipeline.open(both, "rtx")
    folder = tiny.make_bundle(tmp_path / "rtx", engines={"rtx": rtx})
    with pytest.raises(TargetError, match=r"rtx: none of its targets runs here:\n  rtx: "):
        Pipeline.open(folder)
    folder = tiny.make_bundle(tmp_path / "none", engines={})
    with pytest.raises(TargetError, match=r": none of its targets runs here: none$"):
        Pipeline.open(folder)
    with pytest.raises(TargetError, match=r"this bundle has engines for none; add"):
        Pipeline.open(folder, "cpu")


def test_engines_run_only_where_the_manifest_says_that_they_run(tmp_path: Path, tiny_bundle: Path) -> None:
    cpu = Bundle.open(tiny_bundle).manifest.engines["cpu"]
    for key, there in (("onnxruntime", "0.1"), ("cpu", "x86_64-avx9000")):
        elsewhere = replace(cpu, requires={**cpu.requires, key: there})
        folder = tiny.make_bundle(tmp_path / key, engines={"cpu": elsewhere})
        with pytest.raises(TargetError, match=rf"^cpu: built for {key} {there}, but this is "):
            Pipeline.open(folder, "cpu")


def test_altered_engine_is_not_opened_but_an_unused_file_is_not_read(tmp_path: Path) -> None:
    folder = tiny.make_bundle(tmp_path / "bundle", extra={"unused.bin": b"0" * 10})
    (folder / "unused.bin").write_bytes(b"1" * 10)
    Pipeline.open(folder).close()
    engine = folder / "decoder.onnx"
    engine.write_bytes(engine.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match=r"decoder\.onnx: altered \(its SHA-256 is not the listed one\)"):
        Pipeline.open(folder)

"""The pipeline of a bundle with all that the format knows: several text encoders, sizes, images from images, tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from glance_trt.errors import InputError
from glance_trt.prompts import PromptTruncated
from glance_trt.runtime import tiling
from glance_trt.runtime.pipeline import Pipeline, Request

from ..models import rich, tiny
from .recorder import Recorder

PROMPT = "a large red circle"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8))
SIDE, OVERLAP = 16, 4


@pytest.fixture(scope="module")
def tiled_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, which decodes 8 x 40 and 20 x 24 in tiles."""
    image = dataclasses.replace(rich.IMAGE, tile=(SIDE, OVERLAP))
    return rich.make_bundle(tmp_path_factory.mktemp("tiled") / "tiled.bundle", image=image)


@pytest.fixture
def tiled_pipeline(tiled_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiled_bundle, threads=1) as opened:
        yield opened


def draws(seed: int, shape: tuple[int, ...], count: int) -> list[tiny.Floats]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn((1, *shape), generator=generator).numpy() for _ in range(count)]


def loop(
    size: tuple[int, int],
    schedule: str,
    seed: int,
    *,
    picture: Image.Image | None = None,
    steps: int | None = None,
    scale: float = 2.5,
) -> list[tiny.Floats]:
    """The latents after each step of one image, in numpy, with the noise of torch."""
    table, shape = rich.SCHEDULES[schedule], (3, size[0] // rich.SCALE, size[1] // rich.SCALE)
    first = len(table.steps) - (len(table.steps) if steps is None else steps)
    if picture is None:
        x = draws(seed, shape, 1)[0] * np.float32(table.initial_noise_scale)
    else:
        posterior, noise = draws(seed, shape, 2)
        signal, level = np.array(table.steps[first].mix, np.float32)
        x = signal * rich.encode_image(np.asarray(picture)[None], posterior) + level * noise
    own, negative = (rich.encode(**rich.tokens(prompt)) for prompt in (PROMPT, "a star"))
    found = []
    for step in table.steps[first:]:
        x = rich.denoise(step.phase, x, step.timestep, step.coefficients, own, negative, scale)
        found.append(x)
    return found


WISHES: dict[str, Any] = {"negative_prompt": "a star", "guidance_scale": 2.5}


def arrays(images: list[Image.Image]) -> NDArray[np.uint8]:
    return np.stack([np.asarray(image) for image in images])


def assert_close(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1  # where float32 rounds to the other side of a half
    assert (difference == 0).mean() > 0.95


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "schedule"), [((8, 12), "usual"), ((12, 8), "usual"), ((8, 40), "any"), ((20, 24), "any")]
)
def test_images_of_every_size_are_those_of_a_loop_in_numpy(
    rich_pipeline: Pipeline, size: tuple[int, int], schedule: str
) -> None:
    wishes = WISHES | {"height": size[0], "width": size[1]}
    expected = [loop(size, schedule, seed) for seed in (7, 8)]
    for result, latents in zip(
        rich_pipeline.steps(PROMPT, seed=7, count=2, **wishes), zip(*expected, strict=True), strict=True
    ):
        np.testing.assert_allclose(result.latents, np.concatenate(latents), rtol=0, atol=1e-5)
        assert result.phase == rich.SCHEDULES[schedule].steps[result.index - 1].phase
    images = rich_pipeline.generate(PROMPT, seed=7, count=2, **wishes)
    assert {image.size for image in images} == {size[::-1]}
    assert_close(arrays(images), np.concatenate([rich.decode(latents[-1]) for latents in expected]))
    np.testing.assert_array_equal(rich_pipeline.pixels(PROMPT, seed=7, count=2, **wishes), arrays(images))


def test_latents_have_the_shape_of_the_size(rich_pipeline: Pipeline) -> None:
    settings = rich_pipeline.settings(height=12, width=8)
    calls, values = rich_pipeline.prepare(PROMPT, settings, count=2)
    assert values["latents.0"].shape == (2, 3, 6, 4)
    assert calls[-1].outputs[0][1] == "pixels"
    given = np.zeros((1, 3, 4, 6), np.float32)
    with pytest.raises(InputError, match=r"^latents: expected \[B, 3, 6, 4\], got \[1, 3, 4, 6\]$"):
        rich_pipeline.pixels(PROMPT, latents=given, height=12, width=8)
    assert rich_pipeline.pixels(PROMPT, latents=given).shape == (1, 8, 12, 3)


# --- images from images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "strength", "steps"),
    [("usual", 1.0, 4), ("usual", 0.99, 3), ("usual", 0.5, 2), ("usual", 0.25, 1), ("any", 0.6, 2), ("any", 0.1, 1)],
)
def test_images_from_an_image_are_those_of_a_loop_in_numpy(
    rich_pipeline: Pipeline, schedule: str, strength: float, steps: int
) -> None:
    wishes = WISHES | {"schedule": schedule, "image": PICTURE, "strength": strength}
    expected = [loop((8, 12), schedule, seed, picture=PICTURE, steps=steps) for seed in (7, 8, 9)]
    results = list(rich_pipeline.steps(PROMPT, seed=7, count=3, **wishes))
    last = len(rich.SCHEDULES[schedule].steps)
    assert [result.index for result in results] == list(range(last - steps + 1, last + 1))
    for result, latents in zip(results, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(result.latents, np.concatenate(latents), rtol=0, atol=1e-5)
    images = arrays(rich_pipeline.generate(PROMPT, seed=7, count=3, batch_size=2, **wishes))
    assert_close(images, np.concatenate([rich.decode(latents[-1]) for latents in expected]))
    np.testing.assert_array_equal(rich_pipeline.pixels(PROMPT, seed=7, count=3, **wishes), images)


def test_an_image_of_another_size_is_resized_and_an_array_is_as_good(rich_pipeline: Pipeline) -> None:
    large = PICTURE.resize((100, 70), Image.Resampling.BICUBIC)
    fitted = large.resize((24, 20), Image.Resampling.LANCZOS)
    wishes = WISHES | {"height": 20, "width": 24, "strength": 0.5}
    expected = loop((20, 24), "any", 3, picture=fitted, steps=1)[-1]
    for given in (large, np.asarray(large), fitted):
        (image,) = rich_pipeline.generate(PROMPT, seed=3, image=given, **wishes)
        assert_close(np.asarray(image), rich.decode(expected)[0])


def test_image_i_from_an_image_is_that_of_seed_plus_i_whatever_the_batch(rich_pipeline: Pipeline) -> None:
    wishes: Any = {"image": PICTURE, "strength": 0.8}
    alone = [rich_pipeline.generate(PROMPT, seed=5 + i, **wishes)[0] for i in range(5)]
    for batch_size in (1, 2, 5):
        assert rich_pipeline.generate(PROMPT, seed=5, count=5, batch_size=batch_size, **wishes) == alone
    assert len({image.tobytes() for image in alone}) == 5


def test_an_encoder_without_noise_leaves_the_first_draw_to_the_start(tmp_path: Path) -> None:
    with Pipeline.open(rich.make_bundle(tmp_path / "bundle", posterior=False)) as pipeline:
        calls, values = pipeline.prepare(PROMPT, pipeline.settings(image=PICTURE, strength=0.5), seed=3)
    assert [call.graph for call in calls] == ["denoiser.fast", "denoiser.fast", "decoder"]
    encoded = rich.encode_image(np.asarray(PICTURE)[None], np.zeros((1, 3, 4, 6), np.float32))
    signal, level = rich.SCHEDULES["usual"].steps[2].mix
    expected = signal * encoded + level * draws(3, (3, 4, 6), 1)[0]
    np.testing.assert_allclose(values["latents.2"], expected, rtol=0, atol=2e-6)


def test_latents_and_an_image_are_not_both_a_start(rich_pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match=r"^latents: to start from, and an image as well; give one of them$"):
        rich_pipeline.pixels(PROMPT, latents=np.zeros((1, 3, 4, 6), np.float32), image=PICTURE)


# --- tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 40), (20, 24)])
def test_large_images_are_decoded_in_tiles_and_all_ways_agree(
    tiled_pipeline: Pipeline, rich_pipeline: Pipeline, size: tuple[int, int]
) -> None:
    wishes: dict[str, Any] = {"height": size[0], "width": size[1]}
    *_, last = tiled_pipeline.steps(PROMPT, seed=7, count=2, **wishes)
    recorder = Recorder(tiled_pipeline)
    decoded = tiled_pipeline.decode(last.latents)
    shapes = [feeds["latents"].shape for _, feeds in recorder.calls]
    tall = min(size[0], SIDE) // rich.SCALE
    tiles = [len(tiling.spans(side // 2, SIDE // 2, OVERLAP // 2)) for side in size]
    assert shapes == [(1, 3, tall, SIDE // 2)] * (2 * tiles[0] * tiles[1]), "one tile of one image at a time"
    expected = tiling.decode(last.latents, rich.decode, scale=rich.SCALE, side=SIDE, overlap=OVERLAP)
    assert_close(decoded, expected)
    np.testing.assert_array_equal(arrays(tiled_pipeline.generate(PROMPT, seed=7, count=2, **wishes)), decoded)
    watched = tiled_pipeline.generate(PROMPT, seed=7, count=2, on_step=lambda result: None, **wishes)
    np.testing.assert_array_equal(arrays(watched), decoded)
    np.testing.assert_array_equal(tiled_pipeline.pixels(PROMPT, seed=7, count=2, **wishes), decoded)
    whole = rich_pipeline.decode(last.latents)
    assert 0 < (decoded != whole).mean() < 0.7, "the whole image but for the seams"


def test_a_tile_s_image_is_decoded_whole(tiled_pipeline: Pipeline, rich_pipeline: Pipeline) -> None:
    recorder = Recorder(tiled_pipeline)
    assert tiled_pipeline.generate(PROMPT, count=2) == rich_pipeline.generate(PROMPT, count=2)
    assert recorder.graphs.count("decoder") == 1


def test_calls_of_an_image_in_tiles_end_at_what_decode_takes(tiled_pipeline: Pipeline) -> None:
    settings = tiled_pipeline.settings(height=20, width=24)
    calls, values = tiled_pipeline.prepare(PROMPT, settings, seed=7)
    last = calls[-1].outputs[0][1]
    assert last == "latents.2"
    latents = tiled_pipeline.runner.chain(calls, values, [last]).values[last]
    (image,) = tiled_pipeline.generate(PROMPT, seed=7, height=20, width=24)
    np.testing.assert_array_equal(tiled_pipeline.decode(latents)[0], np.asarray(image))


# --- all of it at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("watched", [False, True])
def test_many_prompts_in_low_memory_from_an_image_in_tiles_are_the_same_images(
    tiled_bundle: Path, watched: bool
) -> None:
    requests = [Request(f"a star {i // 3}", i) for i in range(10)]
    wishes: Any = {"height": 20, "width": 24, "image": PICTURE, "strength": 0.9}
    with Pipeline.open(tiled_bundle, threads=1) as pipeline:
        settings = pipeline.settings(**wishes)
        alone = [pipeline.generate(request.prompt, seed=request.seed, **wishes)[0] for request in requests]
        assert list(pipeline.draw(requests, settings, batch_size=4)) == alone
    seen = []
    with Pipeline.open(tiled_bundle, threads=1, low_memory=True) as pipeline:
        recorder = Recorder(pipeline)
        on_step = (lambda result: seen.append((result.index, len(result.latents)))) if watched else None
        assert list(pipeline.draw(requests, settings, batch_size=4, on_step=on_step)) == alone
    order = list(dict.fromkeys(recorder.graphs))
    assert order == ["text_encoder", "text_encoder_2", "encoder", "denoiser.slow", "denoiser.fast", "decoder"]
    assert sum(a != b for a, b in zip(recorder.graphs, recorder.graphs[1:], strict=False)) == 5
    assert seen == ([(index, size) for index in (1, 2) for size in (4, 4, 2)] if watched else [])


def test_nothing_is_asked_of_a_pipeline_that_draws_nothing(rich_pipeline: Pipeline) -> None:
    recorder = Recorder(rich_pipeline)
    assert list(rich_pipeline.draw([], rich_pipeline.settings())) == []
    assert recorder.calls == []


def test_a_long_negative_prompt_is_warned_of_once(rich_pipeline: Pipeline) -> None:
    settings = rich_pipeline.settings(negative_prompt="red " * 30)
    with pytest.warns(PromptTruncated, match=r"^negative prompt: longer than the 20 tokens") as caught:
        list(rich_pipeline.draw([Request(PROMPT, seed) for seed in range(5)], settings, batch_size=1))
    assert len(caught) == 1

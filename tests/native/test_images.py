"""The native library makes the images that the Python package makes of the same bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from glance_trt import schema
from glance_trt.runtime.noise import randn
from glance_trt.runtime.pipeline import Pipeline

from ..models import rich, tiny
from .abi import Bundle, Library
from .prompts import tokens

SHAPES = Path(__file__).parents[2] / "examples/shapes"
PROMPT, NEGATIVE = "a large red circle", "a star"
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
SEEDS = range(10)
Open = Callable[..., tuple[Bundle, Pipeline]]


@pytest.fixture
def opened(native: Library) -> Iterator[Open]:
    """Opens a bundle with both."""
    pairs: list[tuple[Bundle, Pipeline]] = []

    def open_both(folder: Path, target: str = "cpu") -> tuple[Bundle, Pipeline]:
        pairs.append((native.open(folder, threads=1, target=target), Pipeline.open(folder, target, threads=1)))
        return pairs[-1]

    yield open_both
    for bundle, pipeline in pairs:
        bundle.free()
        pipeline.close()


def assert_same(native: list[NDArray[np.uint8]], python: list[Any]) -> None:
    """Equal, or one apart where float32 rounds to the other side of a half."""
    difference = np.abs(np.stack(native).astype(int) - np.stack([np.asarray(image) for image in python]))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


# --- the demonstration bundle -----------------------------------------------------------------------------------------


def test_fifty_prompts_and_seeds_of_the_demonstration_bundle_are_those_of_python(
    opened: Open, shapes_bundle: Path
) -> None:
    bundle, pipeline = opened(shapes_bundle)
    captions = (SHAPES / "captions.txt").read_text().splitlines()
    for seed, prompt in enumerate(captions[:50]):
        assert_same(bundle.generate(prompt=prompt, seed=seed), pipeline.generate(prompt, seed=seed))
    prompt = captions[0]
    assert_same(
        bundle.generate(prompt=prompt, seed=3, count=3, batch_size=2), pipeline.generate(prompt, seed=3, count=3)
    )


def test_ids_of_a_prompt_do_for_it(opened: Open, shapes_bundle: Path) -> None:
    bundle, _ = opened(shapes_bundle)
    (by_ids,) = bundle.generate(tokens=tokens(shapes_bundle, PROMPT), seed=7)
    assert np.array_equal(by_ids, bundle.generate(prompt=PROMPT, seed=7)[0])


# --- a bundle of tiny graphs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["cfg", "embedded", "none"])
@pytest.mark.parametrize("schedule", [None, "short"])
def test_ten_seeds_of_a_tiny_bundle_are_those_of_python(
    opened: Open, tmp_path: Path, guidance: schema.GuidanceMode, schedule: str | None
) -> None:
    folder = tiny.make_bundle(tmp_path / "tiny.bundle", guidance=guidance)
    bundle, pipeline = opened(folder)
    wishes: dict[str, Any] = {} if guidance == "none" else {"guidance_scale": 2.5}
    negative = {"negative_tokens": tokens(folder, NEGATIVE)} if guidance == "cfg" else {}
    for seed in SEEDS:
        native = bundle.generate(tokens=tokens(folder, PROMPT), schedule=schedule, seed=seed, **wishes, **negative)
        python = pipeline.generate(
            PROMPT, schedule=schedule, seed=seed, negative_prompt=NEGATIVE if negative else None, **wishes
        )
        assert_same(native, python)


def test_image_i_is_that_of_seed_plus_i_whatever_the_batch(opened: Open, tiny_bundle: Path) -> None:
    bundle, _ = opened(tiny_bundle)
    ids = {"tokens": tokens(tiny_bundle, PROMPT), "negative_tokens": tokens(tiny_bundle, "")}
    alone = [bundle.generate(seed=5 + i, **ids)[0] for i in range(5)]
    assert len({image.tobytes() for image in alone}) == 5
    for batch_size in (1, 2, 5, 9):
        together = bundle.generate(seed=5, count=5, batch_size=batch_size, **ids)
        np.testing.assert_array_equal(np.stack(together), np.stack(alone))


def test_a_seed_counts_modulo_2_to_the_64(opened: Open, tiny_bundle: Path) -> None:
    bundle, _ = opened(tiny_bundle)
    ids = {"tokens": tokens(tiny_bundle, PROMPT), "negative_tokens": tokens(tiny_bundle, "")}
    around = bundle.generate(seed=2**64 - 1, count=2, **ids)
    np.testing.assert_array_equal(around[1], bundle.generate(seed=0, **ids)[0])


def test_latents_are_the_start_in_place_of_noise(opened: Open, tiny_bundle: Path) -> None:
    bundle, pipeline = opened(tiny_bundle)
    latents = np.random.default_rng(1).normal(size=(3, 3, tiny.HEIGHT, tiny.WIDTH)).astype(np.float32)
    ids = {"tokens": tokens(tiny_bundle, PROMPT), "negative_tokens": tokens(tiny_bundle, tiny.GUIDANCE.negative_prompt)}
    native = bundle.generate(count=3, batch_size=2, latents=latents, **ids)
    assert_same(native, list(pipeline.pixels(PROMPT, latents=latents)))
    noise = 2 * np.stack([randn((3, tiny.HEIGHT, tiny.WIDTH), seed) for seed in (7, 8, 9)])
    assert_same(bundle.generate(seed=7, count=3, latents=noise, **ids), bundle.generate(seed=7, count=3, **ids))


# --- several text encoders, sizes, tiles, images from images ----------------------------------------------------------


@pytest.fixture(scope="module")
def rich_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rich.make_bundle(tmp_path_factory.mktemp("rich") / "rich.bundle")


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (8, 40), (20, 24)])
@pytest.mark.parametrize("tile", [(), (16, 4), (16, 12)])
def test_images_of_every_size_whole_and_in_tiles(
    opened: Open, tmp_path: Path, size: tuple[int, int], tile: tuple[int, ...]
) -> None:
    folder = rich.make_bundle(tmp_path / "bundle", image=dataclasses.replace(rich.IMAGE, tile=tile))
    bundle, pipeline = opened(folder)
    native = bundle.generate(
        tokens=tokens(folder, PROMPT), negative_tokens=tokens(folder, NEGATIVE), size=size, seed=7, count=3
    )
    assert {image.shape for image in native} == {(*size, 3)}
    python = pipeline.generate(PROMPT, negative_prompt=NEGATIVE, height=size[0], width=size[1], seed=7, count=3)
    assert_same(native, python)


@pytest.mark.parametrize(
    ("schedule", "strength"),
    [("usual", 1.0), ("usual", 0.99), ("usual", 0.25), ("usual", None), ("any", 0.6), ("any", 0.1)],
)
@pytest.mark.parametrize("posterior", [True, False])
def test_images_from_an_image(
    opened: Open, tmp_path: Path, schedule: str, strength: float | None, posterior: bool
) -> None:
    folder = rich.make_bundle(tmp_path / "bundle", posterior=posterior)
    bundle, pipeline = opened(folder)
    wishes: dict[str, Any] = {"schedule": schedule} | ({} if strength is None else {"strength": strength})
    native = bundle.generate(
        tokens=tokens(folder, PROMPT),
        negative_tokens=tokens(folder, NEGATIVE),
        image=PICTURE,
        seed=7,
        count=3,
        **wishes,
    )
    python = pipeline.generate(PROMPT, negative_prompt=NEGATIVE, image=PICTURE, seed=7, count=3, **wishes)
    assert_same(native, python)


def test_an_image_s_own_size_is_the_size(opened: Open, rich_bundle: Path) -> None:
    bundle, _ = opened(rich_bundle)
    picture = np.zeros((12, 8, 3), np.uint8)
    (image,) = bundle.generate(
        tokens=tokens(rich_bundle, PROMPT), negative_tokens=tokens(rich_bundle, ""), image=picture
    )
    assert image.shape == picture.shape


# --- portable graphs --------------------------------------------------------------------------------------------------


def test_portable_graphs_run_on_a_provider_of_the_onnxruntime_that_is_there(
    native: Library, opened: Open, tmp_path: Path
) -> None:
    cpu = tiny.make_bundle(tmp_path / "cpu.bundle")
    graphs = {
        name: schema.Engine(f"{name}.onnx") for name in ("text_encoder", "denoiser.slow", "denoiser.fast", "decoder")
    }
    engines = schema.EngineSet("onnxruntime-gpu", "float32", graphs, {"provider": "CPUExecutionProvider"})
    portable = tiny.make_bundle(tmp_path / "portable.bundle", engines={"host": engines})
    ids = {"tokens": tokens(cpu, PROMPT), "negative_tokens": tokens(cpu, NEGATIVE)}
    with native.open(portable, trust=1) as bundle:
        assert bundle.text("target") == "host"
        expected = opened(cpu)[0].generate(count=2, **ids)
        np.testing.assert_array_equal(np.stack(bundle.generate(count=2, **ids)), np.stack(expected))

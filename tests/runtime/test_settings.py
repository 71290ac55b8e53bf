"""Sizes, schedules and strengths: what a bundle can do is taken, anything else refused with what it can do instead."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glance_trt import schema
from glance_trt.bundle import Bundle
from glance_trt.errors import InputError
from glance_trt.manifest import Manifest
from glance_trt.runtime.settings import settle, steps_of

from ..models import rich, tiny

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 45, 3), np.uint8))


@pytest.fixture(scope="module")
def manifest(rich_bundle: Path) -> Manifest:
    """8 x 12, 12 x 8, 8 x 40 and 20 x 24; the schedule usual is for the first two, the schedule any for all."""
    return Bundle.open(rich_bundle).manifest


@pytest.fixture(scope="module")
def ranged(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The same without further sizes, and any sides from 8 to 64 that are multiples of 8."""
    image = schema.Image(rich.HEIGHT, rich.WIDTH, 3, rich.SCALE, sides=(8, 64, 8))
    folder = tmp_path_factory.mktemp("ranged") / "bundle"
    return Bundle.open(rich.make_bundle(folder, image=image, schedules={"any": rich.SCHEDULES["any"]})).manifest


# --- sizes and schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wishes", "size", "schedule"),
    [
        ({}, (8, 12), "usual"),
        ({"height": 8, "width": 12}, (8, 12), "usual"),
        ({"height": 12, "width": 8}, (12, 8), "usual"),
        ({"width": 40}, (8, 40), "any"),
        ({"height": np.int64(20), "width": 24}, (20, 24), "any"),
        ({"schedule": "any"}, (8, 12), "any"),
        ({"schedule": "any", "width": 40}, (8, 40), "any"),
    ],
)
def test_a_size_is_made_with_the_first_schedule_for_it_or_the_one_that_is_named(
    manifest: Manifest, wishes: dict[str, Any], size: tuple[int, int], schedule: str
) -> None:
    found = settle(manifest, **wishes)
    assert ((found.height, found.width), found.schedule) == (size, schedule)
    assert found.steps == len(rich.SCHEDULES[schedule].steps)


@pytest.mark.parametrize(
    ("wishes", "text"),
    [
        ({"height": 12}, r"12 x 12 .*: 8 x 12, 12 x 8, 8 x 40, 20 x 24\. The nearest is 8 x 12"),
        ({"height": 13, "width": 9}, r"13 x 9 .*The nearest is 12 x 8"),
        ({"height": 1024, "width": 1024}, r"1024 x 1024 .*The nearest is 20 x 24"),
        ({"height": 12, "width": 50}, r"12 x 50 .*The nearest is 8 x 40"),
        ({"width": 0}, r"8 x 0 .*"),
        ({"width": -12}, r"8 x -12 .*"),
    ],
)
def test_a_size_that_cannot_be_made_is_refused_with_those_that_can(
    manifest: Manifest, wishes: dict[str, int], text: str
) -> None:
    with pytest.raises(InputError, match=f"^size: {text.replace('.*:', '.*this bundle makes', 1)}$"):
        settle(manifest, **wishes)


def test_the_nearest_size_may_be_one_of_a_range(ranged: Manifest) -> None:
    assert settle(ranged, height=64, width=16).height == 64
    makes = r"this bundle makes 8 x 12, and any sides from 8 to 64 that are multiples of 8\. The nearest is"
    for size, nearest in {(30, 45): "32 x 48", (100, 3): "64 x 8", (9, 12): "8 x 12", (20, 20): "16 x 16"}.items():
        with pytest.raises(InputError, match=rf"^size: {size[0]} x {size[1]} \(height x width\); {makes} {nearest}$"):
            settle(ranged, height=size[0], width=size[1])


@pytest.mark.parametrize("value", [8.0, "8", True, [8]])
def test_a_side_is_a_whole_number(manifest: Manifest, value: Any) -> None:
    with pytest.raises(InputError, match=r"^height: expected a whole number of pixels, got "):
        settle(manifest, height=value)


def test_a_named_schedule_that_is_not_for_the_size_is_refused_with_those_that_are(manifest: Manifest) -> None:
    text = (
        r"^schedule 'usual': is for 8 x 12, 12 x 8 \(height x width\), and the size is 8 x 40; for that there is any$"
    )
    with pytest.raises(InputError, match=text):
        settle(manifest, schedule="usual", width=40)


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [PICTURE, np.asarray(PICTURE), PICTURE.convert("RGBA"), PICTURE.convert("L")])
@pytest.mark.parametrize("size", [(8, 12), (20, 24)])
def test_an_image_is_resized_as_diffusers_does(manifest: Manifest, given: Any, size: tuple[int, int]) -> None:
    from diffusers.image_processor import VaeImageProcessor

    found = settle(manifest, image=given, height=size[0], width=size[1])
    as_pil = given if isinstance(given, Image.Image) else Image.fromarray(given)
    processor = VaeImageProcessor(vae_scale_factor=rich.SCALE)
    expected = processor.preprocess(as_pil.convert("RGB"), height=size[0], width=size[1])
    assert found.image is not None
    assert (found.height, found.width) == size == found.image.size[::-1]
    pixels = (expected[0].permute(1, 2, 0).numpy() + 1) * 127.5
    np.testing.assert_allclose(np.asarray(found.image), pixels, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(8, 12, (8, 12)), (13, 9, (12, 8)), (9, 41, (8, 40)), (21, 25, (20, 24)), (100, 100, (8, 12)), (1, 1, (8, 12))],
)
def test_without_a_size_it_is_the_image_s_rounded_down_if_the_bundle_can_or_the_usual_one(
    manifest: Manifest, height: int, width: int, size: tuple[int, int]
) -> None:
    from diffusers.image_processor import VaeImageProcessor

    picture = Image.new("RGB", (width, height))
    found = settle(manifest, image=picture)
    assert (found.height, found.width) == size
    if size != (8, 12):
        rounded = VaeImageProcessor(vae_scale_factor=rich.SCALE).get_default_height_width(picture)
        assert rounded == size


def test_in_a_range_an_image_s_size_is_rounded_to_what_the_range_allows(ranged: Manifest) -> None:
    for given, size in {(31, 45): (24, 40), (64, 64): (64, 64), (9, 13): (8, 12), (65, 80): (8, 12)}.items():
        found = settle(ranged, image=Image.new("RGB", given[::-1]))
        assert (found.height, found.width) == size, given
    assert settle(ranged, image=Image.new("RGB", (45, 31)), width=64).width == 64
    assert settle(ranged, image=Image.new("RGB", (45, 31)), width=64).height == 24


def test_a_bundle_without_an_encoder_says_what_its_recipe_lacks(tiny_bundle: Path) -> None:
    text = r"^image: this bundle makes images from text alone; build it from a recipe that says 'from_image: true'$"
    with pytest.raises(InputError, match=text):
        settle(Bundle.open(tiny_bundle).manifest, image=PICTURE)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (np.zeros((4, 4, 3), np.float32), r"image: got float32 \[4, 4, 3\]; expected uint8 \[H, W, 3\]"),
        (np.zeros((4, 4, 4), np.uint8), r"image: got uint8 \[4, 4, 4\]; expected uint8 \[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"image: got uint8 \[0, 4, 3\]; expected uint8 \[H, W, 3\]"),
        ("a.png", r"image: got str; expected one of PIL, or an array uint8 \[H, W, 3\]"),
        ([1, 2], r"image: got list; expected one of PIL, or an array uint8 \[H, W, 3\]"),
    ],
)
def test_what_is_no_image_is_refused(manifest: Manifest, image: Any, text: str) -> None:
    with pytest.raises(InputError, match=f"^{text}$"):
        settle(manifest, image=image)


# --- strength -------------------------------------------------------------------------------------------------------

ROUNDING_DOWN = ["StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"]
ROUNDING_UP = ["StableDiffusion3Img2ImgPipeline", "FluxImg2ImgPipeline", "QwenImageImg2ImgPipeline"]


@pytest.mark.parametrize("name", ROUNDING_DOWN + ROUNDING_UP)
def test_as_many_steps_run_as_in_the_pipelines_of_diffusers(name: str) -> None:
    import diffusers

    pipeline = getattr(diffusers, name)
    refused = 0
    for steps in (*range(1, 31), 50, 100, 999):
        strengths = {*np.linspace(0, 1, 41).tolist(), *(i / steps for i in range(steps + 1)), 1 / 3, 0.55, 0.29}
        for strength in strengths:
            scheduler = SimpleNamespace(timesteps=list(range(steps)), order=1)
            left, count = pipeline.get_timesteps(SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")
            assert len(left) == count
            if count:
                assert steps_of(steps, strength, rounded_up=name in ROUNDING_UP) == count, (steps, strength)
            else:
                refused += 1
                with pytest.raises(InputError, match=rf"^strength: .* runs none of the {steps} steps; give "):
                    steps_of(steps, strength, rounded_up=name in ROUNDING_UP)
    assert refused


def test_the_least_strength_that_an_error_names_is_enough() -> None:
    for steps in range(1, 1001):
        with pytest.raises(InputError, match=r"give (\S+) or more$") as caught:
            steps_of(steps, 0.0)
        assert steps_of(steps, float(str(caught.value).split()[-3])) == 1
    with pytest.raises(InputError, match=r"^strength: 0 runs none of the 4 steps; give anything above 0$"):
        steps_of(4, 0, rounded_up=True)
    assert steps_of(4, 1e-9, rounded_up=True) == 1


@pytest.mark.parametrize("strength", [-0.1, 1.0001, float("nan"), float("inf"), "0.5", 7])
def test_a_strength_is_a_number_from_0_to_1(manifest: Manifest, strength: Any) -> None:
    with pytest.raises(InputError, match=r"^strength: expected a number above 0, at most 1, got "):
        settle(manifest, image=PICTURE, strength=strength)


def test_strength_is_rounded_as_the_schedule_says_and_0_8_by_default(manifest: Manifest) -> None:
    assert settle(manifest, image=PICTURE).strength == 0.8
    assert settle(manifest, image=PICTURE).steps == 3  # of 4, down
    assert settle(manifest, image=PICTURE, strength=1).steps == 4
    assert settle(manifest, image=PICTURE, schedule="any", strength=0.6).steps == 2  # of 2, up
    assert settle(manifest, image=PICTURE, schedule="any", strength=0.5).steps == 1


def test_a_strength_without_an_image_is_refused(manifest: Manifest) -> None:
    with pytest.raises(
        InputError, match=r"^strength: says how far to go from an image, and there is none; give one, or"
    ):
        settle(manifest, strength=0.5)


def test_without_an_image_all_steps_run(manifest: Manifest) -> None:
    found = settle(manifest)
    assert (found.image, found.strength, found.steps) == (None, 1.0, 4)
    assert (found.guidance_scale, found.negative_prompt) == (tiny.GUIDANCE.scale, tiny.GUIDANCE.negative_prompt)

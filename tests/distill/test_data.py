"""What is trained on: encoded as diffusers encodes it, and refused by key path where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from glance_trt.distill import data
from glance_trt.distill.base import Base
from glance_trt.errors import RecipeError
from glance_trt.prompts import PromptTruncated
from glance_trt.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


def an_image(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8))


def read(recipe: Recipe, folder: Path) -> data.Given:
    assert recipe.distill is not None
    return data.read(recipe.distill, recipe, folder)


def test_captions_are_encoded_as_diffusers_pipeline_encodes_prompts(
    base: Base, pipeline: StableDiffusionPipeline
) -> None:
    captions = ("a red circle", "", "a blue star " * 60, *(f"number {i}" for i in range(65)))
    with pytest.warns(PromptTruncated, match=r"^cut to the 32 tokens .*: 1 of 68 captions, such as 'a blue"):
        found = data.encode_captions(base, captions)
    for i in (0, 1, 2, 64, 67):  # more than one batch of them
        expected, empty = pipeline.encode_prompt(captions[i], "cpu", 1, True, negative_prompt="")
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1:2], empty, rtol=1e-5, atol=1e-6)
    assert found.shape == (68, 32, 16)
    assert not found.requires_grad


def test_images_are_encoded_as_diffusers_image_processor_and_vae_do(
    base: Base, pipeline: StableDiffusionPipeline
) -> None:
    images = an_image(0), an_image(1)
    found = data.encode_images(base, images)
    with torch.no_grad():
        pixels = VaeImageProcessor(vae_scale_factor=2).preprocess(list(images))
        expected = pipeline.vae.encode(pixels).latent_dist.mean * 0.7
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_an_image_with_an_alpha_channel_is_read_as_rgb(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    an_image().convert("RGBA").save(tmp_path / "x.png")
    assert np.array_equal(np.array(data.read_image(tmp_path / "x.png", make_recipe())), np.array(an_image()))


def test_a_prompts_file_has_a_caption_per_line(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\n\n  \n a star, caf\xc3\xa9 \n")
    given = read(make_recipe(prompt=None, prompts="prompts.txt"), tmp_path)
    assert given == data.Given(("a red circle", "a star, café"))


def test_a_prompt_stands_alone_or_with_its_image(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    assert read(make_recipe(), tmp_path) == data.Given(("a red circle",))
    an_image().save(tmp_path / "x.png")
    given = read(make_recipe(image="x.png"), tmp_path)
    assert given.captions == ("a red circle",)
    assert [np.array(image).tolist() for image in given.images] == [np.array(an_image()).tolist()]


def test_a_folder_pairs_each_image_with_the_caption_beside_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, name in enumerate(("b.PNG", "a.webp", "c.png")):
        an_image(i).save(folder / name, lossless=True)
        (folder / name).with_suffix(".txt").write_text(f" caption {i}\n")
    (folder / "notes.md").write_text("not an image")
    given = read(make_recipe(prompt=None, images="images"), tmp_path)
    assert given.captions == ("caption 1", "caption 0", "caption 2")  # by file name
    for image, i in zip(given.images, (1, 0, 2), strict=True):
        assert np.array_equal(np.array(image), np.array(an_image(i)))


def test_digest_is_of_captions_and_pixels() -> None:
    plain = data.Given(("a", "b"))
    different = [
        data.Given(("a", "c")),
        data.Given(("b", "a")),
        data.Given(("ab",)),
        data.Given(("a", "b"), (an_image(0), an_image(1))),
        data.Given(("a", "b"), (an_image(1), an_image(0))),
    ]
    assert plain.digest() == data.Given(("a", "b")).digest()
    assert len({given.digest() for given in (plain, *different)}) == 6


PROMPTS = {"prompt": None, "prompts": "prompts.txt"}
IMAGES = {"prompt": None, "images": "images"}


def _no_prompts(folder: Path) -> None:
    pass


def _blank_prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("\n \n\t\n")


def _latin_prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_bytes(b"caf\xe9")


def _prompts_folder(folder: Path) -> None:
    (folder / "prompts.txt").mkdir()


def _no_images(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images" / "a.txt").write_text("a star")


def _images_file(folder: Path) -> None:
    an_image().save(folder / "images", "PNG")


def _no_caption(folder: Path) -> None:
    (folder / "images").mkdir()
    an_image().save(folder / "images" / "a.png")


def _empty_caption(folder: Path) -> None:
    _no_caption(folder)
    (folder / "images" / "a.txt").write_text(" \n")


def _unreadable(folder: Path) -> None:
    _no_images(folder)
    (folder / "images" / "a.png").write_text("not an image")


def _another_size(folder: Path) -> None:
    _no_images(folder)
    Image.new("RGB", (24, 16)).save(folder / "images" / "a.png")


def _cut_image(folder: Path) -> None:
    an_image().save(folder / "x.png")
    (folder / "x.png").write_bytes((folder / "x.png").read_bytes()[:-300])


def _large_image(folder: Path) -> None:
    Image.new("RGB", (32, 24)).save(folder / "x.png")


@pytest.mark.parametrize(
    ("prepare", "changes", "message"),
    [
        (_no_prompts, PROMPTS, r"distill\.prompts: .*prompts\.txt: No such file or directory; expected a text file"),
        (_blank_prompts, PROMPTS, r"distill\.prompts: .*prompts\.txt: no prompt in it; expected one per line"),
        (_latin_prompts, PROMPTS, r"distill\.prompts: .*prompts\.txt: not a text in UTF-8"),
        (_prompts_folder, PROMPTS, r"distill\.prompts: .*prompts\.txt: Is a directory"),
        (_no_prompts, IMAGES, r"distill\.images: .*images: no such folder; it is relative to the recipe's"),
        (_no_images, IMAGES, r"distill\.images: .*images: has no image \(\.png, \.jpg, \.jpeg, \.webp\)"),
        (_images_file, IMAGES, r"distill\.images: .*images: a file; expected a folder of images"),
        (_no_caption, IMAGES, r"distill\.images: .*a\.txt: no such file; expected the caption of a\.png"),
        (_empty_caption, IMAGES, r"distill\.images: .*a\.txt: empty; expected the caption of a\.png"),
        (_unreadable, IMAGES, r"distill\.images: .*a\.png: not a readable image"),
        (
            _another_size,
            IMAGES,
            r"distill\.images: .*a\.png: 16 x 24 pixels \(height x width\), and the recipe is for 16 x 16; resize",
        ),
        (_no_prompts, {"image": "x.png"}, r"distill\.image: .*x\.png: no such file; correct the path"),
        (_no_images, {"image": "images"}, r"distill\.image: .*images: a folder; expected an image, or name it under"),
        (_cut_image, {"image": "x.png"}, r"distill\.image: .*x\.png: not a readable image"),
        (
            _large_image,
            {"image": "x.png"},
            r"distill\.image: .*x\.png: 24 x 32 pixels \(height x width\), and the recipe is for 16 x 16",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_key_path(
    prepare: Callable[[Path], None], changes: dict[str, Any], message: str, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    prepare(tmp_path)
    with pytest.raises(RecipeError, match=f"^{message}"):
        read(make_recipe(**changes), tmp_path)

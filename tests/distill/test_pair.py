from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from glance_trt.distill import base, pair
from glance_trt.errors import RecipeError
from glance_trt.recipe import Guidance, Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    return Image.fromarray(pixels)


def test_pair_is_what_diffusers_encodes(tiny_model: Path, image: Image.Image) -> None:
    encoded = pair.encode(base.load_base(tiny_model), image, "a red circle")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        pixels = VaeImageProcessor(vae_scale_factor=2).preprocess(image)
        latents = pipeline.vae.encode(pixels).latent_dist.mean * 0.7
        prompt, empty = pipeline.encode_prompt("a red circle", "cpu", 1, True, negative_prompt="")
    torch.testing.assert_close(encoded.latents, latents)
    assert torch.equal(encoded.prompt_embeds, prompt)
    assert torch.equal(encoded.empty_embeds, empty)
    assert not torch.equal(encoded.prompt_embeds, encoded.empty_embeds)
    assert not encoded.latents.requires_grad


@pytest.mark.parametrize("guidance", [Guidance(scale=3.0, rescale=0.7, negative_prompt="blue"), Guidance(mode="none")])
def test_without_an_image_the_pair_is_a_sample_of_the_base_model(
    guidance: Guidance, tiny_model: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(guidance=guidance, seed=5)
    assert recipe.distill is not None
    file = tmp_path / "work" / "pair.png"
    config = base.read_scheduler_config(tiny_model)
    loaded = base.load_base(tiny_model)
    found = pair.sampled_image(loaded, recipe, recipe.distill, config, loaded.digest(), file)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    expected = pipeline(
        "a red circle",
        height=16,
        width=16,
        num_inference_steps=10,
        guidance_scale=guidance.scale if guidance.mode == "cfg" else 1,
        guidance_rescale=guidance.rescale,
        negative_prompt=guidance.negative_prompt,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert np.array_equal(np.array(found), np.array(expected))
    assert np.array_equal(np.array(Image.open(file)), np.array(expected))


def test_an_image_with_an_alpha_channel_is_read_as_rgb(
    image: Image.Image, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    image.convert("RGBA").save(tmp_path / "x.png")
    assert np.array_equal(np.array(pair.read_image(tmp_path / "x.png", make_recipe())), np.array(image))


def test_images_that_do_not_fit_are_refused_by_key_path(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^distill\.image: .*gone\.png: no such file; correct the path"):
        pair.read_image(tmp_path / "gone.png", make_recipe())
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(RecipeError, match=r"^distill\.image: .*text\.png: not a readable image"):
        pair.read_image(tmp_path / "text.png", make_recipe())
    Image.new("RGB", (32, 24)).save(tmp_path / "large.png")
    with pytest.raises(
        RecipeError, match=r"^distill\.image: .*large\.png: 32 x 24 pixels, and the recipe is for 16 x 16; resize"
    ):
        pair.read_image(tmp_path / "large.png", make_recipe())

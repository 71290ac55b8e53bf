"""The one image-caption pair that the experts are trained on, and what the model makes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from glance_trt import strict
from glance_trt.distill import files
from glance_trt.distill.base import Base, device_of
from glance_trt.errors import RecipeError, TrainingError
from glance_trt.progress import Progress, silent
from glance_trt.recipe import Distill, Recipe

RECORD = "glance-trt"
"""Name of the PNG text that says how an image was sampled."""


@dataclass(frozen=True)
class Pair:
    """The pair as the denoiser sees it.

    latents [1, C, h, w] float32, scaled by the VAE's scaling_factor.
    prompt_embeds and empty_embeds [1, tokens, width] float32: of the caption, and of the empty one.
    """

    latents: Tensor
    prompt_embeds: Tensor
    empty_embeds: Tensor


def encode(base: Base, image: Image.Image, prompt: str) -> Pair:
    """Run the VAE and the text encoder once, on the device where they are.

    The latents are the mode of the VAE's posterior, so that the pair is the same in every run.
    """
    device = device_of(base.vae)
    pixels = torch.from_numpy(np.array(image)).to(device, torch.float32)  # [H, W, 3]
    pipeline = _pipeline(base)
    with torch.no_grad():
        posterior = base.vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
        captions = [pipeline.encode_prompt(text, device, 1, False)[0] for text in (prompt, "")]
    return Pair(posterior.mode() * base.vae.config["scaling_factor"], *captions)


def digest(image: Image.Image) -> str:
    """Hexadecimal SHA-256 of an RGB image's pixels."""
    return hashlib.sha256(np.array(image).tobytes()).hexdigest()


def read_image(file: Path, recipe: Recipe, key: str = "distill.image") -> Image.Image:
    """The image of the pair, in RGB. Raises `RecipeError`, which starts with `key`, if it does not fit the recipe."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise RecipeError(
            f"{key}: {file}: no such file; correct the path (it is relative to the recipe's folder), or leave it "
            "out to let the base model sample the image"
        ) from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow: SyntaxError for broken PNG chunks
        raise RecipeError(f"{key}: {file}: not a readable image: {error}") from None
    if image.size != (recipe.width, recipe.height):
        raise RecipeError(
            f"{key}: {file}: {image.width} x {image.height} pixels, and the recipe is for {recipe.width} x "
            f"{recipe.height}; resize the image, or change width and height"
        )
    return image


def sampled_image(
    base: Base,
    recipe: Recipe,
    settings: Distill,
    scheduler_config: Mapping[str, Any],
    model_digest: str,
    file: Path,
    progress: Progress = silent,
) -> Image.Image:
    """The base model's own image for the prompt: read from the PNG `file` if it is there, or sampled and written to it.

    It is sampled as the recipe's teacher would: `teacher_steps` steps with the recipe's guidance, seeded with
    `settings.seed`. Raises `TrainingError` for a PNG that was not sampled so.
    """
    record = json.dumps(
        {
            "model": model_digest,
            "prompt": settings.prompt,
            "seed": settings.seed,
            "height": recipe.height,
            "width": recipe.width,
            "teacher_steps": recipe.teacher_steps,
            "guidance": strict.write(recipe.guidance),
            "scheduler": dict(scheduler_config),
        },
        sort_keys=True,
    )
    if not file.exists():
        info = PngInfo()
        info.add_text(RECORD, record)
        files.write(
            file,
            lambda draft: _sample(base, recipe, settings, scheduler_config, progress).save(draft, "PNG", pnginfo=info),
        )
    image = read_image(file, recipe, "distill")
    with Image.open(file) as opened:
        if opened.info.get(RECORD) != record:
            raise TrainingError(
                f"{file}: sampled with another model, prompt, seed, size, guidance or scheduler than this recipe's; "
                "delete the file to sample anew, name it as the recipe's distill.image, or give another work folder"
            )
    return image


def _sample(
    base: Base, recipe: Recipe, settings: Distill, scheduler_config: Mapping[str, Any], progress: Progress
) -> Image.Image:
    pipeline = _pipeline(base)
    # Set afterwards, since the pipeline's constructor rewrites the steps_offset and clip_sample of what it is given.
    pipeline.scheduler = getattr(diffusers, scheduler_config["_class_name"]).from_config(dict(scheduler_config))
    progress("sample", 0, recipe.teacher_steps)

    def report(_: object, step: int, __: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        progress("sample", step + 1, recipe.teacher_steps)
        return tensors

    guided = recipe.guidance.mode == "cfg"
    image: Image.Image = pipeline(
        settings.prompt,
        height=recipe.height,
        width=recipe.width,
        num_inference_steps=recipe.teacher_steps,
        guidance_scale=recipe.guidance.scale if guided else 1.0,
        guidance_rescale=recipe.guidance.rescale if guided else 0.0,
        negative_prompt=recipe.guidance.negative_prompt if guided else None,
        generator=torch.Generator().manual_seed(settings.seed),
        callback_on_step_end=report,
    ).images[0]
    return image


def _pipeline(base: Base) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

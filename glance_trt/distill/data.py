"""What is trained on: captions, and images that are given with them."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from glance_trt import strict
from glance_trt.distill.base import Base, device_of
from glance_trt.errors import InputError, RecipeError
from glance_trt.prompts import PromptTruncated, read_prompts
from glance_trt.recipe import Distill, Recipe

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Examples:
    """Images as the denoiser sees them, each with its caption.

    latents [N, C, h, w] float32, scaled by the VAE's scaling_factor. embeds [M, L, D] float32: of the different
    captions, of which `caption` [N] int64 gives each image's. empty [1, L, D] float32: of the empty caption.
    """

    latents: Tensor
    embeds: Tensor
    caption: Tensor
    empty: Tensor


@dataclass(frozen=True)
class Given:
    """Captions, and the images that the recipe gives with them: one each, or none at all."""

    captions: tuple[str, ...]
    images: tuple[Image.Image, ...] = ()

    def digest(self) -> str:
        """Hexadecimal SHA-256 of all captions and pixels."""
        found = hashlib.sha256("\0".join(self.captions).encode())
        for image in self.images:
            found.update(np.array(image).tobytes())
        return found.hexdigest()


def read(settings: Distill, recipe: Recipe, folder: Path) -> Given:
    """The captions and images that the recipe names, relative to `folder`.

    Raises `RecipeError` for a file that is missing, empty or not readable, and for an image of another size.
    """
    if settings.prompts is not None:
        return Given(read_captions(folder / settings.prompts))
    if settings.images is not None:
        return _pairs(folder / settings.images, recipe)
    assert settings.prompt is not None
    images = () if settings.image is None else (read_image(folder / settings.image, recipe),)
    return Given((settings.prompt,), images)


def read_image(file: Path, recipe: Recipe, key: str = "distill.image") -> Image.Image:
    """An image in RGB. Raises `RecipeError`, which starts with `key`, if it does not fit the recipe."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise RecipeError(
            f"{key}: {file}: no such file; correct the path (it is relative to the recipe's folder), or leave it "
            "out to let the base model sample the image"
        ) from None
    except IsADirectoryError:
        raise RecipeError(f"{key}: {file}: a folder; expected an image, or name it under distill.images") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow: SyntaxError for broken PNG chunks
        raise RecipeError(f"{key}: {file}: not a readable image: {error}") from None
    if image.size != (recipe.width, recipe.height):
        raise RecipeError(
            f"{key}: {file}: {image.height} x {image.width} pixels (height x width), and the recipe is for "
            f"{recipe.height} x {recipe.width}; resize the image, or change height and width"
        )
    return image


@torch.no_grad()
def encode_images(base: Base, images: tuple[Image.Image, ...]) -> Tensor:
    """Scaled latents [N, C, h, w] float32, the mode of the VAE's posterior, so that they are the same in every run."""
    device = device_of(base.vae)
    found = []
    for image in images:
        pixels = torch.from_numpy(np.array(image)).to(device, torch.float32).permute(2, 0, 1)[None]
        found.append(base.vae.encode(pixels / 127.5 - 1).latent_dist.mode() * base.vae.config["scaling_factor"])
    return torch.cat(found)


@torch.no_grad()
def encode_captions(base: Base, captions: tuple[str, ...]) -> Tensor:
    """What the text encoder makes of captions, [M, L, D] float32, as diffusers' pipeline has it encode them.

    Warns of captions that are too long, and cut.
    """
    length = base.tokenizer.model_max_length
    whole = base.tokenizer(list(captions), truncation=False, verbose=False).input_ids
    if long := [caption for caption, ids in zip(captions, whole, strict=True) if len(ids) > length]:
        text = f"cut to the {length} tokens of the text encoder: {len(long)} of {len(captions)} captions, such as"
        warnings.warn(f"{text} {strict.shown(long[0])}", PromptTruncated, stacklevel=2)
    tokens = base.tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    encoder = base.text_encoder
    return torch.cat([encoder(part.to(device_of(encoder))).last_hidden_state for part in tokens.split(64)])


def read_captions(file: Path) -> tuple[str, ...]:
    """The lines of a file, without the blank ones. Raises `RecipeError` if there are none, or it cannot be read."""
    try:
        return tuple(read_prompts(file))
    except InputError as error:
        raise RecipeError(f"distill.prompts: {error}") from None


def _pairs(folder: Path, recipe: Recipe) -> Given:
    if not folder.is_dir():
        found = "a file; expected a folder of images" if folder.exists() else "no such folder"
        raise RecipeError(f"distill.images: {folder}: {found}; it is relative to the recipe's")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise RecipeError(f"distill.images: {folder}: has no image ({', '.join(_SUFFIXES)})")
    captions = tuple(_caption_of(file) for file in files)
    return Given(captions, tuple(read_image(file, recipe, "distill.images") for file in files))


def _caption_of(image: Path) -> str:
    """What the .txt file beside an image says."""
    file = image.with_suffix(".txt")
    try:
        caption = file.read_text(encoding="utf-8-sig").strip()  # Windows' editors begin a file with a byte order mark
    except FileNotFoundError:
        raise RecipeError(f"distill.images: {file}: no such file; expected the caption of {image.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"distill.images: {file}: not readable: {error}") from None
    if not caption:
        raise RecipeError(f"distill.images: {file}: empty; expected the caption of {image.name}")
    return caption

"""The base model to train on: a Stable Diffusion model in diffusers' folder layout."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from glance_trt.errors import InputError, ModelError
from glance_trt.export import model as models
from glance_trt.export.families import from_recipe
from glance_trt.export.families.stable_diffusion import StableDiffusion
from glance_trt.export.model import Model
from glance_trt.export.quiet import quiet
from glance_trt.progress import Progress
from glance_trt.recipe import Recipe

PIPELINE = "StableDiffusionPipeline"


@dataclass(frozen=True)
class Base:
    """The components of a model, in float32 on the CPU whatever they are stored in, and frozen."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL

    def to(self, device: str | None) -> torch.device:
        """Move the components to PyTorch's `device`, or to CUDA where none is named and there is one; returns it.

        Raises `InputError` for a device that PyTorch does not know or cannot use.
        """
        try:
            place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            for module in (self.text_encoder, self.unet, self.vae):
                module.to(place)
        except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without CUDA
            raise InputError(f"device {device!r}: {next(iter(str(error).splitlines()), error)}") from None
        return place

    def digest(self) -> str:
        """Hexadecimal SHA-256 of all weights: the same for the same model, however its files are named or split."""
        found = hashlib.sha256()
        for module in (self.text_encoder, self.unet, self.vae):
            for name, tensor in sorted(module.state_dict().items()):
                found.update(name.encode())
                found.update(tensor.cpu().contiguous().numpy())
        return found.hexdigest()


def find_model(recipe: Recipe, folder: Path, progress: Progress) -> tuple[Model, dict[str, Any]]:
    """A recipe's model, downloaded where it is on the Hub, and its scheduler's configuration.

    Raises `ModelError` for a family that is not trained here, before its weights are downloaded.
    """
    family = from_recipe(recipe, folder, whole=False)
    if family.name != StableDiffusion.name:
        raise ModelError(
            f"{family.model.folder}: a {family.name}; distill trains Stable Diffusion 1 and 2. LoRAs for it come from "
            "other trainers, and build fuses them"
        )
    return models.find(recipe, folder, progress), family.scheduler_config()


def load_base(folder: Path) -> Base:
    """Read the tokenizer, text encoder, UNet and VAE of a model folder; nothing is downloaded.

    Raises `ModelError`, which names the component's folder.
    """
    with quiet():
        base = Base(
            _load(CLIPTokenizer, folder / "tokenizer"),
            _load(CLIPTextModel, folder / "text_encoder", dtype=torch.float32),
            _load(UNet2DConditionModel, folder / "unet", dtype=torch.float32),
            _load(AutoencoderKL, folder / "vae", dtype=torch.float32),
        )
    takes, makes = base.unet.config["in_channels"], base.vae.config["latent_channels"]
    if takes != makes:
        raise ModelError(
            f"{folder}/unet: takes {takes} channels where the VAE makes {makes}; models for inpainting and other "
            "image inputs are not supported, give a text-to-image model"
        )
    for module in (base.text_encoder, base.unet, base.vae):
        module.requires_grad_(False).eval()
    return base


def _load(kind: Any, folder: Path, **options: Any) -> Any:
    if not folder.is_dir():  # or the name would be looked up on the Hub
        raise ModelError(f"{folder}: no such folder; a {PIPELINE} has one")
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be read as a {kind.__name__}: {error}") from error


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next(module.parameters()).device

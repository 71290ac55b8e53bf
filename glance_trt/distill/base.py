"""The base model to train on: a Stable Diffusion model in diffusers' folder layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from glance_trt.errors import ModelError
from glance_trt.export.quiet import quiet

PIPELINE = "StableDiffusionPipeline"


@dataclass(frozen=True)
class Base:
    """The components of a model, in float32 on the CPU whatever they are stored in, and frozen."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL

    def digest(self) -> str:
        """Hexadecimal SHA-256 of all weights: the same for the same model, however its files are named or split."""
        found = hashlib.sha256()
        for module in (self.text_encoder, self.unet, self.vae):
            for name, tensor in sorted(module.state_dict().items()):
                found.update(name.encode())
                found.update(tensor.cpu().contiguous().numpy())
        return found.hexdigest()


def read_scheduler_config(folder: Path, class_name: str | None = None) -> dict[str, Any]:
    """The model's scheduler_config.json, with `class_name` in place of its own class where it is given.

    Raises `ModelError` if the folder holds no Stable Diffusion pipeline, or one that was trained by flow matching.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; expected a model in diffusers' layout, with a model_index.json")
    found = _read_json(folder / "model_index.json").get("_class_name")
    if found != PIPELINE:
        raise ModelError(f"{folder}: a {found}; phase experts are trained for a {PIPELINE} (Stable Diffusion 1 and 2)")
    config = _read_json(folder / "scheduler" / "scheduler_config.json")
    for name in filter(None, (config.get("_class_name"), class_name)):
        if name.startswith("FlowMatch"):
            raise ModelError(
                f"{folder}: the scheduler is a {name}, and flow matching has another target than the epsilon or "
                "velocity of Stable Diffusion; give a model with a diffusion scheduler such as DDIMScheduler"
            )
    return {**config, "_class_name": class_name or config.get("_class_name")}


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


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror}; a model in diffusers' layout has this file") from None
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected keys and values")
    return content


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next(module.parameters()).device

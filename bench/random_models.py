"""Stable Diffusion models of several sizes with random weights, and two random LoRAs each, for benchmarks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TOKENIZER = Path(__file__).parent.parent / "examples/shapes/model/tokenizer"
RANK = 16
STEPS = {"slow": [1, 3, 5, 7, 9], "fast": [11, 21, 31, 41, 50]}


@dataclass(frozen=True)
class Size:
    """What differs between the models. side: of the images, pixels. text: width, layers and heads of the encoder."""

    side: int
    text: tuple[int, int, int]
    vae: tuple[int, ...]
    unet: dict[str, Any]


_THREE_AND_ONE = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SIZES = {
    "tiny": Size(
        64,
        (64, 2, 2),
        (32, 32, 32, 32),
        _THREE_AND_ONE | {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 2, "cross_attention_dim": 64},
    ),
    "sd15": Size(
        512,
        (768, 12, 12),
        (128, 256, 512, 512),
        _THREE_AND_ONE
        | {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768},
    ),
    # The UNet's blocks, without the embeddings of image sizes that SDXL adds to the timestep's.
    "sdxl": Size(
        1024,
        (2048, 12, 16),
        (128, 256, 512, 512),
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "cross_attention_dim": 2048,
        },
    ),
}


def write(folder: Path, name: str) -> Path:
    """Write a model of a size in float16, LoRAs for its attention, and a recipe of ten guided steps.

    Returns the recipe's path. What is there already is kept.
    """
    import torch

    size, recipe = SIZES[name], folder / f"{name}.yaml"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if not (folder / name / "model_index.json").is_file():
            _model(size).save_pretrained(folder / name)
            shutil.copytree(TOKENIZER, folder / name / "tokenizer", dirs_exist_ok=True)
        phases = [
            {"name": phase, "steps": steps, "lora": {"file": _lora(folder, name, phase), "scale": 1.0}}
            for phase, steps in STEPS.items()
        ]
    content = {"name": name, "model": name, "height": size.side, "width": size.side, "phases": phases}
    recipe.write_text(yaml.safe_dump(content | {"guidance": {"scale": 5.0}}))
    return recipe


def _model(size: Size) -> Any:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
    width, layers, heads = size.text
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    count = len(size.vae)
    vae = AutoencoderKL(
        block_out_channels=size.vae,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    unet = UNet2DConditionModel(sample_size=size.side // 8, **size.unet)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    parts = (vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False).to(dtype=torch.float16)


def _lora(folder: Path, name: str, phase: str) -> str:
    """Random factors for every attention projection of the UNet, as diffusers names them."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = f"{name}.{phase}.safetensors"
    if not (folder / file).is_file():
        factors = {}
        with safe_open(folder / name / "unet/diffusion_pytorch_model.safetensors", "pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (no mapping)
                if key.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")):
                    rows, columns = weights.get_slice(key).get_shape()
                    module = f"unet.{key.removesuffix('.weight')}"
                    factors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns).mul_(0.02).half()
                    factors[f"{module}.lora_B.weight"] = torch.randn(rows, RANK).mul_(0.02).half()
        save_file(factors, folder / file)
    return file

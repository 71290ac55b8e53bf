"""What the tiny models of several families have in common."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, PreTrainedTokenizerBase


def autoencoder(**own: Any) -> AutoencoderKL:
    """Two pixels per latent along each side."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **own,
    )


def clip_config(tokenizer: PreTrainedTokenizerBase, width: int, layers: int, **own: Any) -> CLIPTextConfig:
    """Of a CLIP text encoder that goes with a tokenizer."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        **special | own,
    )


def as_trained(transformer: nn.Module) -> None:
    """Move what does nothing in a new model: gates, norms, biases and the output layer."""
    for name, value in transformer.named_parameters():
        if value.ndim == 1:
            value.data += 0.1 * torch.randn(value.shape)
        elif name == "proj_out.weight":
            value.data = 0.3 * torch.randn(value.shape)


def altered(model: Path, folder: Path, file: str, **changes: Any) -> Path:
    """A copy of a model in `folder`, with keys of one JSON file changed."""
    copy = shutil.copytree(model, folder / "altered")
    content = json.loads((copy / file).read_text()) | changes
    (copy / file).write_text(json.dumps(content))
    return copy

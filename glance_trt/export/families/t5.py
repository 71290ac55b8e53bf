"""The T5 encoder (arXiv 1910.10683) that several families have as a text encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from glance_trt.bundle import DType

if TYPE_CHECKING:
    from torch import nn


def encoder(config: Mapping[str, Any], length: int) -> nn.Module:
    """`length` token ids to embeddings; see `glance_trt.export.families.t5_modules.T5TextEncoder`."""
    from transformers import T5Config, T5EncoderModel

    from glance_trt.export.families.t5_modules import T5TextEncoder

    return T5TextEncoder(T5EncoderModel(T5Config(**config)), length)


def aliases(name: str) -> Iterable[str]:
    """Other names of a parameter in weights files."""
    if name == "encoder.embed_tokens.weight":
        yield "shared.weight"


def dtype(wanted: DType) -> DType:
    """What it computes in: float32 instead of float16, where activations of the published ones overflow. (transformers
    clips them there; diffusers' documentation of FLUX says that this shows in the images.)"""
    return "float32" if wanted == "float16" else wanted


def reduced(config: Mapping[str, Any], width: int = 64) -> dict[str, Any]:
    """The configuration of a small one of the same blocks, whose embeddings are `width` wide."""
    return {**config, "d_model": width, "d_ff": 2 * width, "num_layers": 2, "num_heads": 2, "d_kv": width // 2}

"""A tiny Qwen-Image of random weights: every component is of the real class, few channels and layers apart."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import AddedToken
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from glance_trt.export.families.qwen_image import TEMPLATE

SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""That of the published model."""

TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
VAE = {"base_dim": 8, "dim_mult": [1, 1, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]}
"""With the published model's 16 channels, means and deviations. A latent is 4 x 4 pixels, a token of it 8 x 8."""


def write(folder: Path) -> Path:
    """Write the model in diffusers' layout, in bfloat16 as the published one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = tokenizer()
        pipeline = QwenImagePipeline(
            FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            AutoencoderKLQwenImage(**VAE),
            text_encoder(len(words)),
            words,
            QwenImageTransformer2DModel(**TRANSFORMER),
        )
        for part in (pipeline.transformer, pipeline.vae):
            _randomize(part)
    pipeline.to(dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def tokenizer() -> Qwen2Tokenizer:
    """A byte-level vocabulary in which every word of the template is one token, as in that of Qwen2, and special tokens
    come last."""
    special = ("<|im_start|>", "<|im_end|>")
    text = TEMPLATE.replace("{}", "")
    for token in special:
        text = text.replace(token, "")
    words = [text, "a large red circle left of a small blue star on a white background"]
    made = Qwen2Tokenizer().train_new_from_iterator(words, 1000, show_progress=False)
    made.add_tokens([AddedToken(token, special=True) for token in special])
    return made


def text_encoder(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    """With a vision tower, which no prompt uses."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _randomize(module: torch.nn.Module) -> None:
    """As trained: no bias or norm that does nothing, and last layers that make a difference."""
    for name, value in module.named_parameters():
        if name in ("proj_out.weight", "decoder.conv_out.weight"):
            value.data *= 4
        elif (value.ndim == 1 or name.endswith("gamma")) and name != "decoder.conv_out.bias":
            value.data += 0.2 * torch.randn(value.shape)

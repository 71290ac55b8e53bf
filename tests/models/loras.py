"""LoRA files in the key schemes of other tools, from factors by module."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def kohya(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float) -> dict[str, torch.Tensor]:
    """kohya's: dots become underscores, and every module has an alpha. factors: down and up, by module."""
    tensors = {}
    for name, (down, up) in factors.items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": torch.tensor(alpha),
        }
    return tensors

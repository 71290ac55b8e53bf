"""Fuses each phase's LoRA into the denoiser's weights, from disk to disk.

``denoiser.base.safetensors`` holds what some phase uses unchanged, ``denoiser.<phase>.safetensors`` what the phase's
LoRA changed. Memory is bounded by the largest tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from glance_trt.export import lora, weights
from glance_trt.export.lora import Lora
from glance_trt.export.weights import TensorRef
from glance_trt.progress import Progress, silent


def fuse(
    tensors: Mapping[str, TensorRef], loras: Mapping[str, Lora | None], directory: Path, progress: Progress = silent
) -> list[str]:
    """Write the weights files of all phases into `directory` and return their names.

    `tensors` are the base model's; `loras` gives each phase's LoRA, or nothing for the base itself.
    """
    changed = {phase: set(item.pairs) if item else set() for phase, item in loras.items()}
    shared = {name: ref for name, ref in tensors.items() if any(name not in names for names in changed.values())}
    names = []
    if shared:
        names.append("denoiser.base.safetensors")
        weights.write(directory / names[-1], shared, progress, "fuse base")
    for phase, item in loras.items():
        if item:
            names.append(f"denoiser.{phase}.safetensors")
            parts = {name: lora.fused(tensors[name], pair) for name, pair in sorted(item.pairs.items())}
            weights.write(directory / names[-1], parts, progress, f"fuse {phase}")
    return names

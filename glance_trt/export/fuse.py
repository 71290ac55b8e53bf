"""Which weights go into which file: each phase's LoRA is fused into the denoiser's weights, from disk to disk.

``denoiser.base.safetensors`` holds what some phase uses unchanged, ``denoiser.<phase>.safetensors`` what the phase's
LoRA changed and what its guide added. Memory is bounded by the largest tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from glance_trt.export import lora
from glance_trt.export.lora import Lora
from glance_trt.export.weights import Fused, TensorRef

if TYPE_CHECKING:
    from glance_trt.export.guide import GuideFile

BASE = "denoiser.base.safetensors"
GUIDE = "guide."
"""What the names of a guide's tensors begin with, beside those of the denoiser."""


def plan(
    tensors: Mapping[str, TensorRef], loras: Mapping[str, Lora | None], guides: Mapping[str, GuideFile] | None = None
) -> dict[str, dict[str, TensorRef | Fused]]:
    """The contents of all weights files of a denoiser, by file name, for `glance_trt.export.weights.write`.

    `tensors` are the base model's; `loras` gives each phase's LoRA, or nothing for the base itself, and `guides` the
    guides of the phases that have one.
    """
    changed = {phase: set(item.pairs) if item else set() for phase, item in loras.items()}
    shared = {name: ref for name, ref in tensors.items() if any(name not in names for names in changed.values())}
    files: dict[str, dict[str, TensorRef | Fused]] = {BASE: {**shared}} if shared else {}
    for phase, item in loras.items():
        fused = {name: lora.fused(tensors[name], pair) for name, pair in sorted(item.pairs.items())} if item else {}
        added = guides[phase].tensors if guides and phase in guides else {}
        own: dict[str, TensorRef | Fused] = {**fused, **{f"{GUIDE}{name}": ref for name, ref in added.items()}}
        if own:
            files[f"denoiser.{phase}.safetensors"] = own
    return files

"""The student: the base model with what a phase adds to it, a LoRA, a guide, or both."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save
from torch import Tensor, nn

from glance_trt import strict
from glance_trt.distill import files, loras
from glance_trt.export import guide as guides
from glance_trt.export.guide import Guide
from glance_trt.export.lora import GUIDE, PROVENANCE
from glance_trt.recipe import Distill


@dataclass(frozen=True)
class Parts:
    """The files that a phase's trained parts go to; nothing for a part that the phase has not."""

    lora: Path | None
    guide: Path | None

    def __iter__(self) -> Iterator[Path]:
        return (file for file in (self.lora, self.guide) if file is not None)


class Student(nn.Module):
    """A frozen UNet with trainable parts, which `removed` takes off again. `guide` is None where there is none."""

    def __init__(self, unet: UNet2DConditionModel, parts: Parts, settings: Distill, seed: int) -> None:
        super().__init__()
        size = sum(parameter.numel() for parameter in unet.parameters())
        self.unet, self.guide = unet, None
        self._has_lora, self._precision = parts.lora is not None, settings.precision
        if parts.lora is not None:
            loras.add(unet, settings, seed)
        if parts.guide is not None:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                config = replace(guides.configure(settings.guide, unet.config, size), scales=settings.scales)
                self.guide = Guide(config).to(unet.device)

    def forward(self, sample: Tensor, timestep: Tensor, embeds: Tensor, scale: Tensor) -> Tensor:
        """The output for sample [B, C, h, w] as the UNet takes it, timestep [] or [B], embeds [B, L, D], and the
        guidance scale [B], which only a guide takes; float32."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                torch.autocast(sample.device.type, torch.bfloat16, enabled=self._precision == "bfloat16")
            )
            if self.guide is not None:
                stack.enter_context(self.guide.acting(self.unet, timestep, embeds, scale))
            output: Tensor = self.unet(sample, timestep, embeds, return_dict=False)[0]
        return output.float()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """While open, the UNet is the base."""
        if self._has_lora:
            self.unet.disable_adapters()
        try:
            yield
        finally:
            if self._has_lora:
                self.unet.enable_adapters()

    def save(self, parts: Parts, provenance: Mapping[str, Any]) -> None:
        """Write the trained parts. Raises `OutputError`."""
        if parts.lora is not None:
            loras.save(self.unet, parts.lora, provenance)
        if parts.guide is not None and self.guide is not None:
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.guide.state_dict().items()}
            metadata = {
                GUIDE: json.dumps(strict.write(self.guide.config)),
                PROVENANCE: json.dumps(provenance),
            }
            content = loras.with_metadata(save(tensors, {"format": "pt"}), metadata)
            files.write_bytes(parts.guide, content)

    def load(self, parts: Parts) -> None:
        """Read parts that `save` has written."""
        if parts.lora is not None:
            loras.restore(self.unet, parts.lora)
        if parts.guide is not None and self.guide is not None:
            found = guides.read(parts.guide, self.unet.config)
            self.guide.load_state_dict({name: ref.read() for name, ref in found.tensors.items()})

    def remove(self) -> None:
        """Take the parts off, which leaves the UNet as it was."""
        if self._has_lora:
            loras.remove(self.unet)

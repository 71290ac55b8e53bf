"""The modules that only Stable Diffusion XL has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glance_trt.bundle import GuidanceMode
from glance_trt.export.guide import Config
from glance_trt.export.modules import ClipEncoder, UNetStep, dtype_of


class XLStep(UNetStep):
    """Conditions: prompt_embeds [B, L, D], prompt_embeds_2 [B, L, D2], pooled_prompt_embeds [B, P].

    The UNet is also told an image's size before it was cropped, where the crop begins, and its size after. As diffusers
    has it unless asked otherwise, nothing was cropped. latent_scale: pixels per latent.
    """

    def __init__(
        self,
        unet: nn.Module,
        guidance: GuidanceMode = "none",
        rescale: float = 0.0,
        guide: Config | None = None,
        *,
        latent_scale: int,
    ) -> None:
        super().__init__(unet, guidance, rescale, guide)
        self.latent_scale = latent_scale

    def predict(
        self, sample: Tensor, timestep: Tensor, guidance_scale: Tensor | None, conditions: Sequence[Tensor]
    ) -> Tensor:
        """See `Step.predict`."""
        first, second, pooled = conditions
        return super().predict(sample, timestep, guidance_scale, [torch.cat([first, second], dim=2), pooled])

    def evaluate(self, sample: Tensor, timestep: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """See `UNetStep.evaluate`."""
        dtype, (embeds, pooled) = dtype_of(self.denoiser), conditions
        # Both in float32, for the UNet concatenates them, and the exporter does not promote what differs in dtype.
        added = {"text_embeds": pooled, "time_ids": self.time_ids(sample)}
        rest = {"added_cond_kwargs": added, "return_dict": False}
        return self.denoiser(sample.to(dtype), timestep, embeds.to(dtype), **rest)[0].float()

    def time_ids(self, sample: Tensor) -> Tensor:
        """For sample [B, C, H, W] of any float dtype, [B, 6] float32, pixels: height, width, 0, 0, height, width."""
        batch, _, height, width = sample.shape
        sides = [height * self.latent_scale, width * self.latent_scale]
        one = torch.ones(batch, 1)
        return torch.cat([one * side for side in (*sides, 0, 0, *sides)], dim=1)


class XLEncoder(ClipEncoder):
    """A `ClipEncoder` that puts out everything twice: as it is, and as zeros where the prompt is empty.

    With force_zeros_for_empty_prompt, which the published model has, diffusers takes zeros for the embeddings of no
    negative prompt, but encodes an empty prompt as any other. Graphs do not know what a prompt is for; the step takes
    the one for the prompt, the other for the negative prompt.
    """

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """attention_mask [B, L] int64, 1 for tokens: an empty prompt has no third one between its start and its end."""
        found: Any = super().forward(input_ids)
        found = found if isinstance(found, tuple) else (found,)
        given = attention_mask[:, 2].float()
        return (*found, *(value * given.view(-1, *[1] * (value.ndim - 1)) for value in found))

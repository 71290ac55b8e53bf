"""The modules that are traced: a model's networks in the form of a bundle's graphs, float32 outside."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from glance_trt.export import guide
from glance_trt.export.guide import Guide


class Step(nn.Module):
    """One sampling step without guidance, the scheduler's update included: ``a * x + b * model(c_in * x, t)``."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timestep: Tensor, coefficients: Tensor, prompt_embeds: Tensor) -> Tensor:
        """latents [B, C, H, W], timestep [], coefficients [3] (c_in, a, b), prompt_embeds [B, L, D]; all float32."""
        predicted = self.predict(latents * coefficients[0], timestep, prompt_embeds)
        return coefficients[1] * latents + coefficients[2] * predicted

    def predict(self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        """The UNet in its own dtype, float32 outside."""
        dtype = next(self.unet.parameters()).dtype
        return self.unet(sample.to(dtype), timestep, prompt_embeds.to(dtype), return_dict=False)[0].float()


class EmbeddedStep(Step):
    """The same with a guide, which takes the guidance scale."""

    def __init__(self, unet: nn.Module, config: guide.Config) -> None:
        super().__init__(unet)
        self.guide = Guide(config)

    def forward(  # type: ignore[override]
        self, latents: Tensor, timestep: Tensor, coefficients: Tensor, guidance_scale: Tensor, prompt_embeds: Tensor
    ) -> Tensor:
        """As `Step.forward`, with guidance_scale []; all float32."""
        with self.guide.acting(self.unet, timestep, prompt_embeds, guidance_scale):
            return super().forward(latents, timestep, coefficients, prompt_embeds)


class GuidedStep(Step):
    """The same with classifier-free guidance: both predictions in one batch."""

    def __init__(self, unet: nn.Module, rescale: float) -> None:
        super().__init__(unet)
        self.rescale = rescale

    def forward(  # type: ignore[override]
        self,
        latents: Tensor,
        timestep: Tensor,
        coefficients: Tensor,
        guidance_scale: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
    ) -> Tensor:
        """As `Step.forward`, with guidance_scale [] and negative_prompt_embeds [B, L, D]; all float32."""
        sample = latents * coefficients[0]
        embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        both = self.predict(torch.cat([sample, sample]), timestep, embeds)
        # Slices, not chunk: torch.export would fix the batch size to make chunk's number of outputs known.
        batch = latents.shape[0]
        unconditional, conditional = both[:batch], both[batch:]
        predicted = unconditional + guidance_scale * (conditional - unconditional)
        if self.rescale:  # arXiv 2305.08891, eq. 15 and 16
            ratio = _std(conditional) / _std(predicted)
            predicted = predicted * (self.rescale * ratio + (1 - self.rescale))
        return coefficients[1] * latents + coefficients[2] * predicted


def _std(x: Tensor) -> Tensor:
    return x.std(dim=(1, 2, 3), keepdim=True)


class TextEncoder(nn.Module):
    """input_ids [B, L] int64 to prompt_embeds [B, L, D] float32."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids, return_dict=False)[0].float()


class Decoder(nn.Module):
    """latents [B, C, H, W] float32 to images [B, 8 H, 8 W, 3] uint8."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        vae.encoder = vae.quant_conv = None  # the graph needs the decoder's half only
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        scaled = (latents / self.vae.config.scaling_factor).to(next(self.vae.parameters()).dtype)
        image = self.vae.decode(scaled, return_dict=False)[0].float()
        # Channels last before the conversion: TensorRT-RTX 1.7 rejects a permute of uint8.
        pixels = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
        return pixels.round().to(torch.uint8)

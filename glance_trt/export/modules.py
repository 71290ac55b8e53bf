"""The modules that are traced: a model's networks in the form of a bundle's graphs, float32 outside.

What families share stands here; what only one has, in its adapter.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glance_trt.bundle import GuidanceMode
from glance_trt.export.guide import Config, Guide


class Step(nn.Module, abc.ABC):
    """One whole sampling step, guidance and the scheduler's update included: ``a * x + b * model(c_in * x, t)``.

    A family says in `predict` how its network is called. guidance ``cfg``: two evaluations in one batch, mixed by
    `combine`; ``embedded``: the network takes the scale.
    """

    def __init__(self, denoiser: nn.Module, guidance: GuidanceMode = "none", rescale: float = 0.0) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.guidance, self.rescale = guidance, rescale

    def forward(self, latents: Tensor, timestep: Tensor, coefficients: Tensor, *rest: Tensor) -> Tensor:
        """latents [B, C, H, W], timestep [], coefficients [3] (c_in, a, b), with guidance the guidance_scale [], then
        the conditions [B, ...], with ``cfg`` followed by those of the negative prompt; float32 but for masks."""
        scale, conditions = (None, rest) if self.guidance == "none" else (rest[0], rest[1:])
        sample = latents * coefficients[0]
        if self.guidance == "cfg":
            half = len(conditions) // 2
            pairs = zip(conditions[half:], conditions[:half], strict=True)
            both = self.predict(
                torch.cat([sample, sample]), timestep, None, [torch.cat([negative, own]) for negative, own in pairs]
            )
            # Slices, not chunk: torch.export would fix the batch size to make chunk's number of outputs known.
            batch = latents.shape[0]
            assert scale is not None
            predicted = self.combine(both[:batch], both[batch:], scale)
        else:
            predicted = self.predict(sample, timestep, scale, conditions)
        return coefficients[1] * latents + coefficients[2] * predicted

    @abc.abstractmethod
    def predict(
        self, sample: Tensor, timestep: Tensor, guidance_scale: Tensor | None, conditions: Sequence[Tensor]
    ) -> Tensor:
        """What the network makes of sample [B, C, H, W], in the same shape, float32."""

    def combine(self, unconditional: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
        """Both predictions [B, C, H, W], mixed."""
        predicted = unconditional + scale * (conditional - unconditional)
        if self.rescale:  # arXiv 2305.08891, eq. 15 and 16
            ratio = _std(conditional) / _std(predicted)
            predicted = predicted * (self.rescale * ratio + (1 - self.rescale))
        return predicted


class UNetStep(Step):
    """That of a UNet2DConditionModel; conditions: prompt_embeds [B, L, D]. A guide takes the guidance scale."""

    def __init__(
        self, unet: nn.Module, guidance: GuidanceMode = "none", rescale: float = 0.0, guide: Config | None = None
    ) -> None:
        super().__init__(unet, guidance, rescale)
        self.guide = Guide(guide) if guide else None

    def predict(
        self, sample: Tensor, timestep: Tensor, guidance_scale: Tensor | None, conditions: Sequence[Tensor]
    ) -> Tensor:
        """See `Step.predict`."""
        if self.guide is None:
            return self.evaluate(sample, timestep, conditions)
        with self.guide.acting(self.denoiser, timestep, conditions[0], guidance_scale):
            return self.evaluate(sample, timestep, conditions)

    def evaluate(self, sample: Tensor, timestep: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """The UNet in its own dtype, float32 outside."""
        dtype = dtype_of(self.denoiser)
        return self.denoiser(sample.to(dtype), timestep, conditions[0].to(dtype), return_dict=False)[0].float()


class TextEncoder(nn.Module):
    """input_ids [B, L] int64 to prompt_embeds [B, L, D] float32."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids, return_dict=False)[0].float()


class ClipEncoder(nn.Module):
    """input_ids [B, L] int64 to a hidden state [B, L, D] and the pooled output [B, P] of a CLIP text encoder, float32.

    encoder: a CLIPTextModel, or a CLIPTextModelWithProjection, whose pooled output is projected. hidden: whether the
    output of the layer before the last one is wanted, as Stable Diffusion XL and 3 take it; pooled: whether that of the
    end token is, as they and FLUX do.
    """

    def __init__(self, encoder: Any, *, hidden: bool = True, pooled: bool = True) -> None:
        super().__init__()
        self.encoder, self.hidden, self.pooled = encoder, hidden, pooled
        if not pooled:  # then the graph needs neither the last layer nor what comes behind it
            del encoder.encoder.layers[-1]
            encoder.final_layer_norm = nn.Identity()

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = self.encoder(input_ids, output_hidden_states=self.pooled)
        if not self.pooled:
            return found.last_hidden_state.float()
        pooled = self._of_end(input_ids, found.last_hidden_state)
        if hasattr(self.encoder, "text_projection"):
            pooled = self.encoder.text_projection(pooled)
        return (found.hidden_states[-2].float(), pooled.float()) if self.hidden else pooled.float()

    def _of_end(self, input_ids: Tensor, states: Tensor) -> Tensor:
        """The states [B, L, D] at the first end token."""
        # transformers takes an argmax, of several equal values the first; TensorRT's TopK leaves open which, and CLIP's
        # own tokenizer pads with the end token. Until transformers 4.31 configurations said 2 whatever the tokenizer,
        # whose end token has the highest id.
        end, length = self.encoder.config.eos_token_id, input_ids.shape[1]
        ends = input_ids == (input_ids.amax(1, keepdim=True) if end == 2 else end)
        positions = torch.arange(length, dtype=torch.float32)
        first = torch.where(ends, positions, float(length)).amin(1, keepdim=True)
        first = torch.where(first == length, 0.0, first)  # without an end token argmax gives 0
        return (states * (positions == first).unsqueeze(2)).sum(1)


class Decoder(nn.Module):
    """latents [B, C, H, W] float32 to images [B, 8 H, 8 W, 3] uint8, by an AutoencoderKL or an AutoencoderTiny."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        vae.encoder = vae.quant_conv = None  # the graph needs the decoder's half only
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        scaled = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return to_pixels(self.vae.decode(scaled.to(dtype_of(self.vae)), return_dict=False)[0].float())


class Encoder(nn.Module):
    """image [B, H, W, 3] uint8 and noise [B, C, H / 8, W / 8] float32 to latents of the noise's shape, by an
    AutoencoderKL: a sample of the posterior that it gives for the image."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        vae.decoder = vae.post_quant_conv = None  # the graph needs the encoder's half only
        self.vae = vae

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        config = self.vae.config
        sample = self.vae.encode(from_pixels(image).to(dtype_of(self.vae)), return_dict=False)[0]
        latents = sample.mean.float() + sample.std.float() * noise
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def from_pixels(image: Tensor) -> Tensor:
    """Images [B, H, W, 3] uint8 as [B, 3, H, W] float32 from -1 to 1, as diffusers does."""
    return (image.float() / 255).permute(0, 3, 1, 2) * 2 - 1


def to_pixels(image: Tensor) -> Tensor:
    """Images [B, 3, H, W] from -1 to 1 as [B, H, W, 3] uint8, rounded as diffusers does."""
    # Channels last before the conversion: TensorRT-RTX 1.7 rejects a permute of uint8.
    pixels = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
    return pixels.round().to(torch.uint8)


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a module computes in: the dtype of its parameters."""
    return next(module.parameters()).dtype


def _std(x: Tensor) -> Tensor:
    return x.std(dim=(1, 2, 3), keepdim=True)

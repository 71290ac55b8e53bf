"""What only FLUX.1 has: its denoiser's step, on packed latents with rotary position embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from glance_trt.bundle import GuidanceMode
from glance_trt.export.modules import Step, dtype_of


class FluxStep(Step):
    """That of a FluxTransformer2DModel; conditions: prompt_embeds [B, L, D] and pooled_prompt_embeds [B, P].
    side: the most tokens along a side of an image."""

    def __init__(self, transformer: Any, guidance: GuidanceMode, rescale: float, side: int) -> None:
        super().__init__(transformer, guidance, rescale)
        self.rotary = Rotary(transformer.config.axes_dims_rope, side)
        transformer.set_attn_processor(Attention())

    def predict(
        self, sample: Tensor, timestep: Tensor, guidance_scale: Tensor | None, conditions: Sequence[Tensor]
    ) -> Tensor:
        """See `Step.predict`."""
        flux, dtype, batch = self.denoiser, dtype_of(self.denoiser), sample.shape[0]
        embeds, pooled = (item.to(dtype) for item in conditions)
        # The parts of FluxTransformer2DModel.forward, which would round the timestep and the scale to the compute
        # dtype (986.98 to 988 in bfloat16), and compute the rotary embedding in float64, which TensorRT lacks.
        given = [timestep] if guidance_scale is None else [timestep, 1000 * guidance_scale]
        time = flux.time_text_embed(*(value.expand(batch) for value in given), pooled)
        # A token is a patch of 2 x 2 latents: their channels, and of each the four values.
        patches = F.pixel_unshuffle(sample, 2)
        rotary = self.rotary(embeds.shape[1], patches.shape[2], patches.shape[3])
        text = flux.context_embedder(embeds)
        image = flux.x_embedder(patches.flatten(2).transpose(1, 2).to(dtype))
        for block in [*flux.transformer_blocks, *flux.single_transformer_blocks]:
            text, image = block(image, text, time, rotary)
        found = flux.proj_out(flux.norm_out(image, time)).transpose(1, 2).float()
        return F.pixel_shuffle(found.unflatten(2, patches.shape[2:]), 2)


class Attention:
    """diffusers' FluxAttnProcessor, with slices where that splits the text from the image by a computed length: what
    becomes of such a split in ONNX, TensorRT's parser rejects."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The image's new hidden states [B, S, D], and with text those of the text [B, L, D]; without text, both are in
        one."""
        layers = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (layer(hidden_states).unflatten(2, (-1, attn.head_dim)) for layer in layers)
        query, key = attn.norm_q(query), attn.norm_k(key)
        text = encoder_hidden_states
        if text is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            own = [layer(text).unflatten(2, (-1, attn.head_dim)) for layer in layers]
            query = torch.cat([attn.norm_added_q(own[0]), query], dim=1)
            key = torch.cat([attn.norm_added_k(own[1]), key], dim=1)
            value = torch.cat([own[2], value], dim=1)
        query, key = (apply_rotary_emb(item, image_rotary_emb, sequence_dim=1) for item in (query, key))
        heads = (item.transpose(1, 2) for item in (query, key, value))
        found = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        if text is None:
            return found
        length = text.shape[1]
        return attn.to_out[0](found[:, length:]), attn.to_add_out(found[:, :length])


class Rotary(nn.Module):
    """The rotary position embedding (arXiv 2104.09864) of an image's tokens by row and column; that of the text's
    tokens turns nothing.

    Its tables, computed in float64 and rounded once, hold diffusers' own values to the bit.
    """

    def __init__(self, axes: Sequence[int], side: int) -> None:
        super().__init__()
        self.axes = tuple(axes)
        for axis in dict.fromkeys(self.axes[1:]):
            tables = get_1d_rotary_pos_embed(axis, torch.arange(side), use_real=True, freqs_dtype=torch.float64)
            for name, table in zip(("cos", "sin"), tables, strict=True):
                # Every value stands twice, for both of the channels that are turned together.
                self.register_buffer(f"{name}_{axis}", table[:, ::2].contiguous(), persistent=False)

    def forward(self, text: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [text + height * width, sum of the axes] for so many tokens, float32."""
        return self._joined("cos", 1.0, text, height, width), self._joined("sin", 0.0, text, height, width)

    def _joined(self, name: str, still: float, text: int, height: int, width: int) -> Tensor:
        first, *others = self.axes
        rows, columns = (
            self.get_buffer(f"{name}_{axis}")[:count].repeat_interleave(2, dim=1)
            for axis, count in zip(others, (height, width), strict=True)
        )
        image = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=2)
        return F.pad(image.flatten(0, 1), (first, 0, text, 0), value=still)

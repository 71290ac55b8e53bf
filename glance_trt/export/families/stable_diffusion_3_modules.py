"""What only Stable Diffusion 3 has: how its denoiser is called, and where its table of positions lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from glance_trt.bundle import GuidanceMode
from glance_trt.export.modules import Step, dtype_of


class SD3Step(Step):
    """That of an SD3Transformer2DModel; conditions: of each CLIP encoder a hidden state [B, L, D1] or [B, L, D2] and a
    pooled output [B, P1] or [B, P2], and of T5 the last state [B, T, D]. Without T5, `prompt_tokens` zeros stand in."""

    def __init__(self, transformer: Any, guidance: GuidanceMode, rescale: float, prompt_tokens: int) -> None:
        super().__init__(transformer, guidance, rescale)
        self.prompt_tokens = prompt_tokens

    def predict(
        self, sample: Tensor, timestep: Tensor, guidance_scale: Tensor | None, conditions: Sequence[Tensor]
    ) -> Tensor:
        """See `Step.predict`."""
        clip, pooled, clip_2, pooled_2, *t5 = conditions
        missing = self.denoiser.config.joint_attention_dim - clip.shape[2] - clip_2.shape[2]
        embeds = F.pad(torch.cat([clip, clip_2], dim=2), (0, missing, 0, 0 if t5 else self.prompt_tokens))
        embeds, pooled = torch.cat([embeds, *t5], dim=1), torch.cat([pooled, pooled_2], dim=1)
        dtype = dtype_of(self.denoiser)
        return self.denoiser(
            sample.to(dtype),
            embeds.to(dtype),
            pooled.to(dtype),
            timestep.expand(sample.shape[0]),
            return_dict=False,
        )[0].float()


def transformer(config: Mapping[str, Any]) -> SD3Transformer2DModel:
    """The denoiser, its table of positions as a parameter.

    diffusers computes the table and keeps it in a buffer, although weights files have it: 900 MB in Stable Diffusion
    3.5 medium. A parameter is fake while a graph is traced.
    """
    side = config["pos_embed_max_size"]
    model = SD3Transformer2DModel.from_config({**config, "pos_embed_max_size": 1})
    del model.pos_embed.pos_embed
    model.pos_embed.pos_embed = nn.Parameter(torch.empty(1, side * side, model.inner_dim))
    model.pos_embed.pos_embed_max_size = side
    return model

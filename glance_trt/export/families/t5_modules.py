"""The T5 encoder as a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class T5TextEncoder(nn.Module):
    """input_ids [B, L] int64 to prompt_embeds [B, L, D] float32, by a T5EncoderModel. length: L.

    Padding is attended to like words: the pipelines of FLUX and Stable Diffusion 3 give their T5 no mask.
    """

    buckets: Tensor

    def __init__(self, encoder: Any, length: int) -> None:
        super().__init__()
        del encoder.shared  # the embedding's second name, under which it would be written once more
        self.encoder = encoder
        # Of each distance between two tokens, from 0 to L - 1 and from -L to -1. T5's own forward looks up a table of
        # all pairs of tokens: 2 MB for 512 of them, too much for a constant of a graph.
        distances = torch.cat([torch.arange(length), torch.arange(-length, 0)])
        attention, config = encoder.encoder.block[0].layer[0].SelfAttention, encoder.config
        buckets = attention._relative_position_bucket(
            distances,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        )
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        # The layers one by one: T5Stack's own forward would make a mask of ones as well.
        stack, bias = self.encoder.encoder, self.position_bias()
        hidden = stack.embed_tokens(input_ids)
        for block in stack.block:
            hidden = block(hidden, position_bias=bias)[0]
        return stack.final_layer_norm(hidden).float()

    def position_bias(self) -> Tensor:
        """[1, heads, L, L]: what is added to the scores of every pair of tokens."""
        period, length = len(self.buckets), len(self.buckets) // 2
        values = self.encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias(self.buckets).T
        # Repeated, and cut into rows that are one shorter than the period: each row is the one before, moved on by one,
        # so that in row i and column j stands the value of distance j - i.
        rows = values.repeat(1, length)[:, : length * (period - 1)].unflatten(1, (length, period - 1))
        return rows[None, :, :, :length]

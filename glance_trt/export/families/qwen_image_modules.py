"""The modules of Qwen-Image that are traced: in real numbers and for single frames, where diffusers has complex numbers
and videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageUpsample
from torch import Tensor, nn
from torch.nn import functional as F

from glance_trt.bundle import GuidanceMode
from glance_trt.export.modules import Step, dtype_of, from_pixels, to_pixels

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles by which pairs of channels are turned, each [tokens, 1, head_dim / 2] float32."""


class QwenImageStep(Step):
    """A sampling step of a QwenImageTransformer2DModel; conditions: prompt_embeds [B, L, D] and their mask [B, L]."""

    def __init__(self, transformer: Any, guidance: GuidanceMode = "none") -> None:
        super().__init__(transformer, guidance)
        transformer.pos_embed = Positions(transformer.config.axes_dims_rope)
        for block in transformer.transformer_blocks:
            block.attn.set_processor(JointAttention())

    def predict(
        self, sample: Tensor, timestep: Tensor, guidance_scale: Tensor | None, conditions: Sequence[Tensor]
    ) -> Tensor:
        """See `Step.predict`."""
        embeds, mask = conditions
        height, width, dtype = sample.shape[2] // 2, sample.shape[3] // 2, dtype_of(self.denoiser)
        tokens = torch.cat([mask, mask.new_ones(1).expand(sample.shape[0], height * width)], dim=1)
        predicted = self.denoiser(
            pack(sample).to(dtype),
            embeds.to(dtype),
            timestep=timestep.to(dtype).expand(sample.shape[0]) / 1000,
            img_shapes=[(1, height, width)],
            # Made once, where diffusers' transformer would make it in every block, from the text's mask.
            attention_kwargs={"attention_mask": additive((tokens > 0)[:, None, None, :], dtype)},
            return_dict=False,
        )[0]
        return unpack(predicted.float(), height, width)

    def combine(self, unconditional: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
        """Guidance that leaves every token of the prediction as long as that of the conditional one."""
        mixed = unconditional + scale * (conditional - unconditional)
        ratio = pack(conditional).norm(dim=-1) / pack(mixed).norm(dim=-1)
        rows = ratio.unflatten(1, (mixed.shape[2] // 2, mixed.shape[3] // 2))[:, None]
        return mixed * rows.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


class Positions(nn.Module):
    """The rotary embedding of `QwenEmbedRope` by its own arithmetic, for any size, without its tables."""

    def __init__(self, axes: Sequence[int], theta: float = 10000.0) -> None:
        super().__init__()
        for name, size in zip(("frame", "row", "column"), axes, strict=True):
            self.register_buffer(name, 1 / theta ** (torch.arange(0, size, 2).float() / size), persistent=False)

    def forward(self, img_shapes: Sequence[tuple[int, int, int]], max_txt_seq_len: int, device: Any = None) -> Rotation:
        """Of the text's tokens, then of the image's. The image's rows and columns count from its middle, and the text
        goes on after the last of both."""
        _, height, width = img_shapes[0]
        rows = torch.arange(height) - (height - height // 2)
        columns = torch.arange(width) - (width - width // 2)
        text = torch.arange(max_txt_seq_len) + torch.maximum(rows[-1], columns[-1]) + 1
        words = text[:, None] * torch.cat([self.frame, self.row, self.column])
        angles = [
            torch.zeros_like(self.frame).expand(height, width, -1),
            (rows[:, None] * self.row)[:, None].expand(-1, width, -1),
            (columns[:, None] * self.column)[None].expand(height, -1, -1),
        ]
        joint = torch.cat([words, torch.cat(angles, dim=-1).flatten(0, 1)])[:, None]
        return joint.cos(), joint.sin()


class JointAttention:
    """`QwenDoubleStreamAttnProcessor2_0` in real numbers. attention_mask: [B, 1, 1, L + N], added to the scores; the
    text's L tokens come before the image's N."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Rotation,
        encoder_hidden_states_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        image, text, length = hidden_states, encoder_hidden_states, encoder_hidden_states.shape[1]
        query = torch.cat([attn.norm_added_q(split(attn.add_q_proj(text))), attn.norm_q(split(attn.to_q(image)))], 1)
        key = torch.cat([attn.norm_added_k(split(attn.add_k_proj(text))), attn.norm_k(split(attn.to_k(image)))], 1)
        value = torch.cat([split(attn.add_v_proj(text)), split(attn.to_v(image))], 1)
        query, key = (turned(x, image_rotary_emb).transpose(1, 2) for x in (query, key))
        states = F.scaled_dot_product_attention(query, key, value.transpose(1, 2), attention_mask)
        mixed = states.transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed[:, length:]), attn.to_add_out(mixed[:, :length])


class TextEncoder(nn.Module):
    """input_ids and attention_mask [B, L] int64 to prompt_embeds [B, L - drop, D] float32 and their mask, int64.

    Of the tokens, padded on the right, the first `drop` are dropped: those of the template, before the prompt.
    """

    def __init__(self, encoder: nn.Module, drop: int) -> None:
        super().__init__()
        self.encoder, self.drop = encoder, drop

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        # Expanded to the batch first, or the exporter would write all L * L values of it into the graph.
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        causal = place[:, None, None, :] <= place[:, None, :, None]
        mask = additive(causal & (attention_mask > 0)[:, None, None, :], dtype_of(self.encoder))
        states = self.encoder(input_ids, {"full_attention": mask}, use_cache=False).last_hidden_state
        kept = attention_mask[:, self.drop :]
        # Zeros behind the prompt, as diffusers has them; what becomes of padding may be infinite in half precision.
        return torch.where(kept[..., None] > 0, states[:, self.drop :].float(), 0.0), kept


class Decoder(nn.Module):
    """latents [B, C, H, W] float32 to images [B, 8 H, 8 W, 3] uint8, by an AutoencoderKLQwenImage."""

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        super().__init__()
        vae.encoder = vae.quant_conv = None  # the graph needs the decoder's half only
        self.vae, self.scaling = single_frame(vae), Scaling(vae)

    def forward(self, latents: Tensor) -> Tensor:
        frames = (latents * self.scaling.std + self.scaling.mean)[:, :, None].to(dtype_of(self.vae))
        decoded = self.vae.decoder(self.vae.post_quant_conv(frames))
        return to_pixels(decoded[:, :, 0].float().clamp(-1, 1))


class Encoder(nn.Module):
    """image [B, H, W, 3] uint8 and noise [B, C, H / 8, W / 8] float32 to latents of the noise's shape, by an
    AutoencoderKLQwenImage: a sample of the posterior that it gives for the image."""

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        super().__init__()
        vae.decoder = vae.post_quant_conv = None  # the graph needs the encoder's half only
        self.vae, self.scaling = single_frame(vae), Scaling(vae)

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        frames = from_pixels(image)[:, :, None].to(dtype_of(self.vae))
        encoded = self.vae.quant_conv(self.vae.encoder(frames))[:, :, 0].float()
        channels = noise.shape[1]
        mean, log_variance = encoded[:, :channels], encoded[:, channels:].clamp(-30, 20)
        return (mean + (0.5 * log_variance).exp() * noise - self.scaling.mean) / self.scaling.std


class Scaling(nn.Module):
    """What leads from the VAE's latents to the transformer's, [1, C, 1, 1] each."""

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)


class FrameConv(nn.Module):
    """A causal convolution of one frame, [B, C, 1, H, W]: its kernel's last slice. The others meet zeros, in three
    times the work."""

    def __init__(self, conv: QwenImageCausalConv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride[1:], (conv._padding[2], conv._padding[0])

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride, self.padding)[:, :, None]


def single_frame(module: nn.Module) -> nn.Module:
    """A VAE, or a part of one, for single frames. Without its feature cache it treats them as the first of a video."""
    for name, child in module.named_children():
        if isinstance(child, QwenImageCausalConv3d):
            setattr(module, name, FrameConv(child))
        elif isinstance(child, QwenImageUpsample):
            child.mode = "nearest"  # the same for a factor of two, and an operator of ONNX
        else:
            single_frame(child)
    return module


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores where `mask` does not allow any. With a mask of truth values the exporter
    (onnxscript 0.7.2) looks for NaN in all weights of every attention, and no engine fuses that."""
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


def turned(x: Tensor, rotation: Rotation) -> Tensor:
    """x [B, tokens, heads, head_dim], each pair of channels as a complex number times cos + i sin, in float32."""
    cos, sin = rotation
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return pairs.flatten(-2).type_as(x)


def pack(x: Tensor) -> Tensor:
    """Latents [B, C, H, W] as tokens [B, H / 2 * W / 2, 4 C]: a token is a patch of two by two."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(x: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, height * width, 4 C] as latents [B, C, 2 height, 2 width]."""
    patches = x.reshape(x.shape[0], height, width, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(x.shape[0], -1, 2 * height, 2 * width)

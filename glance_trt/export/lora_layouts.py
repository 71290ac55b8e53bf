"""What LoRA files call the weights of a model: diffusers' names, and those of the code that the model came with.

Other names are worked out from those of the base's weights, which are diffusers'. All are spelt with underscores in
place of dots, as kohya does, so that one entry answers both spellings.

Where the original code has one projection for what diffusers splits (query, key and value, in single blocks the MLP
too), the up factor's rows are split alike, and each part takes the whole down factor. No supported base has one
projection where files have several, so factors are never joined.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from glance_trt.export.weights import TensorRef


@dataclass(frozen=True)
class Target:
    """A weight that a module of a LoRA changes, and by which rows of the module's up factor: ranges (start, stop), in
    the order of the weight's rows."""

    weight: str
    rows: tuple[tuple[int, int], ...]


_Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of weights, by the names of their modules."""

_Blocks = tuple[tuple[str, str, Mapping[str, str]], ...]
"""What original names begin with and what diffusers', with ``{}`` for a block's number; then the rest of the original
names with those of diffusers, of which there are several where diffusers splits a projection."""

_FLUX: _Blocks = (
    (
        "",
        "",
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        },
    ),
    (
        "double_blocks.{}.",
        "transformer_blocks.{}.",
        {
            "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
            # XLabs' attention processors, qkv_lora1.down and so on; the number is that of the stream.
            "qkv1": "attn.to_q attn.to_k attn.to_v",
            "qkv2": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "proj1": "attn.to_out.0",
            "proj2": "attn.to_add_out",
        },
    ),
    (
        "single_blocks.{}.",
        "single_transformer_blocks.{}.",
        {
            "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
            "qkv": "attn.to_q attn.to_k attn.to_v",  # XLabs'
            "proj": "proj_out",
        },
    ),
)

_STABLE_DIFFUSION_3: _Blocks = (
    (
        "",
        "",
        {
            "x_embedder.proj": "pos_embed.proj",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        },
    ),
    (
        "joint_blocks.{}.x_block.",
        "transformer_blocks.{}.",
        {
            "attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "attn.proj": "attn.to_out.0",
            "attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "attn2.proj": "attn2.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm1.linear",
        },
    ),
    (
        "joint_blocks.{}.context_block.",
        "transformer_blocks.{}.",
        {
            "attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "attn.proj": "attn.to_add_out",
            "mlp.fc1": "ff_context.net.0.proj",
            "mlp.fc2": "ff_context.net.2",
            "adaLN_modulation.1": "norm1_context.linear",
        },
    ),
)

_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_UNET_LAYERS = {
    "resnets.conv1": "in_layers.2",
    "resnets.conv2": "out_layers.3",
    "resnets.time_emb_proj": "emb_layers.1",
    "resnets.conv_shortcut": "skip_connection",
    "downsamplers.conv": "op",
}
_UNET_PART = re.compile(r"((?:(?:down|up)_blocks\.\d+|mid_block)\.(\w+)\.\d+)\.(.+)")

_OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
"""Text encoders' projections, and how early diffusers versions called them."""


def flat(name: str) -> str:
    """A module's name as layouts have it."""
    return name.replace(".", "_")


def denoiser(weights: Mapping[str, TensorRef]) -> dict[str, tuple[Target, ...]]:
    """The weights that each module name of a LoRA changes, for a denoiser whose tensors are `weights`."""
    shapes = _shapes(weights)
    names = {name: [name] for name in shapes}
    # Attention processors of early diffusers versions have to_out_lora, for to_out.0
    names |= {name[:-2]: [name] for name in shapes if name.endswith(".to_out.0")}
    if any(name.startswith("down_blocks.") for name in shapes):
        names |= _unet(shapes)
    elif any(name.startswith("single_transformer_blocks.") for name in shapes):
        names |= _transformer(_FLUX, shapes)
    elif "pos_embed.proj" in shapes:
        names |= _transformer(_STABLE_DIFFUSION_3, shapes)
    return {flat(other): _targets(other, own, shapes) for other, own in names.items()}


def text_encoder(weights: Mapping[str, TensorRef]) -> dict[str, tuple[Target, ...]]:
    """The same for a text encoder, CLIP or T5.

    CLIP's names have or lack ``text_model.``, depending on the versions of transformers that wrote model and LoRA.
    """
    shapes = _shapes(weights)
    names = {}
    for name in shapes:
        for other in (name, name.removeprefix("text_model."), f"text_model.{name}"):
            stem, dot, last = other.rpartition(".")
            names[other] = names[stem + dot + _OLD_ATTENTION.get(last, last)] = [name]
    return {flat(other): _targets(other, own, shapes) for other, own in names.items()}


def _shapes(weights: Mapping[str, TensorRef]) -> dict[str, tuple[int, ...]]:
    """Of those that a LoRA can change: no biases, no norms."""
    return {
        name.removesuffix(".weight"): ref.shape
        for name, ref in weights.items()
        if name.endswith(".weight") and len(ref.shape) > 1
    }


def _targets(other: str, own: Sequence[str], shapes: _Shapes) -> tuple[Target, ...]:
    targets, start = [], 0
    for name in own:
        rows = shapes[name][0]
        ranges = [(start, start + rows)]
        # The last modulation gives two vectors: the shift first in the original code, the scale first in diffusers.
        if other.endswith("adaLN_modulation.1") and rows == 2 * shapes[name][1]:
            ranges = [(rows // 2, rows), (0, rows // 2)]
        targets.append(Target(f"{name}.weight", tuple(ranges)))
        start += rows
    return tuple(targets)


def _transformer(blocks: _Blocks, shapes: _Shapes) -> dict[str, list[str]]:
    names = {}
    for other, own, rest in blocks:
        for number in itertools.count() if "{}" in own else (0,):
            stem = own.format(number)
            if not any(name.startswith(stem) for name in shapes):
                break
            for last, parts in rest.items():
                modules = [stem + part for part in parts.split()]
                if all(module in shapes for module in modules):
                    names[other.format(number) + last] = modules
    return names


def _unet(shapes: _Shapes) -> dict[str, list[str]]:
    """Names of the original code, which numbers blocks throughout, for a UNet2DConditionModel."""
    names = {other: [name] for name, other in _UNET.items() if name in shapes}
    parts = _unet_parts(shapes)
    for name in shapes:
        if (match := _UNET_PART.fullmatch(name)) and match[1] in parts:
            part, kind, layer = match.groups()
            names[f"{parts[part]}.{_UNET_LAYERS.get(f'{kind}.{layer}', layer)}"] = [name]
    return names


def _unet_parts(shapes: Iterable[str]) -> dict[str, str]:
    """What the original code calls the parts of blocks, such as ``down_blocks.1.attentions.0``: ``input_blocks.4.1``.

    There, each resnet starts a block, and the attention and the upsampler that follow it belong to the same one; a
    downsampler is one by itself. The first input block is conv_in.
    """
    found = {match[1] for name in shapes if (match := _UNET_PART.fullmatch(name))}
    parts = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for side, other, number in (("down_blocks", "input_blocks", 0), ("up_blocks", "output_blocks", -1)):
        for block in itertools.count():
            stem = f"{side}.{block}"
            layers = sum(part.startswith(f"{stem}.resnets.") for part in found)
            if not layers:
                break
            for layer in range(layers):
                number += 1
                parts[f"{stem}.resnets.{layer}"] = f"{other}.{number}.0"
                parts[f"{stem}.attentions.{layer}"] = f"{other}.{number}.1"
            if f"{stem}.downsamplers.0" in found:
                number += 1
                parts[f"{stem}.downsamplers.0"] = f"{other}.{number}.0"
            attends = f"{stem}.attentions.0" in found
            parts[f"{stem}.upsamplers.0"] = f"{other}.{number}.{2 if attends else 1}"
    return parts

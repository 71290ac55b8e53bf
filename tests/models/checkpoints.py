"""Checkpoints in one file, with the tensors' names of those who published the architectures: the inverse of what
diffusers' converters do, written from the authors' code.

Stable Diffusion: github.com/CompVis/latent-diffusion and github.com/Stability-AI/generative-models (openaimodel.py,
model.py of the autoencoder); OpenCLIP: github.com/mlfoundations/open_clip (transformer.py); FLUX:
github.com/black-forest-labs/flux (model.py, layers.py); Stable Diffusion 3: github.com/Stability-AI/sd3.5 (mmditx.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DENOISER = "model.diffusion_model."
"""What the names of the denoiser's tensors begin with, in a whole checkpoint of any of them."""

Tensors = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def part(folder: Path, name: str) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the configuration of a part of a model, as safetensors and json read them."""
    (file,) = (folder / name).glob("*.safetensors")
    return load_file(file), json.loads((folder / name / "config.json").read_text())


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """With longer names."""
    return {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}


def unet(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Tensors:
    """UNet2DConditionModel as a UNetModel, whose blocks are numbered through."""
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    named = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for level in range(levels):
        first = 1 + level * (layers + 1)
        for layer in range(layers):
            named[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{first + layer}.0"
            named[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{first + layer}.1"
        named[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
        first = level * (layers + 1)
        for layer in range(layers + 1):
            named[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            named[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        last = 2 if f"up_blocks.{level}.attentions.0.norm.weight" in state else 1
        named[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{last}.conv"
    found = {}
    for name, value in state.items():
        old, new = _longest(name, named)
        rest = name.removeprefix(old)
        if ".resnets." in name:
            part, _, kind = rest[1:].partition(".")
            rest = f".{_RESNET[part]}.{kind}"
        found[new + rest] = value
    return found


def vae(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Tensors:
    """AutoencoderKL, whose attention was of convolutions with a kernel of one, and whose decoder counts levels down."""
    top, found = len(config["block_out_channels"]) - 1, {}
    for name, value in state.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda at: f"up.{top - int(at[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda at: f"up.{top - int(at[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda at: f"mid.block_{int(at[1]) + 1}", new)
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if ".attentions.0." in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            new = re.sub(r"to_([qkv])", r"\1", new).replace("to_out.0", "proj_out")
            value = value[..., None, None] if value.ndim == 2 else value
        found[new] = value
    return found


def clip(state: Mapping[str, torch.Tensor]) -> Tensors:
    """CLIPTextModel as transformers named it until version 5."""
    return {name if name.startswith("text_") else f"text_model.{name}": value for name, value in state.items()}


def open_clip(state: Mapping[str, torch.Tensor]) -> Tensors:
    """CLIPTextModel in the layout of OpenCLIP: a projection to multiply with from the right, and q, k, v in one."""
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    found = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "logit_scale": torch.tensor(4.6),
    }
    if "text_projection.weight" in state:
        found["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    for name, value in state.items():
        name = name.replace("final_layer_norm", "ln_final").replace("encoder.layers", "transformer.resblocks")
        name = re.sub(r"layer_norm(\d)", r"ln_\1", name).replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        if match := re.fullmatch(r"(.*)self_attn\.q_proj\.(\w+)", name):
            old = match[1].replace("transformer.resblocks", "encoder.layers")
            parts = [state[f"{old}self_attn.{part}_proj.{match[2]}"] for part in "qkv"]
            found[f"{match[1]}attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj", name):
            found[name.replace("self_attn", "attn")] = value
    return found


def flux(state: Mapping[str, torch.Tensor]) -> Tensors:
    """FluxTransformer2DModel: q, k, v, and of single blocks the first half of the MLP too, are one layer."""
    named = {
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "norm.linear": "modulation.lin",
        "attn.to_q attn.to_k attn.to_v": "img_attn.qkv",
        "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "txt_attn.qkv",
        "attn.to_q attn.to_k attn.to_v proj_mlp": "linear1",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
    }
    single = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm", "proj_out": "linear2"}
    double = {"attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm"}
    last = {"proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1"}
    found = {}
    for block, own in _blocks(state).items():
        kind, _, number = block.rpartition(".")
        names = named | {"": last, "transformer_blocks": double, "single_transformer_blocks": single}[kind]
        new = {"": "", "transformer_blocks": "double_blocks.", "single_transformer_blocks": "single_blocks."}[kind]
        for layer, value in _renamed(own, names).items():
            layer = re.sub(r"_norm\.weight$", "_norm.scale", layer)
            found[f"{new}{number}{'.' if number else ''}{layer}"] = _scale_last(layer, value)
    return found


def sd3(state: Mapping[str, torch.Tensor]) -> Tensors:
    """SD3Transformer2DModel: MMDiT, whose blocks have one half for the image and one for the text."""
    named = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
        "attn.to_add_out": "context_block.attn.proj",
        "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "context_block.attn.qkv",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
    }
    for attention in ("attn", "attn2"):
        named[f"{attention}.to_q {attention}.to_k {attention}.to_v"] = f"x_block.{attention}.qkv"
        named[f"{attention}.norm_q"] = f"x_block.{attention}.ln_q"
        named[f"{attention}.norm_k"] = f"x_block.{attention}.ln_k"
        named[f"{attention}.to_out.0"] = f"x_block.{attention}.proj"
    state = dict(state)
    found = {"pos_embed": state.pop("pos_embed.pos_embed")}
    blocks = _blocks(state)
    last = f"transformer_blocks.{len(blocks) - 2}"
    for block, own in blocks.items():
        number = block.rpartition(".")[2]
        for layer, value in _renamed(own, named).items():
            if layer.startswith("final_layer.") or (block == last and layer.startswith("context_block.adaLN")):
                value = _scale_last(layer, value)
            found[f"joint_blocks.{number}.{layer}" if number else layer] = value
    return found


def _blocks(state: Mapping[str, torch.Tensor]) -> dict[str, Tensors]:
    """The tensors of each numbered block, and under no name what lies outside of them."""
    found: dict[str, Tensors] = {"": {}}
    for name, value in state.items():
        match = re.match(r"(?:single_)?transformer_blocks\.\d+", name)
        block = match[0] if match else ""
        found.setdefault(block, {})[name.removeprefix(f"{block}.")] = value
    return found


def _renamed(state: Mapping[str, torch.Tensor], named: Mapping[str, str]) -> Tensors:
    """Layers by their new names; several old ones, with a space between them, are put one below the other. Of two new
    ones that begin alike, the longer one counts."""
    found, used = {}, set()
    for old, new in sorted(named.items(), key=lambda item: -len(item[0].split())):
        layers: Sequence[str] = old.split()
        for kind in ("weight", "bias"):
            names = [f"{layer}.{kind}" for layer in layers]
            if all(name in state for name in names) and not used.intersection(names):
                found[f"{new}.{kind}"] = torch.cat([state[name] for name in names])
                used.update(names)
    assert used == state.keys(), sorted(state.keys() - used)
    return found


def _scale_last(layer: str, value: torch.Tensor) -> torch.Tensor:
    """The authors' last modulation gives shift and scale, diffusers' scale and shift."""
    if not layer.startswith(("final_layer.adaLN", "context_block.adaLN")):
        return value
    scale, shift = value.chunk(2)
    return torch.cat([shift, scale])


def _longest(name: str, named: Mapping[str, str]) -> tuple[str, str]:
    return max((item for item in named.items() if name.startswith(f"{item[0]}.")), key=lambda item: len(item[0]))

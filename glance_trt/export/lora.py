"""Reads LoRA files, in the key layouts of diffusers, PEFT and kohya, and matches them with a model's weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from glance_trt.errors import LoraError, ModelError
from glance_trt.export.weights import Fused, TensorRef, read_header

_DOWN = re.compile(r"(.+?)[._](?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight")
_UP = re.compile(r"(.+?)[._](?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight")
_ALPHA = re.compile(r"(.+?)\.(?:lora_)?alpha")
_PREFIXES = ("base_model.model.", "unet.", "transformer.", "lora_unet_")
_REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a Tucker core",
}


@dataclass(frozen=True)
class Pair:
    """The two factors of one weight's update, ``scale * up @ down``: down [rank, in, ...], up [out, rank, ...]."""

    down: TensorRef
    up: TensorRef
    scale: float


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its factors by the name of the weight they change.

    `alpha` is nothing where the file does not give one; then the scale is 1 unless the recipe says otherwise.
    """

    file: Path
    pairs: dict[str, Pair]
    alpha: float | None
    scale: float


def read(path: Path, weights: Mapping[str, TensorRef], scale: float | None = None) -> Lora:
    """Read a LoRA for a model whose tensors are `weights`.

    `scale` overrides alpha / rank. Every key must match a weight, else `LoraError` lists those that do not.
    """
    if not path.is_file():
        raise LoraError(f"{path}: no such LoRA file; train one with: glance-trt distill RECIPE")
    try:
        tensors, metadata = read_header(path)
    except ModelError as error:
        raise LoraError(str(error)) from None
    if not tensors:
        raise LoraError(f"{path}: empty, it has no tensors")
    for key in tensors:
        for mark, kind in _REFUSED.items():
            if mark in key:
                raise LoraError(f"{path}: {key} belongs to a {kind} adapter; only plain LoRA can be fused")
    known = _module_names(weights)
    downs, ups, alphas, unmatched = _sort_keys(tensors, known)
    if unmatched:
        shown = "\n  ".join(unmatched[:8]) + (f"\n  and {len(unmatched) - 8} more" if len(unmatched) > 8 else "")
        raise LoraError(
            f"{path}: {len(unmatched)} of {len(tensors)} keys match nothing in the model; is it a LoRA for another "
            f"family or component?\n  {shown}"
        )
    declared = _declared_alphas(metadata)
    pairs, seen = {}, set()
    for module in downs:
        if module not in ups:
            raise LoraError(f"{path}: {module} has a down factor and no up factor")
        down, up, base = downs[module], ups[module], weights[f"{module}.weight"]
        rank = down.shape[0]
        if (up.shape[0], down.shape[1:]) != (base.shape[0], base.shape[1:]) or up.shape[1] != rank:
            raise LoraError(
                f"{path}: {module}: factors {list(up.shape)} x {list(down.shape)} do not fit the weight "
                f"{list(base.shape)}; is it a LoRA for another model?"
            )
        alpha = alphas[module].read().item() if module in alphas else _lookup(declared, module)
        seen.add(alpha)
        pairs[f"{module}.weight"] = Pair(down, up, scale if scale is not None else 1.0 if alpha is None else alpha / rank)
    if missing := sorted(ups.keys() - downs.keys()):
        raise LoraError(f"{path}: {missing[0]} has an up factor and no down factor")
    first = next(iter(pairs.values()))
    return Lora(path, pairs, seen.pop() if len(seen) == 1 else None, first.scale)


def fused(base: TensorRef, pair: Pair) -> Fused:
    """``W + scale * up @ down``, computed in float32 and rounded once to W's own dtype."""

    def compute() -> torch.Tensor:
        up, down = pair.up.read().float().flatten(1), pair.down.read().float().flatten(1)
        weight = base.read()
        return (weight.float() + pair.scale * (up @ down).view(weight.shape)).to(weight.dtype)

    return Fused(base, compute)


def _module_names(weights: Mapping[str, TensorRef]) -> dict[str, str]:
    """Module names by every spelling that a LoRA file may use: with dots, and flattened with underscores (kohya)."""
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    return {module.replace(".", "_"): module for module in modules} | {module: module for module in modules}


def _sort_keys(
    tensors: Mapping[str, TensorRef], known: Mapping[str, str]
) -> tuple[dict[str, TensorRef], dict[str, TensorRef], dict[str, TensorRef], list[str]]:
    downs: dict[str, TensorRef] = {}
    ups: dict[str, TensorRef] = {}
    alphas: dict[str, TensorRef] = {}
    unmatched = []
    for key, tensor in tensors.items():
        for pattern, found in ((_DOWN, downs), (_UP, ups), (_ALPHA, alphas)):
            if match := pattern.fullmatch(key):
                if module := _module(match[1], known):
                    found[module] = tensor
                else:
                    unmatched.append(key)
                break
        else:
            unmatched.append(key)
    return downs, ups, alphas, unmatched


def _module(name: str, known: Mapping[str, str]) -> str | None:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    # Attention processors of early diffusers versions: attn1.processor.to_out_lora, for attn1.to_out.0
    name = name.replace(".processor.", ".").removesuffix("_lora")
    return known.get(name) or known.get(f"{name}.0")


def _declared_alphas(metadata: Mapping[str, str]) -> dict[str, float]:
    """Alphas from the adapter configuration that diffusers and PEFT write into the metadata; ``""`` is the default."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return {}
    alphas: dict[str, float] = {}
    for key, value in config.items():
        name = key.removeprefix("unet.").removeprefix("transformer.")
        if name == "lora_alpha":
            alphas[""] = float(value)
        elif name == "alpha_pattern":
            alphas |= {pattern: float(alpha) for pattern, alpha in value.items()}
    return alphas


def _lookup(alphas: Mapping[str, float], module: str) -> float | None:
    for pattern, alpha in alphas.items():
        if pattern and (module == pattern or module.endswith(f".{pattern}")):
            return alpha
    return alphas.get("")

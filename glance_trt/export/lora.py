"""Reads LoRA files, in the key layouts of diffusers, PEFT and kohya, and matches them with a model's weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from glance_trt.errors import LoraError, ModelError
from glance_trt.export.weights import Fused, TensorRef, read_header

if TYPE_CHECKING:
    import torch

_DOWN = re.compile(r"(.+?)[._](?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight")
_UP = re.compile(r"(.+?)[._](?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight")
_ALPHA = re.compile(r"(.+?)\.(?:lora_)?alpha")
_PREFIXES = ("base_model.model.", "unet.", "transformer.", "lora_unet_")
PROVENANCE = "glance_trt"
"""Key of a file's metadata under which `glance-trt distill` says, as JSON, how it was made."""
_REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a Tucker core",
}


@dataclass(frozen=True)
class Pair:
    """The two factors of one weight's update, ``scale * up @ down``: down [rank, in, ...], up [out, rank, 1...].

    `alpha` is what the file declares for this weight, if it does.
    """

    down: TensorRef
    up: TensorRef
    scale: float
    alpha: float | None


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its factors by the name of the weight they change.

    `alpha` is nothing where the file does not give one for all weights alike. `scale` is that of the first weight.
    `timesteps` are those that it was trained at, where the file says that it was trained at some only.
    """

    file: Path
    pairs: dict[str, Pair]
    alpha: float | None
    scale: float
    timesteps: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Declared:
    """What an adapter configuration says of scales: alpha, alphas by a pattern of module names, and rsLoRA
    (arXiv 2312.03732), which divides alpha by the root of the rank."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def alpha_of(self, module: str) -> float | None:
        """The alpha of a module, patterns first, as PEFT matches them."""
        return next((a for p, a in self.patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{p})", module)), self.alpha)


def read(path: Path, weights: Mapping[str, TensorRef], scale: float | None = None) -> Lora:
    """Read a LoRA for a model whose tensors are `weights`.

    `scale` overrides alpha / rank. Where the file has neither alpha tensors nor a configuration (diffusers' in its
    metadata, PEFT's ``adapter_config.json`` beside ``adapter_model.safetensors``), the scale is 1. Every key must match
    a weight, else `LoraError` lists those that do not.
    """
    if path.is_dir():
        raise LoraError(f"{path}: a folder; expected a .safetensors file")
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
    downs, ups, alphas = _sort_keys(path, tensors, _module_names(weights))
    for module in [*downs, *ups, *alphas]:
        for kind, found in (("down", downs), ("up", ups)):
            if module not in found:
                raise LoraError(f"{path}: {module} has no {kind} factor; the file is incomplete")
        if module in alphas and math.prod(alphas[module].shape) != 1:
            raise LoraError(
                f"{path}: the alpha of {module} has shape {list(alphas[module].shape)}; expected one number"
            )
    declared = _declared(path, metadata)
    pairs = {}
    for module, down in downs.items():
        up, base = ups[module], weights[f"{module}.weight"]
        rank = down.shape[0] if down.shape else 0
        expected_up = (*base.shape[:1], rank, *(1,) * len(base.shape[2:]))
        if not rank or down.shape[1:] != base.shape[1:] or up.shape != expected_up:
            raise LoraError(
                f"{path}: {module}: factors {list(up.shape)} x {list(down.shape)} do not fit the weight "
                f"{list(base.shape)}; is it a LoRA for another model?"
            )
        alpha = alphas[module].read().item() if module in alphas else declared.alpha_of(module)
        if scale is not None or alpha is None:
            chosen = 1.0 if scale is None else scale
        else:
            chosen = alpha / (math.sqrt(rank) if declared.rank_stabilised else rank)
        pairs[f"{module}.weight"] = Pair(down, up, chosen, alpha)
    given = {pair.alpha for pair in pairs.values()}
    first = next(iter(pairs.values()))
    return Lora(path, pairs, first.alpha if len(given) == 1 else None, first.scale, _timesteps(metadata))


def _timesteps(metadata: Mapping[str, str]) -> tuple[float, ...]:
    try:
        return tuple(float(timestep) for timestep in json.loads(metadata[PROVENANCE])["timesteps"])
    except (KeyError, ValueError, TypeError):  # a file of another tool, or damaged in what only informs
        return ()


def fused(base: TensorRef, pair: Pair) -> Fused:
    """``W + scale * up @ down``, computed in float32 and rounded once to W's own dtype.

    That is bit by bit PEFT's merge of factors in float32, as it keeps them unless told otherwise. Factors in half
    precision it merges less exactly: it rounds the update to half precision, and the sum once more.
    """

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
    path: Path, tensors: Mapping[str, TensorRef], known: Mapping[str, str]
) -> tuple[dict[str, TensorRef], dict[str, TensorRef], dict[str, TensorRef]]:
    """Down factors, up factors and alphas by module. Raises `LoraError` for what is none of these."""
    downs: dict[str, TensorRef] = {}
    ups: dict[str, TensorRef] = {}
    alphas: dict[str, TensorRef] = {}
    unmatched = []
    for key, tensor in tensors.items():
        for pattern, found in ((_DOWN, downs), (_UP, ups), (_ALPHA, alphas)):
            if (match := pattern.fullmatch(key)) and (module := _module(match[1], known)):
                if module in found:
                    raise LoraError(f"{path}: {key} is not the only one of its kind for {module}")
                found[module] = tensor
                break
        else:
            unmatched.append(key)
    if unmatched:
        shown = "\n  ".join(unmatched[:8]) + (f"\n  and {len(unmatched) - 8} more" if len(unmatched) > 8 else "")
        raise LoraError(
            f"{path}: {len(unmatched)} of {len(tensors)} keys match nothing in the model; is it a LoRA for another "
            f"family or component? (Only the denoiser's are fused; a text encoder's have to be removed.)\n  {shown}"
        )
    return downs, ups, alphas


def _module(name: str, known: Mapping[str, str]) -> str | None:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    # Attention processors of early diffusers versions: attn1.processor.to_out_lora, for attn1.to_out.0
    name = name.replace(".processor.", ".")
    return known.get(name) or known.get(f"{name}.0")


def _declared(path: Path, metadata: Mapping[str, str]) -> _Declared:
    """The adapter configuration that diffusers writes into the metadata, or PEFT beside the file."""
    beside = path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in metadata:
            config = json.loads(metadata["lora_adapter_metadata"])
        elif path.name == "adapter_model.safetensors" and beside.is_file():
            path, config = beside, json.loads(beside.read_text(encoding="utf-8"))
        else:
            return _Declared()
        own = {key.removeprefix("unet.").removeprefix("transformer."): value for key, value in config.items()}
        patterns = {key: float(value) for key, value in (own.get("alpha_pattern") or {}).items()}
        for pattern in patterns:
            re.compile(pattern)
        alpha = own.get("lora_alpha")
        return _Declared(None if alpha is None else float(alpha), patterns, bool(own.get("use_rslora")))
    except (OSError, ValueError, TypeError, AttributeError, re.error) as error:
        raise LoraError(f"{path}: its adapter configuration is not readable: {error}") from None

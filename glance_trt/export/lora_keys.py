"""Sorts the keys of a LoRA file by the modules that they belong to: which model part, which weights, which factor."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glance_trt.errors import LoraError
from glance_trt.export.lora_layouts import Target, flat
from glance_trt.export.weights import TensorRef

DENOISER = "denoiser"

Layouts = Mapping[str, Mapping[str, tuple[Target, ...]]]
"""The layouts of `glance_trt.export.lora_layouts`, by part: ``denoiser``, and the kinds of text encoders."""

# kohya's, PEFT's and diffusers' spellings of factors, and XLabs', with the stream's number; PEFT may leave an adapter's
# name before the end.
_FACTOR = re.compile(r"(.+?)[._]lora(?:_linear_layer|([12]))?[._](A|B|down|up)(?:\.[^.]+)?\.weight")
_ALPHA = re.compile(r"(.+?)\.(?:lora_)?alpha")
_PARTS = (
    ("unet.", DENOISER),
    ("transformer.", DENOISER),
    ("model.diffusion_model.", DENOISER),
    ("diffusion_model.", DENOISER),
    ("lora_unet_", DENOISER),
    ("lora_transformer_", DENOISER),
    ("lycoris_", DENOISER),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("text_encoders.t5xxl.", "text_encoder_3"),
)
_REFUSED = (
    (re.compile(r"dora_scale|lora_magnitude_vector"), "a DoRA adapter"),
    (re.compile(r"hada_"), "a LoHa adapter"),
    (re.compile(r"lokr_"), "a LoKr adapter"),
    (re.compile(r"lora_mid"), "a LoCon with a Tucker core adapter"),
    (re.compile(r"\boft_"), "an OFT adapter"),
    (re.compile(r"lora_embedding_"), "a LoRA of an embedding"),
    (re.compile(r"lora_(B|up)(\.[^.]+)?\.bias$"), "a LoRA with biases"),
    (re.compile(r"\.diff(_b)?$"), "a difference of whole weights"),
)


@dataclass(frozen=True)
class Module:
    """What a file has for one module, by the name that it first has there: a factor pair, and alpha if it says one.

    down [rank, in, ...], up [out, rank, ...], alpha: one number.
    """

    name: str
    part: str
    targets: tuple[Target, ...]
    down: TensorRef
    up: TensorRef
    alpha: TensorRef | None


def sort(path: Path, tensors: Mapping[str, TensorRef], layouts: Layouts) -> list[Module]:
    """The modules of a file. Raises `LoraError` for keys that are none's, and for modules that lack a factor."""
    for key in tensors:
        for pattern, kind in _REFUSED:
            if pattern.search(key):
                raise LoraError(f"{path}: {key} belongs to {kind}; only plain LoRA can be fused")
    found: dict[tuple[str, tuple[Target, ...]], tuple[str, dict[str, TensorRef]]] = {}
    unmatched: dict[str, str] = {}
    for key, tensor in tensors.items():
        spelt, role = _split(key)
        part, name = _place(spelt, layouts)
        targets = layouts.get(part, {}).get(flat(name))
        if not role or not targets:
            unmatched[key] = part
            continue
        name, roles = found.setdefault((part, targets), (spelt, {}))
        if role in roles:
            raise LoraError(f"{path}: {key} is not the only one of its kind for {name}")
        roles[role] = tensor
    if unmatched:
        raise LoraError(_explain(path, len(tensors), unmatched, layouts))
    modules = []
    for (part, targets), (name, roles) in found.items():
        for role in ("down", "up"):
            if role not in roles:
                raise LoraError(f"{path}: {name} has no {role} factor; the file is incomplete")
        alpha = roles.get("alpha")
        if alpha and math.prod(alpha.shape) != 1:
            raise LoraError(f"{path}: the alpha of {name} has shape {list(alpha.shape)}; expected one number")
        modules.append(Module(name, part, targets, roles["down"], roles["up"], alpha))
    return modules


def _split(key: str) -> tuple[str, str]:
    """The name of a module, and what the key is of it: ``down``, ``up``, ``alpha`` or nothing that is known."""
    if match := _FACTOR.fullmatch(key):
        return match[1] + (match[2] or ""), "down" if match[3] in ("A", "down") else "up"
    match = _ALPHA.fullmatch(key)
    return (match[1], "alpha") if match else (key, "")


def _place(name: str, layouts: Layouts) -> tuple[str, str]:
    """The part of the model that a name in a file is for, and the name within it."""
    name, part = name.removeprefix("base_model.model."), DENOISER
    for prefix, kind in _PARTS:
        if name.startswith(prefix):
            name, part = name.removeprefix(prefix).removeprefix("base_model.model."), kind
            break
    if part != DENOISER:
        name = name.removeprefix("transformer.")  # ComfyUI's: text_encoders.clip_l.transformer.text_model
    # kohya and ComfyUI number CLIP-L, CLIP-G and T5, FLUX's two encoders included.
    if part == "text_encoder_3" and part not in layouts and "text_encoder_2" in layouts:
        part = "text_encoder_2"
    # Attention processors of early diffusers versions, and XLabs': attn1.processor.to_out_lora
    return part, name.replace(".processor.", ".")


def _explain(path: Path, total: int, unmatched: Mapping[str, str], layouts: Layouts) -> str:
    keys = list(unmatched)
    shown = "\n  ".join(keys[:8]) + (f"\n  and {len(keys) - 8} more" if len(keys) > 8 else "")
    absent = sorted({part for part in unmatched.values() if part not in layouts})
    if absent:
        count = sum(part not in layouts for part in unmatched.values())
        others = sorted(part for part in layouts if part != DENOISER)
        why = f"{count} are for {', '.join(absent)}: " + (
            f"the model has {', '.join(others)}; is it a LoRA for another family?"
            if others
            else "only the denoiser's are fused here, a text encoder's have to be removed"
        )
    else:
        why = "is it a LoRA for another family?"
    return f"{path}: {len(keys)} of {total} keys match nothing in the model; {why}\n  {shown}"

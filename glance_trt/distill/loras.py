"""LoRAs of a UNet: added for training, and saved as diffusers saves them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from glance_trt import strict
from glance_trt.distill import files
from glance_trt.errors import RecipeError
from glance_trt.export.lora import PROVENANCE
from glance_trt.recipe import Distill


def add(unet: UNet2DConditionModel, settings: Distill, seed: int) -> None:
    """Add a LoRA at scale alpha / rank to a frozen UNet, its A drawn from a Gaussian and its B zero.

    Raises `RecipeError` for a target that is no linear or convolution layer of the UNet.
    """
    modules = dict(unet.named_modules())
    layers = {name for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))}
    for i, target in enumerate(settings.targets):
        found = {name for name in modules if name == target or name.endswith(f".{target}")}
        if not found or not found <= layers:
            known = {_short_name(name) for name in layers}
            hint = strict.did_you_mean(target, known) or f"there are {', '.join(sorted(known))}"
            raise RecipeError(
                f"distill.targets[{i}]: {target!r} names no linear or convolution layer of the UNet; {hint}"
            )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft only ever divides it by the rank
        target_modules=list(settings.targets),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # peft draws from the global generator
        unet.add_adapter(config)


def remove(unet: UNet2DConditionModel) -> None:
    """Take the LoRA out again, which leaves the UNet as it was."""
    unet.unload_lora()


def restore(unet: UNet2DConditionModel, path: Path) -> None:
    """Give the LoRA that `add` has added the factors of a file that `save` has written."""
    factors = {key.removeprefix("unet."): value for key, value in load_file(path).items()}
    set_peft_model_state_dict(unet, factors)


def save(unet: UNet2DConditionModel, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write the UNet's LoRA to a safetensors file that diffusers' `load_lora_weights` applies at alpha / rank.

    It is diffusers' own file, with `provenance` added to its metadata. Raises `OutputError`.
    """
    adapter = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in unet.peft_config["default"].to_dict().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=adapter,
            weight_name="lora.safetensors",
        )
        content = Path(folder, "lora.safetensors").read_bytes()
    content = with_metadata(content, {PROVENANCE: json.dumps(provenance)})
    files.write_bytes(path, content)


def read_provenance(path: Path) -> dict[str, Any] | None:
    """What `save` was told of this file; nothing if the file is not one of ours."""
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {})[PROVENANCE])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def with_metadata(content: bytes, more: Mapping[str, str]) -> bytes:
    """A safetensors file with entries added to its metadata, in sorted order.

    safetensors 0.8 itself writes them in a random order, and so makes a file of another hash every time.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted({**header["__metadata__"], **more}.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _short_name(name: str) -> str:
    """What a recipe calls a layer: its own name, with the container's before an index (``to_out.0``)."""
    *parents, last = name.split(".")
    return f"{parents[-1]}.{last}" if last.isdigit() and parents else last

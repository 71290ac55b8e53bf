"""A good bundle of a few kilobytes, to be damaged. Its graphs and weights are not real: opening does not read them."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

_LATENTS = ["batch", 4, 8, 8]
_EMBEDS = ["batch", 16, 32]
_MASK = ["batch", 24]
_GRAPHS: dict[str, Any] = {
    "text_encoder": {
        "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", 16], "source": "tokens.tokenizer"}],
        "outputs": [{"name": "prompt_embeds", "dtype": "float32", "shape": _EMBEDS}],
        "files": {"float32": "text_encoder.onnx"},
        "weights": ["text_encoder.safetensors"],
    },
    "text_encoder_2": {
        "inputs": [
            {"name": "input_ids", "dtype": "int64", "shape": _MASK, "source": "tokens.tokenizer_2"},
            {"name": "attention_mask", "dtype": "int64", "shape": _MASK, "source": "mask.tokenizer_2"},
        ],
        "outputs": [{"name": "mask", "dtype": "int64", "shape": _MASK}],
        "files": {"float32": "text_encoder_2.onnx"},
        "weights": ["text_encoder.safetensors"],
    },
    "encoder": {
        "inputs": [
            {"name": "image", "dtype": "uint8", "shape": ["batch", 64, 64, 3], "source": "image"},
            {"name": "noise", "dtype": "float32", "shape": _LATENTS, "source": "noise"},
        ],
        "outputs": [{"name": "latents", "dtype": "float32", "shape": _LATENTS}],
        "files": {"float32": "encoder.onnx"},
        "weights": ["encoder.safetensors"],
    },
    "decoder": {
        "inputs": [{"name": "latents", "dtype": "float32", "shape": _LATENTS, "source": "latents"}],
        "outputs": [{"name": "images", "dtype": "uint8", "shape": ["batch", 64, 64, 3]}],
        "files": {"float32": "decoder.onnx"},
        "weights": ["decoder.safetensors"],
    },
}
for _phase in ("slow", "fast"):
    _GRAPHS[f"denoiser.{_phase}"] = {
        "inputs": [
            {"name": "latents", "dtype": "float32", "shape": _LATENTS, "source": "latents"},
            {"name": "timestep", "dtype": "float32", "shape": [], "source": "table.timestep"},
            {"name": "coefficients", "dtype": "float32", "shape": [3], "source": "table.coefficients"},
            {"name": "guidance_scale", "dtype": "float32", "shape": [], "source": "guidance_scale"},
            {"name": "embeds", "dtype": "float32", "shape": _EMBEDS, "source": "condition.prompt_embeds"},
            {"name": "negative", "dtype": "float32", "shape": _EMBEDS, "source": "negative.prompt_embeds"},
            {"name": "mask", "dtype": "int64", "shape": _MASK, "source": "condition.mask"},
        ],
        "outputs": [{"name": "latents_out", "dtype": "float32", "shape": _LATENTS}],
        "files": {"float32": f"denoiser.{_phase}.onnx"},
        "weights": ["denoiser.base.safetensors", f"denoiser.{_phase}.safetensors"],
        "guidance": "cfg",
    }

_MANIFEST: dict[str, Any] = {
    "format": 1,
    "name": "tiny",
    "family": "stable-diffusion",
    "provenance": {
        "model": "tiny-model",
        "loras": [{"phase": "slow", "file": "slow.safetensors", "sha256": "0" * 64, "scale": 4.0, "alpha": 64.0}],
        "tools": {"torch": "2.13.0"},
    },
    "image": {
        "height": 64,
        "width": 64,
        "latent_channels": 4,
        "latent_scale": 8,
        "sizes": [[64, 128], [256, 256]],
        "sides": [32, 128, 16],
        "tile": [128, 32],
    },
    "tokenizers": {
        "tokenizer": {"file": "tokenizer.json", "max_length": 16, "pad_token_id": 0},
        "tokenizer_2": {"file": "tokenizer.json", "max_length": 24, "pad_token_id": 0, "template": "draw {}."},
    },
    "guidance": {"scale": 4.0, "negative_prompt": ""},
    "schedules": {
        "default": {
            "steps": [
                {"phase": "slow", "timestep": 981.0, "coefficients": [1.0, 1.25, -0.5], "mix": [0.0, 1.0]},
                {"phase": "fast", "timestep": 481, "coefficients": [1.0, 1.125, -0.25], "mix": [0.75, 0.5]},
            ],
            "coefficients": ["c_in", "a", "b"],
            "initial_noise_scale": 1.0,
        },
        "large": {
            "steps": [{"phase": "slow", "timestep": 981, "coefficients": [1, 1.25, -0.5], "mix": [0, 1]}],
            "sizes": [[64, 128], [256, 256]],
            "strength_rounding": "up",
        },
    },
    "graphs": _GRAPHS,
    "engines": {
        "cpu": {
            "backend": "onnxruntime",
            "dtype": "float32",
            "graphs": {name: {"file": f"cpu.{name}.onnx", "weights": ["cpu.bin"]} for name in _GRAPHS},
            "requires": {"onnxruntime": "1.31"},
        }
    },
}


def content(name: str) -> bytes:
    """What the file of that name holds."""
    return f"content of {name}\n".encode() * 3


def manifest() -> dict[str, Any]:
    """A fresh copy of the good manifest, as JSON values."""
    value = copy.deepcopy(_MANIFEST)
    names = [item["file"] for item in value["tokenizers"].values()]
    for graph in value["graphs"].values():
        names += [*graph["files"].values(), *graph["weights"]]
    for engines in value["engines"].values():
        for engine in engines["graphs"].values():
            names += [engine["file"], *engine["weights"]]
    value["files"] = {
        name: {"size": len(content(name)), "sha256": hashlib.sha256(content(name)).hexdigest()}
        for name in dict.fromkeys(names)
    }
    return value


def make_bundle(folder: Path) -> Path:
    """Write the good bundle into the new folder `folder`, and return it."""
    folder.mkdir()
    value = manifest()
    for name in value["files"]:
        (folder / name).write_bytes(content(name))
    (folder / "bundle.json").write_text(json.dumps(value, indent=1))
    return folder

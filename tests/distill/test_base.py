from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from glance_trt.distill import base
from glance_trt.errors import ModelError


def test_components_stored_in_float16_are_trained_in_float32(tiny_model: Path) -> None:
    loaded = base.load_base(tiny_model)
    stored = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for module in (loaded.text_encoder, loaded.unet, loaded.vae):
        assert {value.dtype for value in module.parameters()} == {torch.float32}
        assert not any(value.requires_grad for value in module.parameters())


def test_digest_changes_with_any_weight_and_not_with_the_place(tiny_model: Path, own_home: Path) -> None:
    digest = base.load_base(tiny_model).digest()
    assert base.load_base(own_home / "model").digest() == digest
    file = own_home / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"][0] += 0.5
    save_file(tensors, file)
    assert base.load_base(own_home / "model").digest() != digest


def test_loading_draws_no_progress_bar_and_restores_the_setting(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    active = transformers_logging.is_progress_bar_enabled()
    base.load_base(tiny_model)
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")
    assert transformers_logging.is_progress_bar_enabled() == active


def test_a_damaged_or_missing_component_is_named(own_home: Path) -> None:
    (own_home / "model" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelError, match=r"model/unet: cannot be read as a UNet2DConditionModel"):
        base.load_base(own_home / "model")
    (own_home / "model" / "tokenizer").rename(own_home / "elsewhere")
    with pytest.raises(ModelError, match=r"model/tokenizer: no such folder; a StableDiffusionPipeline has one"):
        base.load_base(own_home / "model")


def test_an_inpainting_model_is_refused(own_home: Path) -> None:
    config_file = own_home / "model" / "unet" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "in_channels": 9}))
    weights = own_home / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.weight"] = torch.zeros(8, 9, 3, 3)
    save_file(tensors, weights)
    with pytest.raises(ModelError, match="takes 9 channels where the VAE makes 4; models for inpainting"):
        base.load_base(own_home / "model")

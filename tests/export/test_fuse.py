"""Fusing: bit by bit what PEFT's merge makes of the same LoRA, and in the right file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glance_trt.export import fuse, guide, lora, weights
from glance_trt.export.weights import TensorRef, read_header

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Layers(nn.Module):
    """One of each kind of layer that a LoRA changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 32)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.conv = nn.Conv2d(16, 24, 3)


def _fused_here_and_by_peft(
    dtype: torch.dtype, lora_dtype: torch.dtype, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The fused weights by our code, by `merge_and_unload`, and by one line of PyTorch in float32."""
    torch.manual_seed(0)
    base = Layers().to(dtype)
    save_file(base.state_dict(), folder / "base.safetensors")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = LoraConfig(r=8, lora_alpha=20, target_modules=["linear", "pointwise", "conv"], init_lora_weights=False)
    # By default PEFT keeps the factors of a half precision model in float32.
    model = get_peft_model(base, config, autocast_adapter_dtype=lora_dtype == torch.float32)
    model.save_pretrained(folder)
    refs = read_header(folder / "base.safetensors")[0]
    found = lora.read(folder / "adapter_model.safetensors", refs)
    assert {pair.down.read().dtype for pair in found.pairs.values()} == {lora_dtype}
    assert found.scale == 2.5
    ours = {name: lora.fused(refs[name], pair).read() for name, pair in found.pairs.items()}
    once = {}
    for name, pair in found.pairs.items():
        update = torch.einsum("or,r...->o...", pair.up.read().float().flatten(1), pair.down.read().float())
        once[name] = (before[name].float() + 2.5 * update).to(dtype)
    return ours, dict(model.merge_and_unload().state_dict()), once


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_weights_are_those_of_pefts_merge_bit_by_bit(dtype: str, tmp_path: Path) -> None:
    ours, peft, _ = _fused_here_and_by_peft(DTYPES[dtype], torch.float32, tmp_path)
    assert ours.keys() == {"linear.weight", "pointwise.weight", "conv.weight"}
    for name, weight in ours.items():
        assert weight.dtype == DTYPES[dtype]
        assert torch.equal(weight, peft[name]), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_factors_are_rounded_once_where_peft_rounds_twice(dtype: str, tmp_path: Path) -> None:
    ours, peft, once = _fused_here_and_by_peft(DTYPES[dtype], DTYPES[dtype], tmp_path)
    apart = 0
    for name, weight in ours.items():
        assert torch.equal(weight, once[name]), name
        apart += int((weight != peft[name]).sum())
        assert torch.allclose(weight.float(), peft[name].float(), rtol=0, atol=3 * torch.finfo(DTYPES[dtype]).eps)
    assert apart  # PEFT rounds the update to half precision before it adds it


@pytest.fixture
def loras(
    write_lora: Callable[..., Path], unet_weights: Mapping[str, TensorRef], tmp_path: Path
) -> dict[str, lora.Lora]:
    """Two LoRAs that have to_q in common."""
    return {
        "slow": lora.read(write_lora(tmp_path / "slow.safetensors", targets=("to_q", "to_v")), unet_weights),
        "fast": lora.read(write_lora(tmp_path / "fast.safetensors", targets=("to_q", "conv1"), seed=1), unet_weights),
    }


def test_base_holds_what_some_phase_leaves_unchanged_and_a_phase_what_it_changes(
    unet_weights: Mapping[str, TensorRef], loras: dict[str, lora.Lora], tmp_path: Path
) -> None:
    contents = fuse.plan(unet_weights, loras)
    assert list(contents) == ["denoiser.base.safetensors", "denoiser.slow.safetensors", "denoiser.fast.safetensors"]
    files = {file: weights.write(tmp_path / file, tensors) for file, tensors in contents.items()}
    slow, fast = loras["slow"].pairs.keys(), loras["fast"].pairs.keys()
    assert slow & fast
    assert slow - fast
    assert files["denoiser.slow.safetensors"].keys() == slow
    assert files["denoiser.fast.safetensors"].keys() == fast
    assert files["denoiser.base.safetensors"].keys() == unet_weights.keys() - (slow & fast)
    for name, ref in files["denoiser.base.safetensors"].items():
        assert torch.equal(ref.read(), unet_weights[name].read())
    for phase, file in (("slow", "denoiser.slow.safetensors"), ("fast", "denoiser.fast.safetensors")):
        for name, ref in files[file].items():
            assert torch.equal(ref.read(), lora.fused(unet_weights[name], loras[phase].pairs[name]).read())
            assert not torch.equal(ref.read(), unet_weights[name].read())


def test_a_phase_without_lora_keeps_all_of_the_base(
    unet_weights: Mapping[str, TensorRef], loras: dict[str, lora.Lora]
) -> None:
    contents = fuse.plan(unet_weights, {"slow": loras["slow"], "rest": None})
    assert list(contents) == ["denoiser.base.safetensors", "denoiser.slow.safetensors"]
    assert contents["denoiser.base.safetensors"].keys() == unet_weights.keys()


def test_no_base_is_written_where_every_phase_changes_everything(
    unet_weights: Mapping[str, TensorRef], loras: dict[str, lora.Lora]
) -> None:
    changed = {name: unet_weights[name] for name in loras["slow"].pairs}
    assert list(fuse.plan(changed, {"slow": loras["slow"]})) == ["denoiser.slow.safetensors"]


def test_a_guide_stands_in_its_phases_own_file_and_leaves_the_base_alone(
    tiny_model: Path,
    unet_weights: Mapping[str, TensorRef],
    loras: dict[str, lora.Lora],
    write_guide: Callable[..., Path],
    tmp_path: Path,
) -> None:
    unet = UNet2DConditionModel.load_config(tiny_model / "unet")
    guides = {
        "fast": guide.read(write_guide(tmp_path / "fast.guide", "embedding"), unet),
        "rest": guide.read(write_guide(tmp_path / "rest.guide", "tiny"), unet),
    }
    contents = fuse.plan(unet_weights, {**loras, "rest": None}, guides)
    assert list(contents) == [f"denoiser.{part}.safetensors" for part in ("base", "slow", "fast", "rest")]
    files = {file: weights.write(tmp_path / file, tensors) for file, tensors in contents.items()}
    base = files["denoiser.base.safetensors"]
    assert base.keys() == unet_weights.keys()  # the phase without a LoRA needs all of it
    assert all(torch.equal(base[name].read(), unet_weights[name].read()) for name in unet_weights)
    assert files["denoiser.slow.safetensors"].keys() == loras["slow"].pairs.keys()
    for phase, lora_names in (("fast", loras["fast"].pairs.keys()), ("rest", set())):
        found, stored = files[f"denoiser.{phase}.safetensors"], load_file(guides[phase].file)
        assert found.keys() == lora_names | {f"guide.{name}" for name in stored}
        assert all(torch.equal(found[f"guide.{name}"].read(), stored[name]) for name in stored)

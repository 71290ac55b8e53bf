"""Guides against diffusers' own embedding of the guidance scale, and what is promised of the adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from glance_trt.errors import LoraError, ModelError
from glance_trt.export import guide, lora
from glance_trt.export.guide import Guide

WriteGuide = Callable[..., Path]

ADAPTERS: tuple[guide.Kind, ...] = ("tiny", "full")


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """A small UNet with a middle block, which the tiny model has not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (
            UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=16,
                attention_head_dim=2,
                norm_num_groups=4,
            )
            .requires_grad_(False)
            .eval()
        )


def a_guide(kind: guide.Kind, unet: UNet2DConditionModel, seed: int = 0) -> Guide:
    """A guide of random weights, none of them zero."""
    config = guide.configure("embedding" if kind == "embedding" else "full", unet.config, 0)
    made = Guide(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for value in made.parameters():
        value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return made


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sample, timestep, embeds, scale"""
    generator = torch.Generator().manual_seed(1)
    sample, embeds = torch.randn(batch, 4, 8, 8, generator=generator), torch.randn(batch, 5, 16, generator=generator)
    return sample, torch.tensor([999.0, 480.0, 3.0])[:batch], embeds, torch.tensor([1.0, 4.7, 9.0])[:batch]


@torch.no_grad()
def guided(made: Guide, unet: Any, sample: Tensor, timestep: Tensor, embeds: Tensor, scale: Tensor) -> Tensor:
    with made.acting(unet, timestep, embeds, scale):
        output: Tensor = unet(sample, timestep, embeds).sample
    return output


def with_scale_embedding(unet: UNet2DConditionModel, made: Guide) -> UNet2DConditionModel:
    """The same UNet by diffusers, with its own projection of the scale's embedding."""
    config = {key: value for key, value in unet.config.items() if key != "_use_default_values"}
    found = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 256})
    found.load_state_dict({**unet.state_dict(), "time_embedding.cond_proj.weight": made.cond_proj.weight})
    return found.eval()


def test_an_embedding_is_diffusers_time_cond_proj_of_the_guidance_scale(unet: UNet2DConditionModel) -> None:
    made = a_guide("embedding", unet)
    reference = with_scale_embedding(unet, made)
    sample, timestep, embeds, scale = inputs()
    embedded = StableDiffusionPipeline.get_guidance_scale_embedding(None, scale - 1, embedding_dim=256)
    torch.testing.assert_close(guide.sinusoids(scale, 256), embedded, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = reference(sample, timestep, embeds, timestep_cond=embedded).sample
    found = guided(made, unet, sample, timestep, embeds, scale)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for i in range(3):  # one scale and timestep for the whole batch, as the graph has them
        one = guided(made, unet, sample, timestep[i], embeds, scale[i])
        torch.testing.assert_close(one[i], expected[i], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert (found - unet(sample, timestep, embeds).sample).abs().max() > 1e-2


def test_whole_sampling_with_an_embedding_is_that_of_diffusers_pipeline(tiny_model: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    unet = pipeline.unet
    made = a_guide("embedding", unet)
    pipeline.unet = with_scale_embedding(unet, made)
    expected = pipeline(
        "a red circle",
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=4.5,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
    ).images
    embeds, _ = pipeline.encode_prompt("a red circle", "cpu", 1, False)
    scheduler = DDIMScheduler.from_pretrained(tiny_model, subfolder="scheduler")
    scheduler.set_timesteps(4)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    for timestep in scheduler.timesteps:
        output = guided(made, unet, latents, timestep.float(), embeds, torch.tensor(4.5))
        latents = scheduler.step(output, timestep, latents).prev_sample
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_adapters_vanish_at_scale_1_and_act_at_others(unet: UNet2DConditionModel) -> None:
    sample, timestep, embeds, _ = inputs()
    made = a_guide("full", unet)
    with torch.no_grad():
        plain = unet(sample, timestep, embeds).sample
    assert torch.equal(guided(made, unet, sample, timestep, embeds, torch.tensor(1.0)), plain)
    for scale in (2.0, 9.0):
        assert (guided(made, unet, sample, timestep, embeds, torch.tensor(scale)) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["embedding", *ADAPTERS])
def test_a_new_guide_changes_nothing(kind: guide.Kind, unet: UNet2DConditionModel) -> None:
    with torch.no_grad():
        plain = unet(*inputs()[:3]).sample
    assert torch.equal(guided(Guide(guide.configure(kind, unet.config, 10**7)), unet, *inputs()), plain)


@pytest.mark.parametrize("kind", ["embedding", "full"])
def test_each_sample_of_a_batch_has_its_own_scale_timestep_and_text(
    kind: guide.Kind, unet: UNet2DConditionModel
) -> None:
    made = a_guide(kind, unet)
    together = guided(made, unet, *inputs())
    for i in range(3):
        alone = guided(made, unet, *(value[i : i + 1] for value in inputs()))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [1, 2, 3], ids=["timestep", "text", "scale"])
def test_adapters_are_told_timestep_text_and_scale(changed: int, unet: UNet2DConditionModel) -> None:
    made = a_guide("full", unet)
    told = [value[1:2] for value in inputs()[1:]]
    other = [*told]
    other[changed - 1] = inputs()[changed][2:3]
    assert (made._condition(*told) - made._condition(*other)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["mid_block", "up_blocks.0", "up_blocks.1"])
def test_the_middle_and_each_decoder_block_has_its_adapter(name: str, unet: UNet2DConditionModel) -> None:
    made = a_guide("full", unet)
    assert {key.replace("up_blocks_", "up_blocks.") for key in made.adapters} == {
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
    }
    before = guided(made, unet, *inputs())
    made.adapters[name.replace(".", "_")].up.weight.zero_()
    made.adapters[name.replace(".", "_")].up.bias.zero_()
    assert (guided(made, unet, *inputs()) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["embedding", "full"])
def test_nothing_is_left_on_the_unet_even_after_an_error(kind: guide.Kind, unet: UNet2DConditionModel) -> None:
    with torch.no_grad():
        plain = unet(*inputs()[:3]).sample
    _, timestep, embeds, scale = inputs()
    with pytest.raises(KeyError), a_guide(kind, unet).acting(unet, timestep, embeds, scale):
        raise KeyError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    with torch.no_grad():
        assert torch.equal(unet(*inputs()[:3]).sample, plain)


@pytest.mark.parametrize("kind", ["embedding", "full"])
def test_half_precision_computes_near_float32(kind: guide.Kind, unet: UNet2DConditionModel) -> None:
    made, half = a_guide(kind, unet), UNet2DConditionModel.from_config(unet.config).bfloat16().eval()
    half.load_state_dict(unet.state_dict())
    sample, timestep, embeds, scale = inputs()
    exact = guided(made, unet, sample, timestep, embeds, scale)
    rounded = guided(made.bfloat16(), half, sample.bfloat16(), timestep, embeds.bfloat16(), scale)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_tiny_has_at_most_one_percent_of_the_parameters_of_stable_diffusion_and_uses_it() -> None:
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        size = sum(value.numel() for value in sd15.parameters())
        assert size == 859_520_964
        made = Guide(guide.configure("tiny", sd15.config, size))
    share = sum(value.numel() for value in made.parameters()) / size
    assert 0.0099 < share <= 0.01
    assert {name.replace("up_blocks_", "up_blocks.") for name in made.adapters} == {
        "mid_block",
        *(f"up_blocks.{i}" for i in range(4)),
    }
    for name, channels in made.config.channels.items():
        block = sd15.get_submodule(name)
        assert block.resnets[-1].out_channels == channels, name
    embedding = guide.configure("embedding", sd15.config, size)
    assert embedding.channels == {"time_embedding": sd15.time_embedding.linear_1.in_features}


def test_a_unet_without_room_for_a_tiny_guide_is_refused(unet: UNet2DConditionModel) -> None:
    with pytest.raises(
        ModelError, match=r"a tiny guide has at most 1% of the UNet's 5000 parameters, and the smallest"
    ):
        guide.configure("tiny", unet.config, 5000)


@pytest.mark.parametrize("kind", ["embedding", *ADAPTERS])
def test_a_guide_is_read_as_it_was_written(
    kind: guide.Kind, tiny_model: Path, write_guide: WriteGuide, tmp_path: Path
) -> None:
    unet = UNet2DConditionModel.load_config(tiny_model / "unet")
    file = write_guide(tmp_path / "x.guide", kind)
    found = guide.read(file, unet)
    assert (found.file, found.config.kind) == (file, kind)
    stored = load_file(file)
    assert found.tensors.keys() == stored.keys()
    assert all(torch.equal(found.tensors[name].read(), stored[name]) for name in stored)
    assert set(found.config.channels) == ({"time_embedding"} if kind == "embedding" else {"up_blocks.0", "up_blocks.1"})
    Guide(found.config).load_state_dict(stored)


def test_files_that_are_no_guide_are_refused(
    tiny_model: Path, write_guide: WriteGuide, write_lora: Callable[..., Path], tmp_path: Path
) -> None:
    unet = UNet2DConditionModel.load_config(tiny_model / "unet")
    with pytest.raises(LoraError, match=r"gone\.guide: no such guide; train one with: glance-trt distill RECIPE"):
        guide.read(tmp_path / "gone.guide", unet)
    with pytest.raises(LoraError, match=r"lora\.safetensors: no guide; its metadata lack glance_trt_guide"):
        guide.read(write_lora(tmp_path / "lora.safetensors"), unet)
    (tmp_path / "text").write_text("not a guide")
    with pytest.raises(LoraError, match=r"text: not a readable safetensors file"):
        guide.read(tmp_path / "text", unet)
    file = write_guide(tmp_path / "x.guide", "tiny")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(LoraError, match=r"x\.guide: not a readable safetensors file: .*lies outside the file"):
        guide.read(file, unet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: "{", "x.guide: not a readable guide: .*Expecting"),
        (lambda config: "[" * 10000, "x.guide: not a readable guide: "),
        (lambda config: json.dumps({**config, "kind": "large"}), "kind: expected one of embedding, tiny, full"),
        (lambda config: json.dumps({**config, "more": 1}), "not a readable guide: more: unknown key"),
        (lambda config: json.dumps({**config, "widths": {}}), "widths: expected a width from 1 to 65536 for each"),
        (
            lambda config: json.dumps({**config, "widths": dict.fromkeys(config["widths"], 0)}),
            "widths: expected a width from 1 to 65536",
        ),
    ],
)
def test_damaged_metadata_are_refused(
    change: Any, message: str, tiny_model: Path, write_guide: WriteGuide, tmp_path: Path
) -> None:
    file = write_guide(tmp_path / "x.guide", "tiny")
    config = json.loads(guide.read_header(file)[1][lora.GUIDE])
    save_file(load_file(file), file, {lora.GUIDE: change(config)})
    with pytest.raises(LoraError, match=message):
        guide.read(file, UNet2DConditionModel.load_config(tiny_model / "unet"))


def test_a_damaged_shape_or_missing_tensor_is_named(tiny_model: Path, write_guide: WriteGuide, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.load_config(tiny_model / "unet")
    file = write_guide(tmp_path / "x.guide", "tiny")
    tensors, (_, metadata) = load_file(file), guide.read_header(file)
    save_file({**tensors, "mix.bias": torch.zeros(65)}, file, metadata)
    with pytest.raises(LoraError, match=r"mix\.bias: expected the shape \[64\], found \[65\]; the file is damaged"):
        guide.read(file, unet)
    del tensors["adapters.up_blocks_1.up.weight"]
    save_file(tensors, file, metadata)
    with pytest.raises(LoraError, match=r"up_blocks_1\.up\.weight: expected the shape \[8, 3, 1, 1\], found nothing"):
        guide.read(file, unet)


def test_a_guide_of_another_architecture_is_refused_block_by_block(
    unet: UNet2DConditionModel, tiny_model: Path, write_guide: WriteGuide, tmp_path: Path
) -> None:
    tiny = UNet2DConditionModel.load_config(tiny_model / "unet")
    file = write_guide(tmp_path / "x.guide", "tiny")
    for other, difference in (
        (unet.config, "mid_block has 16 channels here, none in the guide"),
        ({**tiny, "block_out_channels": [8, 32]}, "up_blocks.0 has 32 channels here, 16 in the guide"),
        (
            {**tiny, "block_out_channels": [8, 16, 32]},
            "up_blocks.0 has 32 channels here, 16 in the guide; up_blocks.1 has 16 channels here, 8 in the guide; "
            "up_blocks.2 has 8 channels here, none in the guide",
        ),
        ({**tiny, "cross_attention_dim": 32}, "text embeddings are 32 wide here, 16 in the guide"),
    ):
        with pytest.raises(LoraError) as error:
            guide.read(file, other)
        assert str(error.value) == f"{file}: a guide for another architecture: {difference}"
    embedding = write_guide(tmp_path / "y.guide", "embedding")
    assert guide.read(embedding, {**tiny, "cross_attention_dim": 32}).config.kind == "embedding"
    with pytest.raises(LoraError, match="time_embedding has 16 channels here, 8 in the guide"):
        guide.read(embedding, {**tiny, "block_out_channels": [16, 16]})

"""A recipe's own decoder, an AutoencoderTiny: compared with diffusers' pipelines that decode with one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor

from glance_trt.errors import ModelError, RecipeError
from glance_trt.export import inputs, parity, trace
from glance_trt.export.families import autoencoder, from_recipe
from glance_trt.export.parity import PortableRunner, Reference
from glance_trt.recipe import Recipe

from . import fidelity

Make = Callable[..., Recipe]


def _save_tiny(folder: Path, *, channels: int = 4, seed: int = 0, **config: Any) -> Path:
    """One of two pixels per latent along each side, as the tiny model has them, of random weights."""
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderTiny(**blocks | {"latent_channels": channels} | config)
    vae.decoder.layers[-1].weight.data *= 4  # so that there is something to see
    vae.decoder.layers[-1].bias.data += 0.5
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def home(tiny_model: Path, tmp_path: Path) -> Path:
    """A recipe's folder, with the tiny model and an AutoencoderTiny for it."""
    (tmp_path / "model").symlink_to(tiny_model)
    _save_tiny(tmp_path / "taesd")
    return tmp_path


@pytest.mark.parametrize(("channels", "shift"), [(4, 0.0), (16, 0.0), (16, 0.25)])
def test_it_decodes_as_the_pipelines_of_diffusers_do(tmp_path: Path, channels: int, shift: float) -> None:
    """Those of Stable Diffusion 3 and FLUX add its shift, which is zero in the published ones."""
    vae = AutoencoderTiny.from_pretrained(_save_tiny(tmp_path, channels=channels, shift_factor=shift))
    latents = 2 * torch.randn(2, channels, 6, 10, generator=torch.Generator().manual_seed(0))
    module = autoencoder.decoder(AutoencoderTiny.load_config(tmp_path))
    module.vae.load_state_dict(vae.state_dict(), strict=False)
    with torch.no_grad():
        image = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        found = module(latents)
    images = VaeImageProcessor(vae_scale_factor=2).postprocess(image, output_type="np")
    assert found.shape == (2, 12, 20, 3)
    assert found.dtype == torch.uint8
    np.testing.assert_allclose(found, images * 255, rtol=0, atol=0.51)
    assert found.float().std() > 20


def test_its_graph_is_pytorchs_at_every_size(home: Path, make_recipe: Make) -> None:
    family = from_recipe(make_recipe(decoder="taesd"), home)
    tensors, source = family.model.tensors(family.components["decoder"]), family.sources()["decoder"]
    assert {ref.file.parent for ref in tensors.values()} == {home / "taesd"}
    trace.bind(trace.trace(source, "float32"), tensors, home / "taesd" / "decoder.onnx")
    runner = PortableRunner(home / "taesd", {"decoder": "decoder.onnx"})
    for latents in ((6, 10), (16, 2)):
        parity.check(runner, {"decoder": "float32"}, Reference(family, {}), {"decoder": source}, latents=latents)


def test_a_bundle_with_it_makes_the_images_of_diffusers(tiny_model: Path, tmp_path: Path) -> None:
    _save_tiny(tmp_path / "taesd")
    made = fidelity.make(
        tiny_model, tmp_path, height=16, width=24, sizes=[[24, 16]], decoder="taesd", scheduler="DDIMScheduler"
    )
    fidelity.check_graphs(made)
    fidelity.check_images(made)


def test_the_vae_gives_only_its_configuration_and_the_encoder(
    tiny_model: Path, home: Path, make_recipe: Make, tmp_path: Path
) -> None:
    (home / "model").unlink()
    shutil.copytree(tiny_model, home / "model")
    (home / "model" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    known = inputs.read(make_recipe(decoder="taesd"), home)
    assert known.family.components["decoder"] == "decoder"
    assert known.family.image() == from_recipe(make_recipe(), home).image()
    assert {home / "taesd/config.json", home / "model/vae/config.json"} <= set(known.family.files())
    with pytest.raises(ModelError, match="vae: no weights"):
        inputs.read(make_recipe(decoder="taesd", from_image=True), home)


def test_a_build_depends_on_what_the_decoder_is_not_on_where_it_lies(home: Path, make_recipe: Make) -> None:
    known = inputs.read(make_recipe(decoder="taesd"), home).key()
    shutil.copytree(home / "taesd", home / "elsewhere" / "taesd")
    assert inputs.read(make_recipe(decoder="elsewhere/taesd"), home).key() == known
    _save_tiny(home / "elsewhere" / "taesd", seed=1)
    assert inputs.read(make_recipe(decoder="elsewhere/taesd"), home).key() != known
    _save_tiny(home / "elsewhere" / "taesd", act_fn="silu")
    assert inputs.read(make_recipe(decoder="elsewhere/taesd"), home).key()["model"] != known["model"]
    assert inputs.read(make_recipe(), home).key() != known


def test_a_reduced_model_keeps_it(home: Path, make_recipe: Make) -> None:
    """It is small as it is."""
    family = from_recipe(make_recipe(decoder="taesd"), home)
    small, _ = family.reduced({})
    assert isinstance(small.sources()["decoder"].build().vae, AutoencoderTiny)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"channels": 16},
            "decoder: other is for latents of 16 channels, 2 pixels each along a side; this model's have 4 channels, 2 "
            "pixels each. Take one that was made for this model",
        ),
        (
            {"num_decoder_blocks": (1, 1, 1), "decoder_block_out_channels": (8, 8, 8)},
            "decoder: other is for latents of 4 channels, 4 pixels each along a side; this model's have 4 channels, 2 ",
        ),
        ({"upsampling_scaling_factor": 3}, "decoder: other is for latents of 4 channels, 3 pixels each"),
    ],
)
def test_one_that_was_made_for_other_latents_is_refused(
    home: Path, make_recipe: Make, config: dict[str, Any], message: str
) -> None:
    _save_tiny(home / "other", **config)
    with pytest.raises(RecipeError, match=message):
        from_recipe(make_recipe(decoder="other"), home)


def test_the_published_ones_fit_the_published_models() -> None:
    """Which have eight pixels per latent, and four channels, or sixteen from Stable Diffusion 3 on."""
    for channels in (4, 16):
        config = dict(AutoencoderTiny(latent_channels=channels).config) | {"_class_name": "AutoencoderTiny"}
        vae = AutoencoderKL(latent_channels=channels, block_out_channels=(32,) * 4, **_BLOCKS).config
        autoencoder.check_tiny("taesd", config, vae["latent_channels"], autoencoder.scale(vae))


_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def test_what_is_no_tiny_autoencoder_is_refused(tiny_model: Path, home: Path, make_recipe: Make) -> None:
    with pytest.raises(RecipeError, match="decoder: model/vae holds AutoencoderKL; expected an AutoencoderTiny"):
        from_recipe(make_recipe(decoder="model/vae"), home)
    with pytest.raises(ModelError, match=r"nowhere: missing, with its config\.json"):
        from_recipe(make_recipe(decoder="nowhere"), home)

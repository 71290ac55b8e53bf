"""FLUX.1's graphs and pieces, with a tiny [dev] and [schnell]: compared with diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from transformers import CLIPTextConfig, T5Config

from glance_trt import recipe
from glance_trt.build import schedules
from glance_trt.bundle import Bundle
from glance_trt.errors import ModelError, RecipeError
from glance_trt.export import large
from glance_trt.export.families import Family, open_model
from glance_trt.export.families.flux_modules import Rotary
from glance_trt.export.model import Model
from glance_trt.export.modules import Encoder
from glance_trt.export.parity import Reference
from glance_trt.export.reference import DiffusersReference
from glance_trt.export.trace import INLINE_LIMIT
from glance_trt.recipe import Guidance, Phase, Recipe
from glance_trt.runtime.tokenizing import Tokenizer
from glance_trt.schedule import compile_schedule

from ...models import flux, parts
from . import fidelity

NEGATIVE = "a yellow square"
TOKENS = 24  # of T5
DEV, SCHNELL = Guidance("embedded", 3.5), Guidance("none")
GLANCE = (Phase("slow", (1, 3, 5, 7, 9)), Phase("fast", (11, 21, 31, 41, 50)))
RECIPE: dict[str, Any] = {
    "height": 16,
    "width": 24,
    "sizes": [[24, 16]],
    "prompt_tokens": TOKENS,
    "guidance": {"mode": "embedded", "scale": 3.5},
    "targets": ("to_q", "to_k", "to_v", "to_out.0"),  # Glance's
    "from_image": True,
}


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux.make(tmp_path_factory.mktemp("dev") / "model")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux.make(tmp_path_factory.mktemp("schnell") / "model", dev=False)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configurations of FLUX.1 [dev], without weights: mostly the defaults of diffusers' classes."""
    folder = flux.make(tmp_path_factory.mktemp("real") / "model")
    with torch.device("meta"):
        FluxTransformer2DModel(guidance_embeds=True).save_config(folder / "transformer")
        vae = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
        sides = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        scales = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
        quant = {"use_quant_conv": False, "use_post_quant_conv": False}
        AutoencoderKL(**vae, **sides, **scales, **quant).save_config(folder / "vae")
    clip = CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
    clip.save_pretrained(folder / "text_encoder")
    shape = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    T5Config(**shape, feed_forward_proj="gated-gelu").save_pretrained(folder / "text_encoder_2")
    return folder


def _family(model: Path, **changes: Any) -> Family:
    parts: dict[str, Any] = {"height": 16, "width": 24, "phases": GLANCE, "prompt_tokens": TOKENS, "guidance": DEV}
    return open_model(Model(model, "flux"), Recipe("flux", "model", **parts | changes))


def _pipeline(model: Path, kind: type = FluxPipeline) -> Any:
    pipe = kind.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the pieces, against diffusers' pipelines -----------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 12), (16, 6)])
@pytest.mark.parametrize("which", ["dev", "schnell"])
def test_a_step_is_diffusers_packing_prediction_and_update(
    which: str, height: int, width: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    guided = which == "dev"
    family = _family(model, guidance=DEV if guided else SCHNELL, height=2 * height, width=2 * width)
    pipe, noise = _pipeline(model), _draw(2, 4, height, width)
    embeds, pooled = _draw(2, TOKENS, 24, seed=1), _draw(2, 20, seed=2)
    latents, ids = pipe.prepare_latents(
        2, 4, 2 * height, 2 * width, torch.float32, "cpu", None, pipe._pack_latents(noise, 2, 4, height, width)
    )
    sigmas, mu = np.linspace(1.0, 1 / 50, 50), calculate_shift(latents.shape[1])
    pipe.scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    timestep = pipe.scheduler.timesteps[10]
    with torch.no_grad():
        predicted = pipe.transformer(
            hidden_states=latents,
            timestep=timestep.expand(2) / 1000,
            guidance=torch.full([2], 3.5) if guided else None,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(TOKENS, 3),
            img_ids=ids,
            return_dict=False,
        )[0]
    moved = pipe.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    expected = pipe._unpack_latents(moved, 2 * height, 2 * width, pipe.vae_scale_factor)

    tokens = family.image_tokens(2 * height, 2 * width)
    config = family.scheduler_config()
    step = compile_schedule(config, [("slow", (11, 12))], teacher_steps=50, image_tokens=tokens).steps[0]
    assert step.timestep == pytest.approx(float(timestep), rel=1e-6)
    inputs = {
        "latents": noise,
        "timestep": np.array(step.timestep, np.float32),
        "coefficients": np.array([step.c_in, step.a, step.b], np.float32),
        "guidance_scale": np.array(3.5, np.float32),
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
    }
    ports = [port.name for port in family.sources()["denoiser"].inputs]
    assert ("guidance_scale" in ports) == guided
    (found,) = Reference(family, {"slow": None}).run("denoiser.slow", {name: inputs[name] for name in ports}).values()
    assert np.abs(found - expected.numpy()).max() <= 1e-5 * float(expected.abs().max())
    assert float((moved - latents).abs().max()) > 0.01, "the step moves"


def test_the_rotary_embedding_is_diffusers_own_to_the_bit() -> None:
    axes, side = (16, 56, 56), 512  # FLUX.1's, and an image of 8192 pixels along a side
    rotary = Rotary(axes, side)
    assert {table.shape for table in rotary.buffers()} == {(side, 28)}
    assert max(table.nbytes for table in rotary.buffers()) <= INLINE_LIMIT
    for height, width in [(64, 64), (3, side), (side, 2)]:
        image = FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32)
        expected = FluxPosEmbed(10000, list(axes))(torch.cat([torch.zeros(TOKENS, 3), image]))
        for found, table in zip(rotary(TOKENS, height, width), expected, strict=True):
            assert torch.equal(found, table)


@pytest.mark.parametrize("prompt", ["a large red circle", "a large red circle left of a small blue star"])
def test_the_text_encoders_make_the_embeddings_of_diffusers(dev: Path, prompt: str) -> None:
    """With padding, and cut to T5's tokens."""
    family = _family(dev)
    with torch.no_grad():
        embeds, pooled, ids = _pipeline(dev).encode_prompt(prompt, max_sequence_length=TOKENS)
    assert not ids.any(), "the step turns no token of the text"
    reference, found = Reference(family, {"all": None}), {}
    for graph, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        item = family.tokenizers()[tokenizer]
        encoded = Tokenizer(item.text.encode(), max_length=item.max_length, pad_token_id=item.pad_token_id)
        found |= reference.run(graph, {"input_ids": encoded.encode(prompt).ids[None]})
    assert found.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
    np.testing.assert_allclose(found["prompt_embeds"], embeds, atol=1e-5)
    np.testing.assert_allclose(found["pooled_prompt_embeds"], pooled, atol=1e-5)


def test_an_image_is_encoded_and_noised_as_diffusers_does(dev: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    pipe = _pipeline(dev, FluxImg2ImgPipeline)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), mu=calculate_shift(24))
    timestep, generator = pipe.scheduler.timesteps[2:3], torch.Generator().manual_seed(3)
    image = pipe.image_processor.preprocess(pixels / 255)
    with torch.no_grad():
        packed, _ = pipe.prepare_latents(image, timestep, 2, 4, 16, 24, torch.float32, "cpu", generator)
        expected = pipe._unpack_latents(packed, 16, 24, pipe.vae_scale_factor)
        generator = torch.Generator().manual_seed(3)
        noise = [torch.randn(2, 4, 8, 12, generator=generator) for _ in range(2)]  # of the sample, of the start
        latents = Encoder(AutoencoderKL.from_pretrained(dev / "vae"))(torch.from_numpy(pixels), noise[0])
    family = _family(dev, from_image=True)
    assert [port.source for port in family.sources()["encoder"].inputs] == ["image", "noise"]
    config = family.scheduler_config()
    signal, spread = compile_schedule(config, [("all", (3,))], teacher_steps=8, image_tokens=24).steps[0].mix
    torch.testing.assert_close(signal * latents + spread * noise[1], expected, rtol=0, atol=1e-5)


# --- schedules ------------------------------------------------------------------------------------------------------

PRINTED = [1000, 986.9786, 973.2042, 958.6094, 943.1188, 926.6473, 825.7017, 677.9868, 441.1997, 60.5503]
"""Glance's timesteps for FLUX.1 [dev] at 1024 x 1024 (arXiv 2512.02899)."""


def test_schedules_have_the_printed_timesteps_and_join_them(real: Path) -> None:
    family = _family(real, height=1024, width=1024, sizes=((512, 768),))
    made = schedules(family, family.recipe)  # type: ignore[attr-defined]
    assert {name: item.sizes for name, item in made.items()} == {
        "default": ((1024, 1024),),
        "512x768": ((512, 768),),
    }
    steps = made["default"].steps
    assert [step.phase for step in steps] == ["slow"] * 5 + ["fast"] * 5
    np.testing.assert_allclose([step.timestep for step in steps], PRINTED, atol=5.1e-5)
    differences = np.diff([*PRINTED, 0]) / 1000
    np.testing.assert_allclose([step.coefficients[2] for step in steps], differences, atol=1.1e-7)
    assert {step.coefficients[:2] for step in steps} == {(1.0, 1.0)}
    assert sum(step.coefficients[2] for step in steps) == pytest.approx(-1, abs=1e-6)
    scheduler = FlowMatchEulerDiscreteScheduler(**flux.DEV)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 50, 50), mu=calculate_shift(32 * 48))
    knots = [step - 1 for phase in GLANCE for step in phase.steps]
    found = [step.timestep for step in made["512x768"].steps]
    np.testing.assert_allclose(found, scheduler.timesteps[knots], rtol=1e-6)


def test_released_walks_the_sigmas_of_two_pipelines_that_replace_only_the_timesteps(real: Path) -> None:
    family = _family(real, height=1024, width=1024, sampler="released")
    steps = schedules(family, family.recipe)["default"].steps  # type: ignore[attr-defined]
    rounded = torch.tensor(PRINTED).bfloat16().float()
    assert [step.timestep for step in steps] == rounded.tolist()
    expected = []
    for count, taken in ((50, 5), (5, 5)):
        scheduler = FlowMatchEulerDiscreteScheduler(**flux.DEV)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), mu=calculate_shift(4096))
        expected += scheduler.sigmas.diff()[:taken].tolist()
    np.testing.assert_allclose([step.coefficients[2] for step in steps], expected, atol=1e-7)


def test_schnell_has_one_schedule_for_all_sizes(schnell: Path) -> None:
    family = _family(schnell, guidance=SCHNELL, teacher_steps=4, phases=(Phase("all", (1, 2, 3, 4)),), sides=(8, 64))
    made = schedules(family, family.recipe)  # type: ignore[attr-defined]
    assert [item.sizes for item in made.values()] == [()]
    assert [step.timestep for step in made["default"].steps] == [1000, 750, 500, 250]


# --- graphs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(dev: Path, tmp_path_factory: pytest.TempPathFactory) -> fidelity.Made:
    return fidelity.make(dev, tmp_path_factory.mktemp("flux") / "made", **RECIPE)


def test_every_graph_is_pytorchs_at_every_size(made: fidelity.Made) -> None:
    graphs = Bundle.open(made.bundle).manifest.graphs
    names = {"text_encoder", "text_encoder_2", "denoiser.slow", "denoiser.fast", "decoder", "encoder"}
    assert set(graphs) == names
    assert graphs["denoiser.slow"].guidance == "embedded"
    fidelity.check_graphs(made)


def test_images_are_those_of_diffusers_with_a_lora_for_each_phase(made: fidelity.Made) -> None:
    fidelity.check_images(made)


def test_images_of_schnell_are_those_of_diffusers_guided_in_two_evaluations(schnell: Path, tmp_path: Path) -> None:
    """What diffusers calls true guidance: the only one that a model without an embedded scale can have."""
    guidance = {"mode": "cfg", "scale": 3.0, "negative_prompt": NEGATIVE}
    fidelity.check_images(fidelity.make(schnell, tmp_path / "made", **RECIPE | {"guidance": guidance}))


def test_tensorrt_rtx_takes_every_graph_in_float16(dev: Path, tmp_path: Path) -> None:
    fidelity.check_rtx(fidelity.make(dev, tmp_path / "made", **RECIPE, rtx=True))


def test_a_reduced_model_has_the_blocks_of_the_large_one_and_passes_parity(real: Path) -> None:
    """With all the tokens and positions that the large one has, so that no constant of its graphs is too large."""
    whole = _family(real, height=1024, width=1024, prompt_tokens=None)
    small, guides = whole.reduced({})
    with torch.device("meta"):
        step, large_step = (family.sources()["denoiser"].build() for family in (small, whole))
    assert {type(module) for module in step.modules()} == {type(module) for module in large_step.modules()}
    assert small.sources()["denoiser"].inputs[0] == whole.sources()["denoiser"].inputs[0]
    stored, dtypes = (dict.fromkeys(("text_encoder_2", "denoiser"), dtype) for dtype in ("BF16", "float32"))
    results = large.check_reduced(small, guides, stored, dtypes)
    assert [item.graph for item in results] == list(stored)


# --- what a build asks ----------------------------------------------------------------------------------------------


def test_what_fails_in_float16_computes_in_float32(dev: Path) -> None:
    family = _family(dev, from_image=True)
    expected = {"text_encoder_2", "decoder", "encoder"}
    assert {kind for kind in family.components if family.dtype(kind, "float16") != "float16"} == expected
    assert {family.dtype(kind, "float16") for kind in expected} == {"float32"}
    assert {family.dtype(kind, "bfloat16") for kind in family.components} == {"bfloat16"}


def test_a_prompt_takes_as_many_tokens_as_each_model_was_trained_with(dev: Path, schnell: Path) -> None:
    lengths = {}
    for model, guidance in ((dev, DEV), (schnell, SCHNELL)):
        family = _family(model, guidance=guidance, prompt_tokens=None)
        (port,) = family.sources()["text_encoder_2"].inputs
        lengths[model] = family.tokenizers()["tokenizer_2"].max_length
        assert port.shape == ("batch", lengths[model])
    assert lengths == {dev: 512, schnell: 256}


def test_the_reference_takes_as_many_tokens(schnell: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    plan = Recipe("schnell", schnell.name, height=16, width=24, phases=(Phase("all", (1, 2)),), guidance=SCHNELL)
    reference = DiffusersReference(plan, schnell.parent)
    encode = FluxPipeline.encode_prompt

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        taken.append(options["max_sequence_length"])
        return encode(self, *arguments, **options)

    monkeypatch.setattr(FluxPipeline, "encode_prompt", watched)
    reference.generate("a star", [0])
    assert taken == [256]


def test_the_latents_are_multiples_of_a_patch_and_images_of_the_format(real: Path) -> None:
    family = _family(real, height=1024, width=8192)
    image = family.image()
    assert (image.latent_channels, image.latent_scale) == (16, 8)
    assert family.sources()["denoiser"].inputs[0].shape == ("batch", 16, "2*h", "2*w")
    assert family.image_tokens(1024, 1024) == 4096
    with pytest.raises(RecipeError, match="height: 1000 is not a multiple of 16, as this model needs; try 992"):
        _family(real, height=1000).image()


@pytest.mark.parametrize("kind", ["FluxFillPipeline", "FluxControlPipeline", "FluxKontextPipeline"])
def test_pipelines_that_take_more_than_a_prompt_are_refused(dev: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(ModelError, match=f"{kind} is not supported; supported pipelines: .*FluxPipeline"):
        _family(parts.altered(dev, tmp_path, "model_index.json", _class_name=kind))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"text_encoder_2": [None, None]}, "model_index.json has no text_encoder_2; FLUX needs"),
        (
            "transformer/config.json",
            {"in_channels": 96, "out_channels": 16},  # as FLUX.1 Fill and Depth have it
            "transformer: in_channels is 96, and patches of the VAE's latents have 16; models that fill, edit",
        ),
        ("transformer/config.json", {"out_channels": 8}, "transformer: out_channels is 8, and patches"),
    ],
)
def test_models_that_make_no_images_from_prompts_alone_are_refused(
    dev: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        _family(parts.altered(dev, tmp_path, file, **changes))


@pytest.mark.parametrize(
    ("which", "changes", "message"),
    [
        ("dev", {"guidance": SCHNELL}, "guidance.mode: none, and this model takes the guidance scale itself"),
        ("dev", {"guidance": Guidance("cfg")}, "guidance.mode: cfg, and .*; use embedded, for instance with scale 3.5"),
        ("schnell", {"guidance": DEV}, "guidance.mode: embedded, and this model takes no guidance scale, .*; use none"),
        ("dev", {"prompt_tokens": 513}, "prompt_tokens: 513; this model takes at most 512"),
        ("dev", {"sides": (16, 32)}, "sides: this model's schedule depends on the image's size; list the sizes under"),
        ("dev", {"phases": (Phase("all", (1,), guide="guide.safetensors"),)}, "guides are for UNets"),
    ],
)
def test_recipes_that_ask_for_what_the_model_has_not_are_refused(
    which: str, changes: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    with pytest.raises(RecipeError, match=message):
        _family(model, **changes).image()


def test_the_shipped_recipe_is_glances() -> None:
    plan, _ = recipe.load("flux-1-dev")
    assert plan.phases[0].steps + plan.phases[1].steps == (1, 3, 5, 7, 9, 11, 21, 31, 41, 50)
    assert (plan.teacher_steps, plan.height, plan.width, plan.sampler) == (50, 1024, 1024, "consistent")
    assert plan.guidance.mode == "embedded"
    for phase in plan.phases:
        assert phase.lora is not None
        assert phase.lora.scale == 64 / 16, "the paper's alpha and rank; its code writes no alpha"

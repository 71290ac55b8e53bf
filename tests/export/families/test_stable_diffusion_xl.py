"""Stable Diffusion XL's graphs: compared with diffusers' pipeline, piece by piece and as whole images."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image
from safetensors.torch import save_file

from glance_trt import recipe, strict
from glance_trt.build import schedules
from glance_trt.bundle import Bundle
from glance_trt.errors import ModelError
from glance_trt.export import guide, large, lora, parity
from glance_trt.export.families import open_model
from glance_trt.export.families.stable_diffusion_xl import StableDiffusionXL
from glance_trt.export.families.stable_diffusion_xl_modules import XLStep
from glance_trt.export.guide import GuideFile
from glance_trt.export.model import Model
from glance_trt.export.trace import parameter_names
from glance_trt.recipe import Guidance, Phase, Recipe
from glance_trt.runtime.pipeline import Pipeline
from glance_trt.runtime.tokenizing import Tokenizer
from glance_trt.verify import compare, psnr

from ...models import parts, sdxl
from . import fidelity

Make = Callable[..., Recipe]

PUBLISHED: dict[str, Any] = {
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
        "hidden_act": "gelu",
        "eos_token_id": 2,
    },
    "unet": {
        "in_channels": 4,
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    },
}
"""Stable Diffusion XL base 1.0's, as far as they differ from the classes' defaults."""
TEXT = {"max_position_embeddings": 77, "vocab_size": 49408}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl.make(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="module")
def pipe(model: Path) -> StableDiffusionXLPipeline:
    """diffusers' own, in float32."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def _trace_once(traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glance_trt.export.trace.trace", traced)


def _family(model: Path, plan: Recipe) -> StableDiffusionXL:
    return StableDiffusionXL(Model(model, "tiny"), plan)


def _run(reference: parity.Reference, graph: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    found = reference.run(graph, {name: value.numpy() for name, value in inputs.items()})
    return [torch.from_numpy(value) for value in found.values()]


def _encoded(family: StableDiffusionXL, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """What the text encoders put out for prompts, from the tokenizers as they are in a bundle."""
    reference, made = parity.Reference(family, {}), {}
    for part, name in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        item = family.tokenizers()[name]
        tokenizer = Tokenizer(item.text.encode(), max_length=item.max_length, pad_token_id=item.pad_token_id)
        encoded = [tokenizer.encode(prompt) for prompt in prompts]
        source = family.sources()[part]
        values = {"tokens": [one.ids for one in encoded], "mask": [one.mask for one in encoded]}
        inputs = {port.name: np.stack(values[port.source.partition(".")[0]]) for port in source.inputs}
        made |= {name: torch.from_numpy(value) for name, value in reference.run(part, inputs).items()}
    return made


# --- the pieces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force_zeros", [True, False])
@pytest.mark.parametrize("negative", ["", "blue"])
def test_conditions_are_the_embeddings_of_diffusers(
    model: Path, pipe: StableDiffusionXLPipeline, make_recipe: Make, tmp_path: Path, force_zeros: bool, negative: str
) -> None:
    """Of an empty prompt too. diffusers has zeros for no negative prompt, which an empty one is here."""
    folder = parts.altered(model, tmp_path, "model_index.json", force_zeros_for_empty_prompt=force_zeros)
    family, prompts = _family(folder, make_recipe()), ["a large red circle", ""]
    step, found = family.sources()["denoiser"], {**_encoded(family, prompts)}
    of_negative = _encoded(family, [negative] * 2)
    values = {f"condition.{name}": value for name, value in found.items()}
    values |= {f"negative.{name}": value for name, value in of_negative.items()}
    given = {port.name: values[port.source] for port in step.inputs if port.source in values}
    pipe.register_to_config(force_zeros_for_empty_prompt=force_zeros)
    with torch.no_grad():
        expected = pipe.encode_prompt(prompts, negative_prompt=[negative] * 2 if negative else None)
    for index, prefix in enumerate(("", "negative_")):
        embeds = torch.cat([given[f"{prefix}prompt_embeds"], given[f"{prefix}prompt_embeds_2"]], dim=2)
        assert torch.allclose(embeds, expected[index], atol=1e-5)
        assert torch.allclose(given[f"{prefix}pooled_prompt_embeds"], expected[index + 2], atol=1e-5)
    assert bool(expected[1].any()) == (not force_zeros or bool(negative))


@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
@pytest.mark.parametrize("mode", ["cfg", "none"])
def test_a_step_is_diffusers_prediction_guidance_and_update(
    model: Path, pipe: StableDiffusionXLPipeline, make_recipe: Make, size: tuple[int, int], mode: Any
) -> None:
    plan = make_recipe(guidance=Guidance(mode, rescale=0.7 if mode == "cfg" else 0.0), teacher_steps=10)
    plan = dataclasses.replace(plan, phases=(Phase("all", tuple(range(1, 11))),))
    family, generator = _family(model, plan), torch.Generator().manual_seed(0)
    row = schedules(family, plan)["default"].steps[3]
    embeds, pooled = torch.randn(4, 32, 40, generator=generator), torch.randn(4, 12, generator=generator)
    latents = 5 * torch.randn(2, 4, size[0] // 2, size[1] // 2, generator=generator)
    own = [embeds[2:, :, :16], embeds[2:, :, 16:], pooled[2:]]
    negative = [embeds[:2, :, :16], embeds[:2, :, 16:], pooled[:2]]
    values = [latents, torch.tensor(row.timestep), torch.tensor(row.coefficients)]
    values += [torch.tensor(4.5), *own, *negative] if mode == "cfg" else own
    reference = parity.Reference(family, {"all": None})
    names = [port.name for port in family.sources()["denoiser"].inputs]
    (found,) = _run(reference, "denoiser.all", dict(zip(names, values, strict=True)))

    pipe.scheduler.set_timesteps(10)
    timestep = pipe.scheduler.timesteps[3]
    ids = pipe._get_add_time_ids(size, (0, 0), size, torch.float32, text_encoder_projection_dim=12)
    scaled = pipe.scheduler.scale_model_input(latents, timestep)
    with torch.no_grad():
        predicted = pipe.unet(
            torch.cat([scaled] * 2),
            timestep,
            embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids.repeat(4, 1)},
        ).sample
    without, with_ = predicted.chunk(2)
    noise = rescale_noise_cfg(without + 4.5 * (with_ - without), with_, 0.7) if mode == "cfg" else with_
    expected = pipe.scheduler.step(noise, timestep, latents).prev_sample
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert row.timestep == timestep


def test_the_images_size_makes_a_difference(model: Path) -> None:
    """Of latents that a UNet without it would treat alike: each row is one pattern, repeated."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet", dtype=torch.float32).eval()
    step, sample = XLStep(unet, latent_scale=2), torch.ones(1, 4, 8, 8)
    assert step.time_ids(sample).tolist() == [[16, 16, 0, 0, 16, 16]]
    assert step.time_ids(torch.ones(3, 4, 6, 8)).tolist() == [[12, 16, 0, 0, 12, 16]] * 3
    conditions = [torch.ones(1, 32, 16), torch.ones(1, 32, 24), torch.ones(1, 12)]
    with torch.no_grad():
        found = step.predict(sample, torch.tensor(500.0), None, conditions)
        step.latent_scale = 8
        other = step.predict(sample, torch.tensor(500.0), None, conditions)
    assert (found - other).abs().max() > 0.01 * found.abs().max()


def test_the_decoder_makes_the_pixels_of_the_pipeline(
    model: Path, pipe: StableDiffusionXLPipeline, make_recipe: Make
) -> None:
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    (found,) = _run(parity.Reference(_family(model, make_recipe()), {}), "decoder", {"latents": latents})
    with torch.no_grad():
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    images = pipe.image_processor.postprocess(image, output_type="np")
    expected = torch.from_numpy((images * 255).round().astype("uint8"))
    assert found.dtype == torch.uint8
    assert found.shape == (2, 16, 24, 3)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert found.float().std() > 5


def test_an_image_is_encoded_as_diffusers_encodes_it(model: Path, make_recipe: Make) -> None:
    family, generator = _family(model, make_recipe(from_image=True)), torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 16, 24, 3), generator=generator).to(torch.uint8)
    noise = torch.randn(2, 4, 8, 12, generator=generator)
    (found,) = _run(parity.Reference(family, {}), "encoder", {"image": image, "noise": noise})
    vae = AutoencoderKL.from_pretrained(model / "vae", dtype=torch.float32).eval()
    with torch.no_grad():
        posterior = vae.encode(image.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    expected = vae.config.scaling_factor * (posterior.mean + posterior.std * noise)
    assert torch.allclose(found, expected, atol=1e-5)


# --- whole images ---------------------------------------------------------------------------------------------------


GUIDANCE = {"scale": 3.0, "rescale": 0.7}


@pytest.mark.parametrize(
    "changes",
    [
        {"encoders": ("text_encoder", "text_encoder_2"), "guidance": GUIDANCE},
        {"scheduler": "DDIMScheduler", "guidance": GUIDANCE | {"negative_prompt": "blue"}},
    ],
    ids=["its own scheduler, no negative prompt, LoRAs of text encoders", "DDIM, a negative prompt"],
)
def test_images_are_those_of_diffusers(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    made = fidelity.make(model, tmp_path, height=16, width=16, sizes=[[24, 16]], **changes)
    fidelity.check_graphs(made)
    fidelity.check_images(made)
    assert min(compare(Bundle.open(made.bundle), str(made.recipe), images=1).psnr) >= 50, "as verify --against has it"


def test_images_from_an_image_are_those_of_diffusers(model: Path, tmp_path: Path) -> None:
    phases = [{"name": "all", "steps": [*range(1, 9)]}]
    size = {"height": 24, "width": 16}
    made = fidelity.make(model, tmp_path, **size, phases=phases, guidance=GUIDANCE, from_image=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    image, seed = Image.fromarray(pixels), 7
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(model, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    with Pipeline.open(made.bundle) as pipeline:
        for strength in (0.3, 0.8):
            (found,) = pipeline.generate(fidelity.PROMPT, seed=seed, image=image, strength=strength)
            (expected,) = pipe(
                fidelity.PROMPT,
                image=image,
                strength=strength,
                num_inference_steps=8,
                guidance_scale=GUIDANCE["scale"],
                guidance_rescale=GUIDANCE["rescale"],
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="np",
            ).images
            assert psnr(np.asarray(found), (expected * 255).round().astype(np.uint8)) >= 50


def test_tensorrt_rtx_takes_every_graph_in_float16(model: Path, tmp_path: Path) -> None:
    made = fidelity.make(model, tmp_path, height=16, width=16, from_image=True, rtx=True)
    fidelity.check_rtx(made)


# --- guides ---------------------------------------------------------------------------------------------------------


def _write_guide(model: Path, path: Path, kind: guide.Kind) -> GuideFile:
    unet = UNet2DConditionModel.load_config(model / "unet")
    config = guide.configure(kind, unet, 0)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in guide.Guide(config).state_dict().items()
    }
    save_file(tensors, path, {lora.GUIDE: json.dumps(strict.write(config))})
    return guide.read(path, unet)


@pytest.mark.parametrize("kind", ["embedding", "full"])
def test_a_guide_takes_the_scale_and_leaves_the_base_as_it_is_at_scale_1(
    model: Path, make_recipe: Make, tmp_path: Path, kind: guide.Kind
) -> None:
    plan, guides = make_recipe(), {"fast": _write_guide(model, tmp_path / "fast.guide", kind)}
    family = _family(model, plan)
    source = family.sources(guides)["denoiser.fast"]
    assert [port.name for port in source.inputs][3:] == [
        "guidance_scale",
        "prompt_embeds",
        "prompt_embeds_2",
        "pooled_prompt_embeds",
    ]
    inputs = parity.example_inputs(source, 2, np.random.default_rng(0))
    unguided = family.sources(guides)["denoiser"]
    reference = parity.Reference(family, {"slow": None, "fast": None}, guides=guides)

    def run(graph: str, scale: float, **changes: Any) -> Any:
        given = {**inputs, "guidance_scale": np.array(scale, np.float32), **changes}
        return reference.run(graph, {name: given[name] for name in given})["latents_out"]

    negative = {port.name: inputs[port.name.removeprefix("negative_")] for port in unguided.inputs[7:]}
    plain = run("denoiser.slow", 1.0, **negative)  # guided by 1: the conditional prediction
    largest = np.abs(plain).max()
    if kind == "full":
        assert np.abs(run("denoiser.fast", 1.0) - plain).max() <= 1e-5 * largest
    assert np.abs(run("denoiser.fast", 5.0) - plain).max() > 1e-3 * largest
    assert np.abs(run("denoiser.fast", 5.0) - run("denoiser.fast", 3.0)).max() > 1e-3 * largest


# --- models too large to be compared whole --------------------------------------------------------------------------


@pytest.fixture
def published(model: Path, make_recipe: Make, tmp_path: Path) -> StableDiffusionXL:
    """Stable Diffusion XL base 1.0, without weights."""
    for part, config in PUBLISHED.items():
        (tmp_path / "large" / part).mkdir(parents=True)
        more = TEXT if part.startswith("text") else {}
        (tmp_path / "large" / part / "config.json").write_text(json.dumps(config | more))
    shutil.copy(model / "model_index.json", tmp_path / "large")
    shutil.copytree(model / "scheduler", tmp_path / "large" / "scheduler")
    return _family(tmp_path / "large", make_recipe(height=1024, width=1024))


def test_a_reduced_model_has_the_blocks_of_the_published_one(published: StableDiffusionXL) -> None:
    small = published.reduced({})[0].sources()
    with torch.device("meta"):
        large_ones = {kind: published.sources()[kind].build() for kind in ("text_encoder_2", "denoiser")}
    for kind, whole in large_ones.items():
        step = small[kind].build()
        assert {type(item).__name__ for item in step.modules()} == {type(item).__name__ for item in whole.modules()}
        assert 20 * sum(p.numel() for p in step.parameters()) < sum(p.numel() for p in whole.parameters())
    assert 2.5e9 < sum(p.numel() for p in large_ones["denoiser"].parameters()) < 2.6e9


def test_the_step_of_a_reduced_model_is_compared_whole_and_guides_fit_it(published: StableDiffusionXL) -> None:
    item = GuideFile(Path("guide"), guide.configure("tiny", PUBLISHED["unet"], 2_567_000_000), {})
    family, guides = published.reduced({"fast": item})
    found = large.check_reduced(family, {}, {"denoiser": "F16"}, {"denoiser": "float32"})
    assert [graph.graph for graph in found] == ["denoiser"]
    source = family.sources(guides)["denoiser.fast"]
    inputs = parity.example_inputs(source, 1, np.random.default_rng(0))
    with torch.no_grad():
        latents = source.build().float().eval()(*(torch.from_numpy(inputs[port.name]) for port in source.inputs))
    assert latents.shape == inputs["latents"].shape


# --- what the model says of itself ----------------------------------------------------------------------------------


def test_the_vae_computes_in_float32_where_its_configuration_says_that_float16_overflows(
    model: Path, make_recipe: Make, tmp_path: Path
) -> None:
    family = _family(model, make_recipe(from_image=True))
    half = {kind: family.dtype(kind, "float16") for kind in family.components}
    assert half == {
        "text_encoder": "float16",
        "text_encoder_2": "float16",
        "denoiser": "float16",
        "decoder": "float32",
        "encoder": "float32",
    }
    assert {family.dtype(kind, "bfloat16") for kind in family.components} == {"bfloat16"}
    mended = _family(parts.altered(model, tmp_path, "vae/config.json", force_upcast=False), make_recipe())
    assert mended.dtype("decoder", "float16") == "float16"


def test_weights_that_no_graph_needs_are_left_out(model: Path, make_recipe: Make) -> None:
    """The first text encoder's last layer is behind the hidden state that is taken."""
    sources = _family(model, make_recipe()).sources()
    names = parameter_names(sources["text_encoder"])
    assert {name.split(".")[2] for name in names if name.startswith("encoder.layers")} == {"0"}
    assert not any("final_layer_norm" in name for name in names)
    assert "text_projection.weight" in parameter_names(sources["text_encoder_2"])


def test_the_shipped_recipe_names_sizes_that_the_published_model_takes(published: StableDiffusionXL) -> None:
    plan, _ = recipe.load("stable-diffusion-xl")
    family = StableDiffusionXL(published.model, plan)
    assert family.image().latent_shape == (4, 128, 128)
    assert family.image().takes(832, 1216)
    assert [port.shape for port in family.sources()["denoiser"].inputs[4:7]] == [
        ("batch", 77, 768),
        ("batch", 77, 1280),
        ("batch", 1280),
    ]


def test_an_adapter_is_known_and_sent_to_another_process_without_pytorch(model: Path) -> None:
    code = f"""
import pickle, sys
from pathlib import Path
from glance_trt.export.families import open_model
from glance_trt.export.model import Model
from glance_trt.recipe import Phase, Recipe
family = open_model(Model(Path({str(model)!r}), "tiny"), Recipe("tiny", "model", (Phase("all", (1,)),), 16, 16))
pickle.loads(pickle.dumps(family)).sources()["denoiser"].inputs
print("torch" in sys.modules, "diffusers" in sys.modules, "transformers" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "False False False\n"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLImg2ImgPipeline"},
            "altered: StableDiffusionXLImg2ImgPipeline is not supported; supported pipelines: ",
        ),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLInpaintPipeline"},
            "altered: StableDiffusionXLInpaintPipeline is not supported; supported pipelines: ",
        ),
        (
            "model_index.json",
            {"text_encoder": [None, None]},
            "altered: model_index.json has no text_encoder; the base model has two text encoders. The refiner, which "
            "has one, is not supported$",
        ),
        (
            "unet/config.json",
            {"projection_class_embeddings_input_dim": 5 * sdxl.TIME + sdxl.PROJECTION},
            "unet: is told 5 numbers of an image, the base model 6. The refiner, which takes an aesthetic score, is "
            "not supported$",
        ),
        (
            "unet/config.json",
            {"addition_embed_type": "text_image"},
            "unet: its addition_embed_type is text_image; that of Stable Diffusion XL is text_time$",
        ),
        (
            "unet/config.json",
            {"in_channels": 9},
            "unet: takes 9 channels where the VAE makes 4; models for inpainting and editing are not supported$",
        ),
        (
            "unet/config.json",
            {"time_cond_proj_dim": 256},
            r"unet: takes the guidance scale \(time_cond_proj_dim\), as latent consistency models do, which are not "
            "supported$",
        ),
        (
            "vae/config.json",
            {"latents_mean": [0.0] * 4},
            r"vae: its latents are normalised \(latents_mean\), as in Playground v2.5, which is not supported$",
        ),
    ],
)
def test_relatives_of_the_model_are_refused_by_name(
    model: Path, make_recipe: Make, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = parts.altered(model, tmp_path, name, **changes)
    with pytest.raises(ModelError, match=message):
        open_model(Model(folder, "tiny"), make_recipe())

"""Stable Diffusion 3's graphs and pieces, with a tiny 3.5: compared with diffusers' pipelines."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from numpy.typing import NDArray
from PIL import Image

from glance_trt.bundle import Bundle
from glance_trt.errors import ModelError, RecipeError
from glance_trt.export import large, parity
from glance_trt.export.exporter import _Exporter
from glance_trt.export.families import Family, open_model
from glance_trt.export.families.stable_diffusion_3_modules import transformer
from glance_trt.export.inputs import Inputs
from glance_trt.export.model import Model
from glance_trt.export.modules import Encoder
from glance_trt.export.parity import Reference
from glance_trt.export.reference import DiffusersReference
from glance_trt.recipe import Guidance, Phase, Recipe
from glance_trt.runtime.pipeline import Pipeline
from glance_trt.runtime.tokenizing import Tokenizer
from glance_trt.schedule import compile_schedule
from glance_trt.verify import psnr

from ...models import parts, sd3
from . import fidelity

PROMPT, NEGATIVE = "a large red circle left of a small blue star", "a yellow square"
TOKENS = 10  # of T5
TEACHER_STEPS = 8
SIZES = [(16, 24), (24, 16)]
RECIPE: dict[str, Any] = {"height": 16, "width": 24, "sizes": [[24, 16]], "prompt_tokens": TOKENS}
RECIPE["targets"] = ("to_q", "to_v", "add_k_proj", "to_add_out")  # of images, and of text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3.make(tmp_path_factory.mktemp("sd3") / "model")


@pytest.fixture(scope="module")
def model_without_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As of Stable Diffusion 3: no dual attention, no norm of queries and keys; and without its third encoder."""
    return sd3.make(tmp_path_factory.mktemp("sd3") / "model", t5=False, dual_attention_layers=(), qk_norm=None)


def _family(model: Path, **changes: Any) -> Family:
    parts: dict[str, Any] = {"height": 16, "width": 24, "prompt_tokens": TOKENS, "teacher_steps": TEACHER_STEPS}
    parts["phases"] = (Phase("all", tuple(range(1, TEACHER_STEPS + 1))),)
    parts["guidance"] = Guidance(scale=4.0, negative_prompt=NEGATIVE)
    return open_model(Model(model, "sd3"), Recipe("sd3", "model", **parts | changes))


def _pipeline(model: Path, kind: type = StableDiffusion3Pipeline) -> Any:
    # diffusers wants to be told once more which parts were left out.
    absent = {part: None for part, (_, name) in _index(model).items() if name is None}
    pipe = kind.from_pretrained(model, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _index(model: Path) -> dict[str, list[str | None]]:
    content = json.loads((model / "model_index.json").read_text())
    return {part: value for part, value in content.items() if isinstance(value, list)}


def _conditions(family: Family, reference: Reference, prompts: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """All conditions by the names of the denoiser's inputs, made by our text encoders of our tokens."""
    found = {}
    tokenizers = {name: _tokenizer(item) for name, item in family.tokenizers().items()}
    for graph, source in family.sources().items():
        if graph.startswith("text_encoder"):
            (port,) = source.inputs
            for prefix, prompt in prompts.items():
                ids = tokenizers[port.source.removeprefix("tokens.")].encode(prompt).ids[None]
                values = reference.run(graph, {"input_ids": ids})
                found |= {prefix + name: value for name, value in values.items()}
    return found


def _tokenizer(item: Any) -> Tokenizer:
    return Tokenizer(item.text.encode(), max_length=item.max_length, pad_token_id=item.pad_token_id)


def _draw(height: int, width: int, seed: int = 7) -> torch.Tensor:
    shape = (1, 16, height // 2, width // 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- against diffusers' pipeline ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["model", "model_without_t5"])
def test_every_step_and_the_image_are_those_of_diffusers(
    which: str, size: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    family = _family(request.getfixturevalue(which))
    noise, states = _draw(*size), []
    pipe = _pipeline(family.model.folder)
    expected = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=size[0],
        width=size[1],
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=4.0,
        max_sequence_length=TOKENS,
        latents=noise,
        output_type="np",
        callback_on_step_end=lambda _pipe, _i, _t, values: (states.append(values["latents"]), values)[1],
    ).images

    reference = Reference(family, {"all": None})
    conditions = _conditions(family, reference, {"": PROMPT, "negative_": NEGATIVE})
    phases = [(phase.name, phase.steps) for phase in family.recipe.phases]  # type: ignore[attr-defined]
    table = compile_schedule(family.scheduler_config(), phases, teacher_steps=TEACHER_STEPS)
    latents = noise.numpy() * np.float32(table.initial_noise_scale)
    for step, state in zip(table.steps, states, strict=True):
        scalars = {"timestep": step.timestep, "coefficients": [step.c_in, step.a, step.b], "guidance_scale": 4.0}
        inputs = {name: np.array(value, np.float32) for name, value in scalars.items()} | conditions
        latents = reference.run("denoiser.all", inputs | {"latents": latents})["latents_out"]
        np.testing.assert_allclose(latents, state.numpy(), rtol=0, atol=1e-4 * float(state.abs().max()))
    image = reference.run("decoder", {"latents": latents})["images"]
    assert image.shape == (1, *size, 3)
    np.testing.assert_allclose(image, expected * 255, rtol=0, atol=1.01)
    assert image.std() > 20


@pytest.mark.parametrize("which", ["model", "model_without_t5"])
def test_each_condition_makes_a_difference(which: str, request: pytest.FixtureRequest) -> None:
    """Else the comparison with diffusers would say nothing of it."""
    family = _family(request.getfixturevalue(which), guidance=Guidance("none"))
    reference = Reference(family, {"all": None})
    inputs = parity.example_inputs(family.sources()["denoiser"], 1, np.random.default_rng(0))
    whole = reference.run("denoiser.all", inputs)["latents_out"]
    names = [port.name for port in family.sources()["denoiser"].inputs if port.source.startswith("condition.")]
    clips = ["clip_embeds", "clip_pooled", "clip_embeds_2", "clip_pooled_2"]
    assert names == clips + ["t5_embeds"] * (which == "model")
    for name in names:
        changed = reference.run("denoiser.all", inputs | {name: inputs[name] + 1})["latents_out"]
        assert np.abs(changed - whole).max() > 1e-3 * np.abs(whole).max()


def test_an_image_is_encoded_as_diffusers_encodes_it(model: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    pipe = _pipeline(model, StableDiffusion3Img2ImgPipeline)
    pipe.scheduler.set_timesteps(TEACHER_STEPS)
    timestep, generator = pipe.scheduler.timesteps[2:3], torch.Generator().manual_seed(3)
    image = pipe.image_processor.preprocess(pixels / 255)
    with torch.no_grad():
        expected = pipe.prepare_latents(image, timestep, 2, 1, torch.float32, "cpu", generator)
        generator = torch.Generator().manual_seed(3)
        noise = [torch.randn(2, 16, 8, 12, generator=generator) for _ in range(2)]  # of the sample, of the start
        encoder = Encoder(AutoencoderKL.from_pretrained(model / "vae"))
        latents = encoder(torch.from_numpy(pixels), noise[0])
    family = _family(model, from_image=True)
    assert [port.source for port in family.sources()["encoder"].inputs] == ["image", "noise"]
    table = compile_schedule(family.scheduler_config(), [("all", (3,))], teacher_steps=TEACHER_STEPS)
    signal, spread = table.steps[0].mix
    torch.testing.assert_close(signal * latents + spread * noise[1], expected, rtol=0, atol=1e-5)


def test_the_scheduler_makes_its_own_sigmas_shifted_by_the_image_where_it_says_so(model: Path, tmp_path: Path) -> None:
    """Stable Diffusion 3.5 has a fixed shift; a configuration may ask for one by the image's size."""
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    # A line through far apart values, for these images have few tokens.
    shifting = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 2.0, "max_image_seq_len": 300}
    file.write_text(json.dumps(json.loads(file.read_text()) | shifting))
    pipe, family = _pipeline(folder), _family(folder)
    for height, width in SIZES:
        pipe(
            PROMPT,
            height=height,
            width=width + 8,
            num_inference_steps=TEACHER_STEPS,
            max_sequence_length=TOKENS,
            output_type="latent",
        )
        tokens = family.image_tokens(height, width + 8)
        phases = [("all", range(1, TEACHER_STEPS + 1))]
        table = compile_schedule(family.scheduler_config(), phases, teacher_steps=TEACHER_STEPS, image_tokens=tokens)
        assert [step.timestep for step in table.steps] == pipe.scheduler.timesteps.tolist()


# --- graphs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> fidelity.Made:
    return fidelity.make(model, tmp_path_factory.mktemp("sd3") / "made", **RECIPE, from_image=True)


def test_every_graph_is_pytorchs_at_every_size(made: fidelity.Made) -> None:
    encoders = {"text_encoder", "text_encoder_2", "text_encoder_3"}
    graphs = Bundle.open(made.bundle).manifest.graphs
    assert set(graphs) == encoders | {"denoiser.slow", "denoiser.fast", "decoder", "encoder"}
    fidelity.check_graphs(made)


def test_images_are_those_of_diffusers_with_a_lora_for_each_phase(made: fidelity.Made) -> None:
    fidelity.check_images(made)


def test_an_image_from_an_image_is_that_of_diffusers(made: fidelity.Made) -> None:
    """From the third of five knots on, where the fast phase begins."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    plan, folder = made.load()
    reference = DiffusersReference(plan, folder)
    reference._switch(plan.phases[1])
    expected = StableDiffusion3Img2ImgPipeline(**reference._pipe.components)(
        fidelity.PROMPT,
        image=image,
        strength=0.75,  # diffusers counts in the teacher's eight steps: two of them are left out
        negative_prompt=plan.guidance.negative_prompt,
        guidance_scale=plan.guidance.scale,
        height=16,
        width=24,
        num_inference_steps=plan.teacher_steps,
        generator=torch.Generator().manual_seed(7),
        max_sequence_length=TOKENS,
        output_type="np",
    ).images
    with Pipeline.open(made.bundle, trust=True) as pipeline:
        (found,) = pipeline.generate(fidelity.PROMPT, seed=7, image=image, strength=0.6)
    assert psnr(np.asarray(found), (expected[0] * 255).round().astype(np.uint8)) >= 50
    assert np.asarray(found).std() > 10


def test_the_table_of_positions_is_a_weight(made: fidelity.Made) -> None:
    file = Bundle.open(made.bundle).manifest.graphs["denoiser.slow"].files["float32"]
    found = onnx.load(made.bundle / file, load_external_data=False).graph.initializer
    table = next(tensor for tensor in found if tensor.name == "pos_embed.pos_embed")
    assert table.data_location == onnx.TensorProto.EXTERNAL
    assert list(table.dims) == [1, sd3.LARGEST**2, 16]


def test_no_table_of_positions_is_computed_where_the_model_is_only_traced(model: Path) -> None:
    config = SD3Transformer2DModel.load_config(model / "transformer")
    with torch.device("meta"):
        ours = transformer({**config, "pos_embed_max_size": 384})
        theirs = SD3Transformer2DModel.from_config({**config, "pos_embed_max_size": 384})
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    assert not list(ours.buffers())


def test_a_reduced_model_has_the_blocks_of_the_large_one_and_passes_parity(model: Path) -> None:
    small, guides = _family(model).reduced({})
    step, whole = (family.sources()["denoiser"].build() for family in (small, _family(model)))
    assert {type(module) for module in step.modules()} == {type(module) for module in whole.modules()}
    stored, dtypes = (dict.fromkeys(("text_encoder_3", "denoiser"), dtype) for dtype in ("F16", "float32"))
    results = large.check_reduced(small, guides, stored, dtypes)
    assert [item.graph for item in results] == list(stored)


def test_tensorrt_rtx_takes_every_graph_in_float16(model: Path, tmp_path: Path) -> None:
    fidelity.check_rtx(fidelity.make(model, tmp_path / "made", **RECIPE, rtx=True))


# --- what a build asks ----------------------------------------------------------------------------------------------


def test_the_files_that_decide_what_is_built_are_named(model: Path) -> None:
    found = {str(path.relative_to(model)) for path in _family(model).files()}
    folders = [path for path in model.iterdir() if path.is_dir()]
    kept = {str(path.relative_to(model)) for folder in folders for path in folder.iterdir() if path.suffix == ".json"}
    assert found == {"model_index.json", *kept}


def test_t5_computes_in_float32_instead_of_float16(model: Path) -> None:
    family = _family(model)
    assert {kind for kind in family.components if family.dtype(kind, "float16") != "float16"} == {"text_encoder_3"}
    assert {family.dtype(kind, "bfloat16") for kind in family.components} == {"bfloat16"}


def test_the_prompt_takes_as_many_tokens_as_in_diffusers_by_default(model: Path) -> None:
    tokens = _family(model, prompt_tokens=None).tokenizers()["tokenizer_3"].max_length
    assert tokens == inspect.signature(StableDiffusion3Pipeline.__call__).parameters["max_sequence_length"].default


def test_without_t5_a_graph_is_made_anew_for_another_number_of_zeros(model_without_t5: Path) -> None:
    """Which its inputs do not show."""
    keys = set()
    for tokens in (None, TOKENS, 12):
        family, work = _family(model_without_t5, prompt_tokens=tokens), object.__new__(_Exporter)
        work.family, work.guides = family, {}
        work.inputs = Inputs(family.recipe, model_without_t5, family, {}, {}, {}, {})  # type: ignore[attr-defined]
        keys.add(work._graph_key("denoiser.all", family.sources()["denoiser"]))
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusion3InpaintPipeline"},
            "StableDiffusion3InpaintPipeline is not supported; supported pipelines: .*StableDiffusion3Pipeline",
        ),
        (
            "model_index.json",
            {"text_encoder_2": [None, None]},
            "model_index.json has no text_encoder_2; both CLIP encoders are needed",
        ),
        (
            "transformer/config.json",
            {"in_channels": 33},
            "takes 33 channels, and the VAE's latents have 16; models that inpaint or edit are not supported",
        ),
    ],
)
def test_models_that_make_no_images_from_prompts_alone_are_refused(
    model: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        _family(parts.altered(model, tmp_path, file, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 18}, "height: 18 is not a multiple of 4, as this model needs; try 16$"),
        ({"width": 52}, "width: 52 is more than 48, the largest side for this model$"),
        ({"sizes": ((16, 16), (100, 48))}, r"sizes\[1\]: 100 is more than 48"),
        ({"sides": (16, 64)}, "sides: 64 is more than 48"),
    ],
)
def test_sizes_that_the_table_of_positions_does_not_have_are_refused(
    model: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        _family(model, **changes).image()
    assert _family(model, sizes=((48, 48), (4, 48))).image().sizes == ((48, 48), (4, 48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": 513}, "prompt_tokens: 513; this model takes at most 512"),
        ({"guidance": Guidance("embedded")}, "this model takes no guidance scale itself"),
        ({"phases": (Phase("all", (1,), guide="guide.safetensors"),)}, "guides are for UNets"),
    ],
)
def test_recipes_that_ask_for_what_the_model_has_not_are_refused(
    model: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        _family(model, **changes)

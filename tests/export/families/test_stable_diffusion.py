"""Stable Diffusion's graphs, before they are traced: compared with diffusers' pipeline, scheduler and processors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from glance_trt.errors import ModelError, RecipeError
from glance_trt.export.families import from_recipe, open_model
from glance_trt.export.model import Model
from glance_trt.export.modules import Decoder, TextEncoder, UNetStep
from glance_trt.recipe import Guidance, Recipe
from glance_trt.schedule import compile_schedule

from ...models import parts
from . import fidelity

Make = Callable[..., Recipe]
TEACHER_STEPS = 10


@pytest.fixture(scope="module")
def unet(tiny_model: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_model / "unet", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Two latents and their embeddings."""
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "prompt_embeds": torch.randn(2, 32, 16, generator=generator),
        "negative_prompt_embeds": torch.randn(2, 32, 16, generator=generator),
    }


def _table(tiny_model: Path) -> tuple[DDIMScheduler, list[Any]]:
    """The scheduler as the pipeline has it, and our table for the same steps."""
    scheduler = DDIMScheduler.from_pretrained(tiny_model / "scheduler")
    scheduler.set_timesteps(TEACHER_STEPS)
    config = {"_class_name": "DDIMScheduler", **scheduler.config}
    steps = compile_schedule(config, [("all", range(1, TEACHER_STEPS + 1))], teacher_steps=TEACHER_STEPS).steps
    return scheduler, list(steps)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("step", [0, 4, TEACHER_STEPS - 1])
def test_a_guided_step_is_diffusers_prediction_guidance_and_update(
    tiny_model: Path, unet: UNet2DConditionModel, batch: dict[str, torch.Tensor], rescale: float, step: int
) -> None:
    scheduler, table = _table(tiny_model)
    timestep, latents = scheduler.timesteps[step], batch["latents"]
    coefficients = torch.tensor([table[step].c_in, table[step].a, table[step].b])
    with torch.no_grad():
        found = UNetStep(unet, "cfg", rescale)(
            latents,
            torch.tensor(table[step].timestep),
            coefficients,
            torch.tensor(4.5),
            batch["prompt_embeds"],
            batch["negative_prompt_embeds"],
        )
        embeds = torch.cat([batch["negative_prompt_embeds"], batch["prompt_embeds"]])
        both = unet(torch.cat([latents] * 2), timestep, embeds).sample
    unconditional, conditional = both.chunk(2)
    noise = unconditional + 4.5 * (conditional - unconditional)
    if rescale:
        noise = rescale_noise_cfg(noise, conditional, rescale)
    expected = scheduler.step(noise, timestep, latents).prev_sample
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_step_without_guidance_is_one_prediction_and_the_update(
    tiny_model: Path, unet: UNet2DConditionModel, batch: dict[str, torch.Tensor]
) -> None:
    scheduler, table = _table(tiny_model)
    timestep, latents = scheduler.timesteps[3], batch["latents"]
    with torch.no_grad():
        found = UNetStep(unet)(
            latents,
            torch.tensor(table[3].timestep),
            torch.tensor([table[3].c_in, table[3].a, table[3].b]),
            batch["prompt_embeds"],
        )
        noise = unet(latents, timestep, batch["prompt_embeds"]).sample
    expected = scheduler.step(noise, timestep, latents).prev_sample
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_guidance_none_traces_a_step_without_negative_embeddings(tiny_model: Path, make_recipe: Make) -> None:
    guided = open_model(Model(tiny_model, "tiny"), make_recipe()).sources()["denoiser"]
    plain = open_model(Model(tiny_model, "tiny"), make_recipe(guidance=Guidance("none"))).sources()["denoiser"]
    assert (plain.build().guidance, guided.build().guidance) == ("none", "cfg")
    names = ["latents", "timestep", "coefficients", "prompt_embeds"]
    assert [port.name for port in plain.inputs] == names
    assert [port.name for port in guided.inputs] == [*names[:3], "guidance_scale", *names[3:], "negative_prompt_embeds"]


def test_the_decoder_makes_the_pixels_of_diffusers(tiny_model: Path, batch: dict[str, torch.Tensor]) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_model / "vae", dtype=torch.float32).eval()
    with torch.no_grad():
        image = vae.decode(batch["latents"] / vae.config.scaling_factor).sample
        found = Decoder(vae)(batch["latents"])
    images = VaeImageProcessor(vae_scale_factor=2).postprocess(image, output_type="np")
    expected = torch.from_numpy((images * 255).round().astype("uint8"))
    assert found.dtype == torch.uint8
    assert found.shape == (2, 16, 16, 3)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert found.float().std() > 5


def test_the_text_encoder_makes_the_embeddings_of_diffusers(tiny_model: Path, make_recipe: Make) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    prompt = "a large red circle"
    item = open_model(Model(tiny_model, "tiny"), make_recipe()).tokenizers()["tokenizer"]
    ids = pipe.tokenizer(prompt).input_ids
    padded = torch.tensor([ids + [item.pad_token_id] * (item.max_length - len(ids))])
    with torch.no_grad():
        found = TextEncoder(pipe.text_encoder)(padded)
        expected, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_the_scheduler_is_corrected_as_the_pipeline_corrects_it(
    tiny_model: Path, make_recipe: Make, tmp_path: Path
) -> None:
    """StableDiffusionPipeline sets steps_offset to 1 and clip_sample to off in configurations of its first year."""
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    old = json.loads(file.read_text()) | {"clip_sample": True, "steps_offset": 0}
    file.write_text(json.dumps(old))
    corrected = StableDiffusionPipeline.from_pretrained(tmp_path / "model").scheduler.config
    changed = make_recipe(scheduler="EulerDiscreteScheduler")
    found = open_model(Model(tmp_path / "model", "tiny"), changed).scheduler_config()
    assert (found["steps_offset"], found["clip_sample"]) == (corrected["steps_offset"], corrected["clip_sample"])
    assert found["_class_name"] == "EulerDiscreteScheduler"
    assert found["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(("key", "size", "near"), [("height", 18, 16), ("width", 23, 24), ("width", 1, 4)])
def test_a_size_that_is_no_multiple_is_refused_with_the_nearest_one(
    tiny_model: Path, make_recipe: Make, key: str, size: int, near: int
) -> None:
    with pytest.raises(RecipeError, match=rf"{key}: {size} is not a multiple of 4, as this model needs; try {near}$"):
        open_model(Model(tiny_model, "tiny"), make_recipe(**{key: size})).image()


def test_a_number_of_tokens_is_refused_where_the_text_encoder_has_its_own(tiny_model: Path, make_recipe: Make) -> None:
    text = r"^prompt_tokens: this model's text encoder leaves no choice; leave the key out$"
    with pytest.raises(RecipeError, match=text):
        open_model(Model(tiny_model, "tiny"), make_recipe(prompt_tokens=64))


def test_the_image_is_described_by_the_models_own_factors(tiny_model: Path, make_recipe: Make) -> None:
    image = open_model(Model(tiny_model, "tiny"), make_recipe(height=24, width=16)).image()
    vae = AutoencoderKL.from_pretrained(tiny_model / "vae")
    assert vae.encode(torch.zeros(1, 3, 24, 16)).latent_dist.mean.shape[1:] == image.latent_shape


def _without(tiny_model: Path, folder: Path, name: str, text: str | None) -> Path:
    shutil.copytree(tiny_model, folder / "model")
    file = folder / "model" / name
    file.unlink()
    if text is not None:
        file.write_text(text)
    return folder / "model"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("model_index.json", None, "not a diffusers pipeline folder, it has no model_index.json"),
        ("model_index.json", "{", "model_index.json: not readable"),
        ("model_index.json", "[]", "model_index.json: expected a JSON object"),
        (
            "model_index.json",
            '{"_class_name": "KolorsPipeline"}',
            "KolorsPipeline is not supported; supported pipelines: StableDiffusionPipeline",
        ),
        ("model_index.json", "{}", "model_index.json has no _class_name; supported: StableDiffusionPipeline, "),
        ("model_index.json", '{"_class_name": ["a"]}', "model_index.json has no _class_name; supported: "),
        ("unet/config.json", None, "unet: missing, with its config.json"),
        ("unet/config.json", '{"addition_embed_type": "text_time"}', "a UNet with class or added embeddings is not"),
        ("scheduler/scheduler_config.json", None, "scheduler: missing, with its scheduler_config.json"),
        ("tokenizer/tokenizer.json", "{", "tokenizer: not a readable CLIPTokenizer"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(
    tiny_model: Path, make_recipe: Make, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    model = _without(tiny_model, tmp_path, name, text)

    def read_all() -> None:
        family = open_model(Model(model, "tiny"), make_recipe())
        family.scheduler_config()
        family.tokenizers()

    with pytest.raises(ModelError, match=message):
        read_all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"controlnet": ["diffusers", "ControlNetModel"]},
            "controlnet is no part of stable-diffusion, which has scheduler, text_encoder, tokenizer, unet, vae$",
        ),
        ({"vae": [None, None]}, "model_index.json has no vae$"),
        ({"text_encoder": [None, None]}, "model_index.json has no text_encoder$"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "the vae is a AutoencoderTiny; expected a AutoencoderKL$"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "the unet is a UNet3DConditionModel; expected a UNet2D"),
    ],
)
def test_a_pipeline_of_other_parts_is_refused(
    tiny_model: Path, make_recipe: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = parts.altered(tiny_model, tmp_path, "model_index.json", **changes)
    with pytest.raises(ModelError, match=rf"altered: {message}"):
        open_model(Model(model, "tiny"), make_recipe())


def test_parts_that_make_no_images_are_not_asked_for(tiny_model: Path, make_recipe: Make, tmp_path: Path) -> None:
    changes = {"image_encoder": ["transformers", "CLIPVisionModel"], "safety_checker": ["x", "Y"]}
    model = parts.altered(tiny_model, tmp_path, "model_index.json", **changes)
    assert open_model(Model(model, "tiny"), make_recipe()).components.keys() == {"text_encoder", "denoiser", "decoder"}


def test_a_missing_tokenizer_is_known_without_reading_one(tiny_model: Path, make_recipe: Make, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer"))
    with pytest.raises(ModelError, match=r"model/tokenizer: missing, with its tokenizer\.json; copy"):
        open_model(Model(tmp_path / "model", "tiny"), make_recipe()).files()


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path, make_recipe: Make) -> None:
    with pytest.raises(ModelError, match=r"no: no such folder, and no id of a model on the Hub"):
        from_recipe(make_recipe(model="no"), tmp_path)
    (tmp_path / "file").touch()
    text = r"file: not a model; expected a folder in diffusers' layout, or a \.safetensors file"
    with pytest.raises(ModelError, match=text):
        from_recipe(make_recipe(model="file"), tmp_path)


def test_a_scheduler_for_another_kind_of_model_is_refused(tiny_model: Path, make_recipe: Make) -> None:
    family = open_model(Model(tiny_model, "tiny"), make_recipe(scheduler="FlowMatchEulerDiscreteScheduler"))
    text = "the scheduler is a FlowMatchEulerDiscreteScheduler, and this model was trained for diffusion; .* DDIMS"
    with pytest.raises(ModelError, match=text):
        family.scheduler_config()


def test_every_part_computes_in_the_dtype_that_a_target_wants(tiny_model: Path, make_recipe: Make) -> None:
    config = json.loads((tiny_model / "vae" / "config.json").read_text())
    assert config["force_upcast"] is True, "as diffusers writes it, whose own pipeline of this family does not heed it"
    family = open_model(Model(tiny_model, "tiny"), make_recipe())
    for wanted in ("float32", "float16", "bfloat16"):
        assert {family.dtype(kind, wanted) for kind in family.components} == {wanted}


def test_the_files_that_decide_what_is_built_are_named(tiny_model: Path, make_recipe: Make) -> None:
    found = {str(path.relative_to(tiny_model)) for path in open_model(Model(tiny_model, "tiny"), make_recipe()).files()}
    tokenizer = {f"tokenizer/{path.name}" for path in (tiny_model / "tokenizer").iterdir()}
    configs = {f"{part}/config.json" for part in ("text_encoder", "unet", "vae")}
    assert found == {"model_index.json", "scheduler/scheduler_config.json", *configs, *tokenizer}
    assert "tokenizer/tokenizer_config.json" in found


def test_an_adapter_is_known_and_sent_to_another_process_without_pytorch(tiny_model: Path) -> None:
    code = f"""
import pickle, sys
from pathlib import Path
from glance_trt.export.families import from_recipe
from glance_trt.recipe import Phase, Recipe
plan = Recipe("tiny", {tiny_model.name!r}, (Phase("all", (1,)),), 16, 16)
family = from_recipe(plan, Path({str(tiny_model.parent)!r}))
pickle.loads(pickle.dumps(family)).sources()["denoiser"].inputs
print("torch" in sys.modules, "diffusers" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "False False\n"


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_images_are_those_of_diffusers(
    tiny_model: Path, tmp_path: Path, traced: Any, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    monkeypatch.setattr("glance_trt.export.trace.trace", traced)
    guidance = {"scale": 3.0, "rescale": 0.7, "negative_prompt": "blue"}
    sizes = {"height": 16, "width": 16, "sizes": [[24, 16]]}
    made = fidelity.make(tiny_model, tmp_path, scheduler=scheduler, guidance=guidance, **sizes)
    fidelity.check_graphs(made)
    fidelity.check_images(made)


def test_guidance_inside_needs_a_guide_in_every_phase(tiny_model: Path, make_recipe: Make) -> None:
    text = r"phases\[0\]\.guide: missing; guidance\.mode embedded needs one in every phase, for this model takes no"
    with pytest.raises(RecipeError, match=text):
        open_model(Model(tiny_model, "tiny"), make_recipe(guidance=Guidance("embedded")))

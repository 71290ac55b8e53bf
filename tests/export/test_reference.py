"""The images that bundles are compared with: diffusers' own, of the recipe's steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

from glance_trt.errors import ModelError, RecipeError
from glance_trt.export import reference
from glance_trt.export.reference import DiffusersReference, on_knots
from glance_trt.recipe import Guidance, Lora, Phase, Recipe
from glance_trt.verify import psnr

from ..models import sdxl
from .families import fidelity

Make = Callable[..., Recipe]

SLOW, FAST = (1, 3, 5, 7, 9), (11, 21, 31, 41, 50)
QWEN = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}
MU = 0.69355  # at 1024 x 1024


def _glance(make_recipe: Make, **changes: Any) -> Recipe:
    """The paper's steps."""
    return replace(make_recipe(**changes), phases=(Phase("slow", SLOW), Phase("fast", FAST)), guidance=Guidance("none"))


def _set(plan: Recipe, mu: float) -> Any:
    """Qwen-Image's scheduler, as its pipeline sets it."""
    scheduler = on_knots(FlowMatchEulerDiscreteScheduler(**QWEN), plan)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 50, 50), mu=mu)
    return scheduler


def test_flow_matching_goes_from_knot_to_knot(make_recipe: Make) -> None:
    """The numbers are those of Glance's grid for Qwen-Image."""
    scheduler = _set(_glance(make_recipe), MU)
    timesteps = [1000, 979.1915, 957.5157, 934.9171, 911.3354, 886.7053, 745.0728, 562.9505, 320.0802, 20]
    assert scheduler.timesteps.tolist() == pytest.approx(timesteps, abs=2e-3)
    strides = [-0.0208, -0.0217, -0.0226, -0.0236, -0.0246, -0.1416, -0.1821, -0.2429, -0.3001, -0.0200]
    assert scheduler.sigmas.diff().tolist() == pytest.approx(strides, abs=1e-4)


@pytest.mark.parametrize("mu", [MU, 0.55])
def test_the_released_sampler_restarts_on_a_grid_of_its_own_in_every_phase(make_recipe: Make, mu: float) -> None:
    """What Glance's released code does: timesteps of 1024 x 1024 at every size, in bfloat16; the slow phase ends at
    0.946, and the fast one begins at 1 again."""
    scheduler = _set(_glance(make_recipe, sampler="released"), mu)
    assert scheduler.timesteps.tolist() == [1000, 980, 956, 936, 912, 888, 744, 564, 320, 20]
    strides = scheduler.sigmas.diff()
    plain = FlowMatchEulerDiscreteScheduler(**QWEN)
    for taken, count in ((strides[:5], 50), (strides[5:], 5)):
        plain.set_timesteps(sigmas=np.linspace(1, 1 / count, count), mu=mu)
        assert torch.allclose(taken, plain.sigmas.diff()[:5], atol=1e-6)
    assert float(strides[5:].sum()) == pytest.approx(-1.0, abs=1e-6)
    if mu == MU:
        assert float(strides.sum()) == pytest.approx(-1.054, abs=1e-3)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_of_all_steps_without_loras_the_images_are_the_pipelines_own(
    tiny_model: Path, make_recipe: Make, scheduler: str
) -> None:
    guidance = Guidance(scale=3.0, rescale=0.7, negative_prompt="blue")
    plan = make_recipe(model=tiny_model.name, guidance=guidance, scheduler=scheduler, teacher_steps=5)
    phases = (Phase("slow", (1, 2)), Phase("fast", (3, 4, 5)))
    found = DiffusersReference(replace(plan, phases=phases), tiny_model.parent).generate("a red circle", [7, 8], 24, 16)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    for seed, image in zip((7, 8), found, strict=True):
        noise = torch.randn([1, 4, 12, 8], generator=torch.Generator("cpu").manual_seed(seed))
        (expected,) = pipe(
            "a red circle",
            negative_prompt="blue",
            height=24,
            width=16,
            latents=noise,
            num_inference_steps=5,
            guidance_scale=3.0,
            guidance_rescale=0.7,
            output_type="np",
        ).images
        assert image.shape == (24, 16, 3)
        assert np.abs(image - expected * 255).max() <= 1


@pytest.mark.parametrize("kind", reference._PIPELINES)
@pytest.mark.parametrize("mode", ["none", "cfg", "embedded"])
def test_every_argument_is_one_that_the_pipeline_takes(make_recipe: Make, kind: str, mode: Any) -> None:
    known = inspect.signature(getattr(diffusers, kind).__call__).parameters
    arguments = reference._arguments(kind, make_recipe(guidance=Guidance(mode, 3.5)))
    assert arguments.keys() <= known.keys()
    assert [name for name, value in arguments.items() if value == 3.5] == {
        "none": [],
        "cfg": ["guidance_scale" if kind.startswith("Stable") else "true_cfg_scale"],
        "embedded": ["guidance_scale"],
    }[mode]
    assert ("negative_prompt" in arguments) == (mode == "cfg")


def test_a_fused_reference_has_the_loras_of_text_encoders_too(make_recipe: Make, tmp_path: Path) -> None:
    model = sdxl.make(tmp_path / "model")
    encoders = ("text_encoder", "text_encoder_2")
    for phase in ("slow", "fast"):
        fidelity.write_lora(model, tmp_path / f"{phase}.safetensors", encoders=encoders, seed=1)
    fidelity.write_lora(model, tmp_path / "denoiser.safetensors", seed=1)
    plan = make_recipe(guidance=Guidance(scale=3.0), teacher_steps=4)

    def generate(*files: str, fused: bool = False) -> Any:
        phases = tuple(
            Phase(name, steps, Lora(f"{file}.safetensors") if file else None)
            for name, steps, file in zip(("slow", "fast"), ((1, 2), (3, 4)), files, strict=True)
        )
        return DiffusersReference(replace(plan, phases=phases), tmp_path, fused=fused).generate("a red circle", [7, 8])

    expected = generate("slow", "fast")
    assert psnr(generate("slow", "fast", fused=True), expected) >= 50
    assert psnr(generate("slow", "denoiser"), expected) >= 50, "a prompt is encoded once"
    assert psnr(generate("denoiser", "fast"), expected) >= 50, "whichever phase's file has them"
    assert psnr(generate("denoiser", "denoiser"), expected) < 45


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"guidance": Guidance(scale=0.5)},
            r"^guidance.scale: diffusers guides by more than 1 only, and this is 0.5; ",
        ),
        (
            {"scheduler": "PNDMScheduler"},
            "^model: whole images are compared for DDIMScheduler, EulerDiscreteScheduler, "
            "FlowMatchEulerDiscreteScheduler only; this is PNDMScheduler$",
        ),
        (
            {"scheduler": "EulerDiscreteScheduler", "sampler": "released"},
            "^sampler: 'released' is not known for EulerDiscreteScheduler; use 'consistent'$",
        ),
    ],
)
def test_what_diffusers_cannot_do_is_refused(
    tiny_model: Path, make_recipe: Make, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        DiffusersReference(make_recipe(**changes), tiny_model.parent)


def test_guidance_that_a_pipeline_does_not_rescale_is_refused(make_recipe: Make) -> None:
    with pytest.raises(
        RecipeError, match=r"^guidance\.rescale: StableDiffusion3Pipeline has none; whole images cannot"
    ):
        reference._arguments("StableDiffusion3Pipeline", make_recipe())


def test_a_pipeline_of_another_kind_is_refused(make_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    with pytest.raises(
        ModelError, match="model: KolorsPipeline is not supported; supported pipelines: StableDiffusion"
    ):
        DiffusersReference(make_recipe(), tmp_path)

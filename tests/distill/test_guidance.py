"""Training on the guided prediction, against classifier-free guidance by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from glance_trt.distill import fitting
from glance_trt.distill.data import Examples
from glance_trt.distill.ground_truth import Knots, knots_of
from glance_trt.distill.guidance import guidance_loss
from glance_trt.distill.student import Parts, Student
from glance_trt.distill.teacher import Teacher
from glance_trt.recipe import Distill, Guidance

MakeTeacher = Callable[..., Teacher]


@pytest.fixture
def every(scheduler_config: Mapping[str, Any]) -> Knots:
    """All timesteps."""
    return knots_of({**scheduler_config, "steps_offset": 0}, 1000, tuple(range(1, 1001)))


@pytest.fixture
def negative() -> torch.Tensor:
    return torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def make_teacher(
    unet: UNet2DConditionModel, scheduler_config: Mapping[str, Any], negative: torch.Tensor
) -> MakeTeacher:
    def make(guidance: Guidance) -> Teacher:
        return Teacher(unet, scheduler_config, 10, guidance, negative)

    return make


def settings(**changes: Any) -> Distill:
    given = {"prompt": "a star", "rank": 4, "alpha": 16.0, "steps": 40, "learning_rate": 0.02, "batch_size": 4}
    return Distill(**{**given, **changes})


def parts(lora: bool = False, guide: bool = False) -> Parts:
    return Parts(Path("x.safetensors") if lora else None, Path("x.guide.safetensors") if guide else None)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_the_first_loss_is_the_distance_of_the_conditional_from_the_guided_prediction(
    rescale: float,
    unet: UNet2DConditionModel,
    make_teacher: MakeTeacher,
    every: Knots,
    examples: Examples,
    negative: torch.Tensor,
    scheduler_config: Mapping[str, Any],
) -> None:
    teacher = make_teacher(Guidance(scale=4.0, rescale=rescale))
    student = Student(unet, parts(lora=True), settings(), 0)
    ((loss, timesteps),) = guidance_loss(student, teacher, examples, every, settings=settings())(
        torch.Generator().manual_seed(3)
    )
    student.remove()

    replay = torch.Generator().manual_seed(3)
    chosen, _ = torch.randint(1000, (4,), generator=replay), torch.rand(4, generator=replay)
    noise, rows = torch.randn(4, 4, 8, 8, generator=replay), torch.randint(3, (4,), generator=replay)
    times = torch.tensor(timesteps).long()
    assert torch.equal(times, every.timesteps[chosen].long())
    reference = diffusers.DDIMScheduler.from_config(scheduler_config)
    sample = reference.add_noise(examples.latents[rows], noise, times)
    embeds = examples.embeds[torch.tensor([0, 1, 0])[rows]]
    with torch.no_grad():
        conditional = unet(sample, times, embeds).sample
        without = unet(sample, times, negative.expand(4, -1, -1)).sample
    guided = without + 4.0 * (conditional - without)
    if rescale:
        guided = rescale_noise_cfg(guided, conditional, rescale)
    torch.testing.assert_close(loss, F.mse_loss(conditional, guided), rtol=1e-4, atol=1e-6)


def test_all_timesteps_of_the_model_are_trained_on(every: Knots, scheduler_config: Mapping[str, Any]) -> None:
    reference = diffusers.DDIMScheduler.from_config(scheduler_config)
    times = every.timesteps.long()
    assert times.sort().values.tolist() == list(range(1000))
    torch.testing.assert_close(every.alphas_cumprod, reference.alphas_cumprod[times], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("lora", "kind", "share"), [(True, None, 0.6), (True, "embedding", 0.9), (False, "full", 0.9)])
def test_training_lowers_the_loss_on_fresh_noise(
    lora: bool,
    kind: Any,
    share: float,
    unet: UNet2DConditionModel,
    make_teacher: MakeTeacher,
    every: Knots,
    examples: Examples,
    tmp_path: Path,
) -> None:
    chosen = settings(**({"guide": kind} if kind else {}))
    student = Student(unet, parts(lora, kind is not None), chosen, 0)
    teacher = make_teacher(Guidance(scale=4.0))

    def fresh() -> float:
        loss_of_step = guidance_loss(student, teacher, examples, every, settings=settings(batch_size=64))
        with torch.no_grad():
            (loss,) = loss_of_step(torch.Generator().manual_seed(99))
            return float(loss.value)

    before = fresh()
    loss_of_step = guidance_loss(student, teacher, examples, every, settings=chosen)
    fitting.fit("x", student, loss_of_step, chosen, identity={}, work=tmp_path)
    assert fresh() < share * before


class Scales:
    """Stands for a teacher: keeps the scales that it is asked for."""

    def __init__(self) -> None:
        self.guidance, self.asked = Guidance(scale=4.0), torch.empty(0)

    def predict(self, sample: Any, timestep: Any, embeds: Any, scale: Any) -> Any:
        self.asked = scale
        return sample


@pytest.mark.parametrize("has_guide", [True, False])
def test_a_guide_meets_all_scales_of_the_range_and_a_lora_the_teachers(
    has_guide: bool, recorder: Any, every: Knots, examples: Examples
) -> None:
    recorder.off, recorder.guide = torch.no_grad, object() if has_guide else None
    teacher: Any = Scales()
    wide = settings(batch_size=4000, scales=(2.0, 9.0))
    list(guidance_loss(recorder, teacher, examples, every, settings=wide)(torch.Generator().manual_seed(0)))
    scales = recorder.calls[0][3]
    assert torch.equal(scales, teacher.asked)
    if has_guide:
        assert 2 <= scales.min() < 2.05
        assert 8.95 < scales.max() <= 9
        assert scales.histc(7, 2, 9).tolist() == pytest.approx([4000 / 7] * 7, rel=0.15)
    else:
        assert set(scales.tolist()) == {4.0}

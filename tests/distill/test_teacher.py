"""The teacher's trajectories: diffusers' own latents, kept in files from which an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from glance_trt.distill import data, teacher
from glance_trt.distill.base import Base
from glance_trt.distill.teacher import Teacher
from glance_trt.errors import TrainingError
from glance_trt.recipe import Guidance

from .conftest import by_diffusers

PROMPT = "a red circle"
SHAPE = (4, 8, 8)


def a_teacher(base: Base, config: Mapping[str, Any], guidance: Guidance, steps: int, precision: str = "float32") -> Any:
    negative = data.encode_captions(base, (guidance.negative_prompt,))
    return Teacher(base.unet, config, steps, guidance, negative, precision)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("guidance", [Guidance(scale=3.0, rescale=0.7, negative_prompt="blue"), Guidance(mode="none")])
def test_a_rollout_is_what_diffusers_pipeline_samples(
    guidance: Guidance,
    scheduler: str,
    base: Base,
    pipeline: StableDiffusionPipeline,
    scheduler_config: Mapping[str, Any],
) -> None:
    config = {**scheduler_config, "_class_name": scheduler}
    if scheduler == "EulerDiscreteScheduler":  # from a finite first sigma
        config["rescale_betas_zero_snr"] = False
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(config)
    during: list[Tensor] = []

    def keep(*call: Any) -> dict[str, Any]:
        during.append(call[3]["latents"])
        return {}

    expected = by_diffusers(pipeline, PROMPT, guidance, (5, 6), output_type="latent", callback_on_step_end=keep)
    embeds = data.encode_captions(base, (PROMPT,)).expand(2, -1, -1)
    made = a_teacher(base, config, guidance, 10)
    states = list(made.rollout(teacher.noise_of([5, 6], SHAPE), embeds, torch.full((2,), guidance.scale)))
    assert len(states) == 11
    for state, wanted in zip(states[1:], during, strict=True):
        torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[-1], expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(states[-1][0], states[-1][1])


def test_each_sample_has_its_own_guidance_scale_and_timestep(base: Base, scheduler_config: Mapping[str, Any]) -> None:
    made = a_teacher(base, scheduler_config, Guidance(negative_prompt="blue"), 3)
    generator = torch.Generator().manual_seed(0)
    sample, embeds = torch.randn(3, *SHAPE, generator=generator), torch.randn(3, 5, 16, generator=generator)
    made._negative = torch.randn(1, 5, 16, generator=generator)
    timesteps, scales = torch.tensor([999.0, 500.0, 0.0]), torch.tensor([1.0, 4.0, 9.0])
    together = made.predict(sample, timesteps, embeds, scales)
    for i in range(3):
        with torch.no_grad():
            with_ = base.unet(sample[i : i + 1], timesteps[i], embeds[i : i + 1]).sample
            without = base.unet(sample[i : i + 1], timesteps[i], made._negative).sample
        expected = without + scales[i] * (with_ - without)
        torch.testing.assert_close(together[i : i + 1], expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_float32_and_returns_float32(base: Base, scheduler_config: Mapping[str, Any]) -> None:
    noise, embeds, scale = teacher.noise_of([0], SHAPE), data.encode_captions(base, (PROMPT,)), torch.ones(1)
    exact, rounded = (
        a_teacher(base, scheduler_config, Guidance(), 3, precision).predict(noise, torch.tensor(500), embeds, scale)
        for precision in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


class Sampling:
    """Eighteen trajectories of three steps, in two files; counts the predictions."""

    def __init__(self, base: Base, config: Mapping[str, Any], work: Path) -> None:
        self.teacher, self.work, self.predictions = a_teacher(base, config, Guidance(), 3), work, 0
        self.captions = tuple(f"number {i}" for i in range(18))
        self.embeds = data.encode_captions(base, self.captions)
        self.scales = torch.linspace(1, 9, 18)
        self.calls: list[tuple[str, float, float]] = []
        predict = self.teacher.predict

        def counted(*inputs: Tensor) -> Tensor:
            self.predictions += 1
            return predict(*inputs)

        self.teacher.predict = counted

    def sample(self, **changes: Any) -> Tensor:
        """`teacher.trajectories`, and how many predictions it made."""
        self.predictions, self.calls = 0, []
        options = {
            **{"captions": self.captions, "embeds": self.embeds, "scales": self.scales},
            **{"seed": 7, "shape": SHAPE, "keep": [0, 2, 3], "model": "x"},
        }
        return teacher.trajectories(
            self.teacher,
            **{**options, **changes},
            folder=self.work,
            progress=lambda *call: self.calls.append(call),
        )

    @property
    def files(self) -> list[Path]:
        return sorted(self.work.rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)


@pytest.fixture
def sampling(base: Base, scheduler_config: Mapping[str, Any], tmp_path: Path) -> Sampling:
    return Sampling(base, scheduler_config, tmp_path)


def test_trajectories_keep_the_states_that_they_are_asked_for(sampling: Sampling) -> None:
    states = sampling.sample()
    assert states.shape == (18, 3, *SHAPE)
    for row in (0, 15, 16, 17):
        noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(7 + row))
        rollout = list(sampling.teacher.rollout(noise, sampling.embeds[row : row + 1], sampling.scales[row : row + 1]))
        for kept, index in enumerate((0, 2, 3)):
            torch.testing.assert_close(states[row, kept], rollout[index][0], rtol=1e-4, atol=1e-5)
    assert sampling.calls == [("sample", 0, 18), ("sample", 16, 18), ("sample", 18, 18)]


def test_sampling_goes_on_from_its_files(sampling: Sampling) -> None:
    states = sampling.sample()
    assert sampling.predictions == 2 * 3
    assert len(sampling.files) == 2
    assert torch.equal(sampling.sample(), states)
    assert sampling.predictions == 0
    sampling.files[1].unlink()
    assert torch.equal(sampling.sample(), states)
    assert sampling.predictions == 3
    assert len(sampling.files) == 2


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"\0" * 64])
def test_a_damaged_file_is_named(damage: Any, sampling: Sampling) -> None:
    states = sampling.sample()
    file = sampling.files[1]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(TrainingError, match=rf"{file.name}: not readable: .*; delete it, and it is sampled again"):
        sampling.sample()
    file.unlink()
    assert torch.equal(sampling.sample(), states)


@pytest.mark.parametrize("changes", [{"model": "y"}, {"seed": 8}, {"scales": torch.ones(18)}, {"shape": (4, 8, 16)}])
def test_trajectories_of_another_kind_are_sampled_anew(changes: dict[str, Any], sampling: Sampling) -> None:
    first = sampling.sample()
    other = sampling.sample(**changes)
    assert sampling.predictions == 2 * 3
    assert len(sampling.files) == 4
    assert other.shape[2:] == changes.get("shape", SHAPE)
    assert torch.equal(sampling.sample(), first)
    assert sampling.predictions == 0


def test_trajectories_are_found_again_by_whoever_needs_other_states_or_fewer(sampling: Sampling) -> None:
    states = sampling.sample()
    assert torch.equal(sampling.sample(keep=[0, 1, 3])[:, [0, 2]], states[:, [0, 2]])
    assert sampling.predictions == 0
    first = {key: getattr(sampling, key)[:16] for key in ("captions", "embeds", "scales")}
    assert torch.equal(sampling.sample(**first), states[:16])
    assert sampling.predictions == 0


def test_trajectories_of_another_teacher_are_its_own(
    base: Base, scheduler_config: Mapping[str, Any], sampling: Sampling
) -> None:
    sampling.sample()
    sampling.teacher = a_teacher(base, scheduler_config, Guidance(negative_prompt="a blur"), 3)
    sampling.sample()
    assert len(sampling.files) == 4

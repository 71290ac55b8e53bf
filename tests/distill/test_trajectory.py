"""Training on the teacher's trajectories: what is aimed at, and where each jump starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from glance_trt.distill import fitting, teacher
from glance_trt.distill.student import Parts, Student
from glance_trt.distill.teacher import Teacher, advance, inputs_of
from glance_trt.distill.trajectory import Trajectories, through, trajectory_loss
from glance_trt.recipe import Distill, Guidance
from glance_trt.schedule import Step, compile_schedule

MakeData = Callable[..., Trajectories]

KNOTS = (1, 3, 6)


def settings(**changes: Any) -> Distill:
    return Distill(prompt="a star", **{"batch_size": 4, **changes})


@pytest.fixture
def make_data(unet: UNet2DConditionModel, scheduler_config: Mapping[str, Any]) -> MakeData:
    """Six trajectories of a teacher of 8 steps: its states at the `knots`, and at the end."""

    def make(guidance: Guidance, knots: tuple[int, ...]) -> Trajectories:
        generator = torch.Generator().manual_seed(1)
        embeds, negative = torch.randn(2, 3, 16, generator=generator), torch.randn(1, 3, 16, generator=generator)
        caption, scales = torch.tensor([0, 1, 0, 1, 0, 1]), torch.full((6,), guidance.scale)
        model = Teacher(unet, scheduler_config, 8, guidance, negative)
        every = list(model.rollout(teacher.noise_of(range(6), (4, 8, 8)), embeds[caption], scales))
        states = torch.stack([every[step - 1] for step in (*knots, 9)], dim=1)
        return Trajectories(states[:, 0], states, embeds, caption, scales)

    return make


@pytest.fixture
def jumps(scheduler_config: Mapping[str, Any]) -> tuple[Step, ...]:
    return compile_schedule(scheduler_config, [("only", KNOTS)], teacher_steps=8).steps


def loss_at(student: Any, data: Trajectories, jumps: Any, seed: int = 0, **changes: Any) -> tuple[Tensor, Any]:
    parts = list(
        trajectory_loss(student, data, jumps, settings=settings(**changes))(torch.Generator().manual_seed(seed))
    )
    return torch.stack([part.value for part in parts]).sum(), tuple(time for part in parts for time in part.timesteps)


@pytest.mark.parametrize("on_policy", [True, False])
def test_on_the_teachers_own_grid_the_unguided_base_has_nothing_to_learn(
    on_policy: bool, unet: UNet2DConditionModel, make_data: MakeData, scheduler_config: Mapping[str, Any]
) -> None:
    every = compile_schedule(scheduler_config, [("only", range(1, 9))], teacher_steps=8).steps
    student = Student(unet, Parts(None, None), settings(), 0)
    data = make_data(Guidance(mode="none"), tuple(range(1, 9)))
    loss, timesteps = loss_at(student, data, every, on_policy=on_policy)
    assert loss < 1e-10
    assert timesteps == tuple(step.timestep for step in every)
    torch.testing.assert_close(through(student, data, every, batch=4), data.states[:, -1], rtol=1e-4, atol=1e-5)
    guided = make_data(Guidance(scale=4.0), tuple(range(1, 9)))
    assert loss_at(student, guided, every, on_policy=on_policy)[0] > 1e-3


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_output_that_lands_on_the_teachers_state_has_no_loss(
    on_policy: bool, make_data: MakeData, jumps: tuple[Step, ...]
) -> None:
    """It is the average update of the teacher's own steps in between."""
    data = make_data(Guidance(scale=4.0, rescale=0.7), KNOTS)
    rows = torch.randint(6, (4,), generator=torch.Generator().manual_seed(0))
    made = 0

    def average(sample: Tensor, timestep: Tensor, embeds: Tensor, scale: Tensor) -> Tensor:
        nonlocal made
        jump, before, after = jumps[made], data.states[rows, made], data.states[rows, made + 1]
        made += 1
        assert timestep == jump.timestep
        assert torch.equal(embeds, data.embeds[data.caption[rows]])
        assert scale.tolist() == [4.0] * 4
        torch.testing.assert_close(sample, before * jump.c_in, rtol=1e-4, atol=1e-4)
        return (after - jump.a * before) / jump.b

    assert loss_at(average, data, jumps, on_policy=on_policy)[0] < 1e-8
    assert made == 3


def test_the_loss_is_the_mean_squared_distance_averaged_over_the_jumps(
    recorder: Any, make_data: MakeData, jumps: tuple[Step, ...]
) -> None:
    data = make_data(Guidance(scale=4.0), KNOTS)
    rows = torch.randint(6, (4,), generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for k, jump in enumerate(jumps):  # an output of zero leads to a * x
        expected += (jump.a * data.states[rows, k] - data.states[rows, k + 1]).square().mean().item() / 3
    assert loss_at(recorder, data, jumps, on_policy=False)[0].item() == pytest.approx(expected, rel=1e-5)


def test_on_policy_each_jump_starts_where_the_last_one_ended(
    recorder: Any, make_data: MakeData, jumps: tuple[Step, ...]
) -> None:
    data = make_data(Guidance(scale=4.0), KNOTS)
    entry = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    data = Trajectories(entry, data.states, data.embeds, data.caption, data.scales)
    rows = torch.randint(6, (4,), generator=torch.Generator().manual_seed(0))
    loss, _ = loss_at(recorder, data, jumps)
    own, teachers = entry[rows], data.states[rows]
    for k, jump in enumerate(jumps):
        torch.testing.assert_close(recorder.calls[k][0], own * jump.c_in)
        assert not recorder.calls[k][0].requires_grad  # nothing flows into the jump before
        own = jump.a * own
    recorder.calls.clear()
    loss_at(recorder, data, jumps, on_policy=False)
    for k, jump in enumerate(jumps):
        assert torch.equal(recorder.calls[k][0], teachers[:, k] * jump.c_in)
    loss.backward()
    assert recorder.weight.grad != 0


def test_every_trajectory_is_drawn(recorder: Any, make_data: MakeData, jumps: tuple[Step, ...]) -> None:
    data = make_data(Guidance(mode="none"), KNOTS)
    loss_at(recorder, data, jumps, batch_size=600)
    sample, _, embeds, _ = recorder.calls[0]
    rows = (sample[:, None] - data.entry[None]).square().mean(dim=(2, 3, 4)).argmin(dim=1)
    assert all(count == pytest.approx(100, abs=35) for count in rows.bincount().tolist())
    assert torch.equal(embeds, data.embeds[data.caption[rows]])


@pytest.mark.parametrize("on_policy", [True, False])
def test_training_brings_the_jumps_nearer_to_the_teachers_end(
    on_policy: bool, unet: UNet2DConditionModel, make_data: MakeData, jumps: tuple[Step, ...], tmp_path: Path
) -> None:
    data = make_data(Guidance(scale=4.0), KNOTS)
    chosen = settings(steps=30, learning_rate=0.02, rank=4, alpha=16.0, on_policy=on_policy)
    student = Student(unet, Parts(Path("x.safetensors"), None), chosen, 0)

    def distance() -> float:
        return float((through(student, data, jumps) - data.states[:, -1]).square().mean())

    before = distance()
    fitting.fit(
        "x", student, trajectory_loss(student, data, jumps, settings=chosen), chosen, identity={}, work=tmp_path
    )
    assert distance() < 0.8 * before


def test_through_makes_the_jumps_one_after_the_other_whatever_the_batch(
    unet: UNet2DConditionModel, make_data: MakeData, jumps: tuple[Step, ...]
) -> None:
    data = make_data(Guidance(scale=4.0), KNOTS)
    student = Student(unet, Parts(None, None), settings(), 0)
    found = through(student, data, jumps, batch=4)
    assert not found.requires_grad
    for row in range(6):
        latents = data.entry[row : row + 1]
        for jump in jumps:
            with torch.no_grad():
                output = unet(*inputs_of(latents, jump), data.embeds[data.caption[row]][None]).sample
            latents = advance(latents, jump, output)
        torch.testing.assert_close(found[row : row + 1], latents, rtol=1e-4, atol=1e-5)

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from glance_trt.distill import search
from glance_trt.errors import RecipeError
from glance_trt.recipe import Guidance, Recipe
from glance_trt.schedule import jump_coefficients, teacher_grid

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DDIM = {
    "_class_name": "DDIMScheduler",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
}


def test_jumps_of_one_step_are_diffusers_own() -> None:
    scheduler = diffusers.DDIMScheduler.from_config(DDIM)
    scheduler.set_timesteps(10)
    table = jump_coefficients(DDIM, 10)
    generator = torch.Generator().manual_seed(0)
    latents, output = torch.randn(2, 1, 4, 8, 8, generator=generator).double()
    for i, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(output, timestep, latents).prev_sample
        a, b = table[i, i + 1]
        torch.testing.assert_close(a * latents + b * output, expected, rtol=1e-5, atol=1e-6)


def test_cost_of_a_jump_is_the_distance_to_the_teachers_state_along_the_velocity() -> None:
    steps, rng = 6, np.random.default_rng(0)
    states = rng.standard_normal((3, steps + 1, 5))
    costs = search.jump_costs(states, jump_coefficients(FLOW, steps))
    sigmas = teacher_grid(FLOW, steps).levels.astype(float)
    for i, j in itertools.combinations(range(steps + 1), 2):
        velocity = (states[:, i + 1] - states[:, i]) / (sigmas[i + 1] - sigmas[i])
        missed = states[:, j] - (states[:, i] + (sigmas[j] - sigmas[i]) * velocity)
        assert costs[i, j] == pytest.approx(np.sqrt((missed**2).mean(axis=1)).mean(), abs=1e-12)
    assert np.isinf(costs[np.tril_indices(steps)]).all()


def test_straight_trajectories_cost_nothing_in_one_jump() -> None:
    sigmas = teacher_grid(FLOW, 8).levels.astype(float)
    noise, image = np.random.default_rng(1).standard_normal((2, 4, 1, 6))
    straight = sigmas[:, None] * noise + (1 - sigmas[:, None]) * image
    assert search.jump_costs(straight, jump_coefficients(FLOW, 8))[0, 8] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_best_knots_are_those_of_an_exhaustive_search(seed: int) -> None:
    steps = 8
    costs = np.where(
        np.triu(np.ones((steps, steps + 1)), 1), np.random.default_rng(seed).random((steps, steps + 1)), np.inf
    )
    for count, found in enumerate(search.best_knots(costs), start=1):
        every = [(0, *others) for others in itertools.combinations(range(1, steps), count - 1)]
        cost = {path: sum(costs[i, j] for i, j in itertools.pairwise((*path, steps))) for path in every}
        assert cost[tuple(found)] == min(cost.values())


def test_boundary_parts_knots_that_need_different_changes() -> None:
    table = jump_coefficients(FLOW, 8)
    sigmas = teacher_grid(FLOW, 8).levels.astype(float)
    # The velocity turns at every other state: jumps of two steps need its mean, off by +1 in the first three knots and
    # by -3 in the last.
    velocities = np.zeros((1, 8, 1))
    velocities[0, :, 0] = [0, 2, 0, 2, 0, 2, 0, -6]
    rises = np.diff(sigmas)[None, :, None] * velocities
    states = np.concatenate([np.zeros((1, 1, 1)), rises.cumsum(axis=1)], axis=1)
    assert search.boundary(states, table, [0, 2, 4, 6]) == 3
    assert search.boundary(states, table, [0]) == 1


def test_search_samples_the_teacher_as_diffusers_does(
    home: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(guidance=Guidance(scale=3.0))
    found = search.search(recipe, home, ["a red circle", "a blue star"], 4, samples=3, work=tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(home / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    states = []
    for row, prompt in enumerate(("a red circle", "a blue star", "a red circle")):
        kept = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(row))]

        def keep(pipe: object, step: int, time: object, values: dict[str, Tensor], into: list[Tensor] = kept) -> Any:
            into.append(values["latents"])
            return values

        generator = torch.Generator().manual_seed(row)
        pipeline(
            prompt, height=16, width=16, num_inference_steps=10, guidance_scale=3.0, generator=generator,
            callback_on_step_end=keep, output_type="latent",
        )  # fmt: skip
        states.append(torch.cat(kept))
    table = jump_coefficients(pipeline.scheduler.config, 10)
    expected = search.evaluate(torch.stack(states).flatten(2).double().numpy(), table, 4)
    assert [knots.steps for knots in found.best] == [knots.steps for knots in expected.best]
    assert found.best[3].cost == pytest.approx(expected.best[3].cost, rel=1e-3)
    assert found.uniform.steps == (1, 3, 6, 9)
    assert found.best[3].cost <= found.uniform.cost
    assert found.paper is None
    assert found.best[9].steps == tuple(range(1, 11))
    assert found.best[9].cost == pytest.approx(0, abs=1e-6)
    with pytest.raises(RecipeError, match="knots: 11 of 10 teacher steps; ask for 1 to all of them"):
        search.search(recipe, home, ["a"], 11, work=tmp_path)


def test_plot_draws_the_curve_and_the_knots(tmp_path: Path) -> None:
    states = np.random.default_rng(0).standard_normal((2, 51, 4))
    found = search.evaluate(states, jump_coefficients(DDIM, 50), 10)
    assert found.paper is not None
    assert found.paper.steps == (1, 3, 5, 7, 9, 11, 21, 31, 41, 50)
    assert found.paper.slow == 5  # as in the paper, wherever the best boundary would be
    search.plot(found, 10, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "<svg" in text
    search.plot(found, 10, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

"""Phases and samplers: a model's own scheduler, recomputed with numpy and compiled to a table of coefficients.

Every first-order sampler is linear in the latents and in the model's output, so one step of it is

    x' = a * x + b * model(c_in * x, timestep)

and a whole schedule is a list of (phase, timestep, c_in, a, b). `teacher_grid` recomputes what diffusers'
`set_timesteps` makes of a scheduler's config; `compile_schedule` picks the phases' knots from it and joins them.
Coefficients are computed in float64 from the float32 grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glance_trt.errors import RecipeError
from glance_trt.schedulers import DDIM, Floats, FlowMatch, Grid, grid_of, scheduler_of

Sampler = Literal["consistent", "released"]
Phases = Sequence[tuple[str, Sequence[int]]]

RELEASED_IMAGE_TOKENS = 4096  # 1024 x 1024 pixels: the only size whose timesteps the released Glance code knows


@dataclass(frozen=True)
class Step:
    """One denoising step, ``x' = a * x + b * model(c_in * x, timestep)``; every number is exact in float32."""

    phase: str
    timestep: float
    c_in: float
    a: float
    b: float
    mix: tuple[float, float]
    """What an image's latents and what noise are multiplied with, to start at this step from an image."""


@dataclass(frozen=True)
class Schedule:
    """The steps in order of denoising; they start from unit Gaussian noise times `initial_noise_scale`."""

    steps: tuple[Step, ...]
    initial_noise_scale: float


def teacher_grid(config: Mapping[str, Any], steps: int, image_tokens: int | None = None) -> Grid:
    """The timesteps and noise levels that diffusers' scheduler of this config takes in `steps` steps.

    `config` is a scheduler_config.json; its `_class_name` may have been replaced, in which case it is read as
    diffusers' `from_config` does: keys that the class does not know are ignored, missing ones take the class's
    defaults. Flow matching starts from the sigmas that the pipelines of FLUX and Qwen-Image pass to their scheduler,
    linspace(1, 1 / steps, steps); with the key ``own_sigmas``, which diffusers does not know, from those that the
    scheduler makes itself, as the pipeline of Stable Diffusion 3 lets it. `image_tokens` is the length of the image's
    token sequence, needed where use_dynamic_shifting is on.

    Raises `RecipeError` for a class or an option that is not supported, naming it.
    """
    return grid_of(scheduler_of(config), steps, image_tokens)


def is_flow_matching(config: Mapping[str, Any]) -> bool:
    """Whether the scheduler of this config is one for models that predict a flow, not noise."""
    return str(config.get("_class_name")).startswith("FlowMatch")


def log_snr(config: Mapping[str, Any], levels: Floats) -> NDArray[np.float64]:
    """The log signal-to-noise ratio, in nats, of levels on the grid of this config's scheduler (`Grid.levels`).

    The signal is the image's variance, the noise that of the noise: log(alpha / (1 - alpha)) for cumulative alphas,
    -2 log(sigma) for Euler's sigmas, 2 log((1 - sigma) / sigma) for flow matching. It is -inf where there is only
    noise, and inf where there is none. Raises `RecipeError` as `teacher_grid`.
    """
    scheduler = scheduler_of(config)
    with np.errstate(divide="ignore"):  # log(0) at either end
        return scheduler.log_snr(levels.astype(np.float64))


def jump_coefficients(config: Mapping[str, Any], steps: int, image_tokens: int | None = None) -> NDArray[np.float64]:
    """Every jump on the teacher's grid: [N, N + 1, 2], the a and b that lead from before step i to before step j > i.

    Steps count from 0, and N is the end of the grid; what is no jump is nan. Raises `RecipeError` as `teacher_grid`.
    """
    scheduler = scheduler_of(config)
    levels = grid_of(scheduler, steps, image_tokens).levels
    table = np.full((steps, steps + 1, 2), np.nan)
    for i in range(steps):
        for j in range(i + 1, steps + 1):
            table[i, j] = scheduler.update(float(levels[i]), float(levels[j]))[1:]
    return table


def compile_schedule(
    config: Mapping[str, Any],
    phases: Phases,
    *,
    teacher_steps: int,
    sampler: Sampler = "consistent",
    image_tokens: int | None = None,
) -> Schedule:
    """Compile phases, each a name and its 1-based steps of the teacher's grid, to a table of coefficients.

    `consistent`: a step goes from its knot's noise level to that of the next knot, in the same phase or not; the last
    one goes to the end of the grid. All knots of the grid give the teacher's own sampling. (Where DDIM's timesteps are
    not evenly spaced, diffusers steps to a level beside that of its next timestep; here the two are always the same.)

    `released` (flow matching and DDIM) does what the released code of Glance (arXiv 2512.02899) does, defects
    included. It replaces the timesteps given to the model but never the sigmas, which each phase takes from the top of
    a fresh grid: the first phase makes the first steps of the teacher's grid, one after the other, and every later
    phase walks from sigma 1 to 0 on a grid of as many steps as it has knots. (Qwen-Image: 1.0 -> 0.946, then 1.0 -> 0
    in 5 steps.) Timesteps are those of 1024 x 1024 at every image size, rounded to bfloat16. The code was released for
    Qwen-Image in two phases; other models and numbers of phases follow the same rule. Doing the same to DDIM, which
    looks levels up by timestep, leaves each step at its own level but keeps the stride of the phase's grid: the first
    phase goes down by one step of the teacher's grid at a time, whatever its next knot is.

    Raises `RecipeError` for phases that make no schedule and for everything that `teacher_grid` refuses.
    """
    scheduler = scheduler_of(config)
    knots = _knots(phases, teacher_steps)
    grid = grid_of(scheduler, teacher_steps, image_tokens)
    indices = [step - 1 for _, step in knots]
    if sampler == "released":
        sizes = [len(steps) for _, steps in phases]
        counts = [teacher_steps, *sizes[1:]]
        if isinstance(scheduler, FlowMatch):
            timesteps = _bfloat16(grid_of(scheduler, teacher_steps, RELEASED_IMAGE_TOKENS).timesteps[indices])
            grids = [grid_of(scheduler, count, image_tokens) for count in counts]
            levels = np.concatenate([g.levels[:size] for g, size in zip(grids, sizes, strict=True)])
            targets = np.concatenate([g.levels[1 : size + 1] for g, size in zip(grids, sizes, strict=True)])
        elif isinstance(scheduler, DDIM):
            timesteps, levels = grid.timesteps[indices], grid.levels[indices]
            strides = np.repeat([scheduler.num_train_timesteps // count for count in counts], sizes)
            before, alphas = timesteps.astype(np.int64) - strides, scheduler.alphas_cumprod()
            targets = np.where(before >= 0, alphas[np.maximum(before, 0)], grid.levels[-1])
        else:
            raise RecipeError(
                "sampler: 'released' is known for FlowMatchEulerDiscreteScheduler and DDIMScheduler, and the scheduler "
                f"is {config['_class_name']}; use 'consistent'"
            )
    elif sampler == "consistent":
        timesteps = grid.timesteps[indices]
        levels = grid.levels[indices]
        targets = grid.levels[[*indices[1:], -1]]
    else:
        raise RecipeError(f"sampler: got {sampler!r}; expected 'consistent' or 'released'")
    steps = []
    for (phase, _), timestep, level, target in zip(knots, timesteps, levels, targets, strict=True):
        update = scheduler.update(float(level), float(target))
        c_in, a, b, signal, noise = (float(np.float32(value)) for value in (*update, *scheduler.mix(float(level))))
        steps.append(Step(phase, float(timestep), c_in, a, b, (signal, noise)))
    return Schedule(tuple(steps), float(np.float32(scheduler.initial_noise_scale(float(levels[0])))))


def _knots(phases: Phases, teacher_steps: int) -> list[tuple[str, int]]:
    """All (phase, step) pairs in order, checked."""
    if not phases:
        raise RecipeError("phases: there is none; name at least one, with its teacher steps")
    knots: list[tuple[str, int]] = []
    for phase, steps in phases:
        if not steps:
            raise RecipeError(f"phases.{phase}: has no steps; give at least one of 1..{teacher_steps}, or remove it")
        for step in steps:
            if not 1 <= step <= teacher_steps:
                raise RecipeError(f"phases.{phase}: step {step} is outside the teacher's 1..{teacher_steps}")
            taken = [name for name, other in knots if other == step]
            if taken:
                raise RecipeError(f"phases.{phase}: step {step} is taken twice, first in phase {taken[0]}; remove one")
            if knots and step < knots[-1][1]:
                raise RecipeError(
                    f"phases.{phase}: step {step} comes after step {knots[-1][1]} of phase {knots[-1][0]}; "
                    "steps must rise, within a phase and from one to the next"
                )
            knots.append((phase, step))
    return knots


def _bfloat16(values: Floats) -> Floats:
    """Round to the nearest bfloat16, ties to even, and keep as float32."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)

"""Searches a schedule: which of the teacher's steps to keep as knots, and where the slow phase should end.

The teacher's own trajectories say what each jump over some of its steps would cost. The best K knots follow by dynamic
programming, exactly; the sum of the jumps' errors bounds that of the whole path as long as the model does not amplify
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glance_trt.distill import files, teacher
from glance_trt.distill.base import find_model, load_base
from glance_trt.distill.data import encode_captions
from glance_trt.errors import RecipeError
from glance_trt.progress import Progress, silent
from glance_trt.recipe import Recipe
from glance_trt.schedule import jump_coefficients

Floats = NDArray[np.float64]

PAPER = (1, 3, 5, 7, 9, 11, 21, 31, 41, 50)
"""Glance's knots (arXiv 2512.02899), of 50 teacher steps."""
PAPER_SLOW = 5
"""How many of them are the slow phase's."""


@dataclass(frozen=True)
class Knots:
    """Steps of the teacher's grid, counted from 1, the sum of their jumps' costs, and how many the slow phase has."""

    steps: tuple[int, ...]
    cost: float
    slow: int


@dataclass(frozen=True)
class Search:
    """best: the cheapest knots for each number of them, from 1 to all. uniform and paper: for comparison, the knots
    that are evenly spaced, as many as were asked for, and the paper's where the teacher has 50 steps."""

    best: tuple[Knots, ...]
    uniform: Knots
    paper: Knots | None


def search(
    recipe: Recipe,
    folder: Path,
    prompts: Sequence[str],
    count: int,
    *,
    samples: int = 8,
    work: Path,
    device: str | None = None,
    progress: Progress = silent,
) -> Search:
    """Roll out the recipe's teacher on `samples` noises, the prompts taken in turns, and find the best `count` knots.

    `folder` is what the recipe's paths are relative to; the trajectories go to ``<work>/samples``. Raises
    `RecipeError` where `count` is not possible, and what `teacher.trajectories` raises.
    """
    if not 1 <= count <= recipe.teacher_steps:
        raise RecipeError(f"knots: {count} of {recipe.teacher_steps} teacher steps; ask for 1 to all of them")
    found, config = find_model(recipe, folder, progress)
    table = jump_coefficients(config, recipe.teacher_steps)
    base = load_base(found.whole_folder())
    place = base.to(device)
    model = teacher.open_teacher(base, recipe, config)
    captions = [prompts[i % len(prompts)] for i in range(samples)]
    states = teacher.trajectories(
        model,
        captions=captions,
        embeds=encode_captions(base, tuple(captions)),
        scales=torch.full((samples,), model.guidance.scale, device=place),
        seed=recipe.distill.seed if recipe.distill else 0,
        shape=teacher.latent_shape(base, recipe),
        keep=range(recipe.teacher_steps + 1),
        model=base.digest(),
        folder=work / "samples",
        progress=progress,
    )
    return evaluate(states.flatten(2).double().cpu().numpy(), table, count)


def evaluate(states: Floats, table: Floats, count: int) -> Search:
    """The search on trajectories [P, N + 1, D] and the coefficients [N, N + 1, 2] of `jump_coefficients`."""
    costs = jump_costs(states, table)
    steps = len(table)

    def knots(indices: Sequence[int]) -> Knots:
        ends = [*indices[1:], steps]
        cost = float(sum(costs[i, j] for i, j in zip(indices, ends, strict=True)))
        return Knots(tuple(i + 1 for i in indices), cost, boundary(states, table, indices))

    uniform = [round(i * steps / count) for i in range(count)]
    paper = replace(knots([step - 1 for step in PAPER]), slow=PAPER_SLOW) if steps == PAPER[-1] else None
    return Search(tuple(knots(best) for best in best_knots(costs)), knots(uniform), paper)


def jump_costs(states: Floats, table: Floats) -> Floats:
    """[N, N + 1]: how far a jump from i to j ends from the teacher's state there, by the model's output at i.

    The root of the mean square over an image's latents, averaged over the trajectories; infinite where j <= i.
    """
    outputs = _outputs(states, table, np.arange(len(table)), np.arange(1, len(table) + 1))
    costs = np.full(table.shape[:2], np.inf)
    for i in range(len(table)):
        a, b = table[i, i + 1 :, 0, None], table[i, i + 1 :, 1, None]
        ends = a * states[:, i, None] + b * outputs[:, i, None]
        costs[i, i + 1 :] = np.sqrt(np.mean((ends - states[:, i + 1 :]) ** 2, axis=2)).mean(axis=0)
    return costs


def best_knots(costs: Floats) -> list[list[int]]:
    """The cheapest path from 0 to N in k jumps, for k = 1 to N: the indices at which its jumps begin."""
    steps = len(costs)
    cheapest = np.full((steps + 1, steps + 1), np.inf)  # by number of jumps, and where they lead from 0
    origin = np.zeros((steps + 1, steps + 1), int)
    cheapest[0, 0] = 0
    for jumps in range(1, steps + 1):
        through = cheapest[jumps - 1, :steps, None] + costs
        origin[jumps] = through.argmin(axis=0)
        cheapest[jumps] = through.min(axis=0)
    found = []
    for jumps in range(1, steps + 1):
        path, at = [], steps
        for left in range(jumps, 0, -1):
            at = int(origin[left, at])
            path.append(at)
        found.append(path[::-1])
    return found


def boundary(states: Floats, table: Floats, indices: Sequence[int]) -> int:
    """How many of the knots the slow phase should have, at least one (of a single knot, that one).

    One LoRA serves a whole phase, so what it has to change in the model's output should be alike for all of its knots:
    the two phases are those with the least variance of that change within each.
    """
    if len(indices) < 2:
        return len(indices)
    at, ends = np.array(indices), np.array([*indices[1:], len(table)])
    changes = _outputs(states, table, at, ends) - _outputs(states, table, at, at + 1)  # [P, K, D]
    # Variance within two groups is least where the squares of their sums, over their sizes, are largest.
    before, sizes = changes.cumsum(axis=1)[:, :-1], np.arange(1, len(indices))
    after = changes.sum(axis=1, keepdims=True) - before
    explained = (before**2).sum(axis=(0, 2)) / sizes + (after**2).sum(axis=(0, 2)) / (len(indices) - sizes)
    return 1 + int(np.argmax(explained))


def _outputs(states: Floats, table: Floats, start: NDArray[Any], end: NDArray[Any]) -> Floats:
    """[P, K, D]: the model outputs that lead exactly from the states at `start` [K] to those at `end` [K]."""
    a, b = table[start, end, 0, None], table[start, end, 1, None]
    return (states[:, end] - a * states[:, start]) / b


def plot(found: Search, count: int, file: Path) -> None:
    """The cost against the number of knots, and the chosen knots beside the paper's and the uniform ones.

    Into a .png or .svg file. Raises `OutputError`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    curve = found.best[:-1]  # all knots together cost nothing, which a logarithm cannot show
    left.semilogy([len(knots.steps) for knots in curve], [knots.cost for knots in curve], label="best")
    rows = {"best": found.best[count - 1], "uniform": found.uniform}
    if found.paper:
        rows["paper"] = found.paper
    for i, (name, knots) in enumerate(rows.items()):
        left.plot(len(knots.steps), knots.cost, "o", label=f"{name}, {len(knots.steps)} knots")
        slow, fast = knots.steps[: knots.slow], knots.steps[knots.slow :]
        right.plot(slow, [i] * len(slow), "o", color="tab:blue", label="slow" if i == 0 else None)
        right.plot(fast, [i] * len(fast), "s", color="tab:orange", label="fast" if i == 0 else None)
    left.set(xlabel="knots", ylabel="sum of the jumps' errors")
    right.set(xlabel="step of the teacher", yticks=range(len(rows)), yticklabels=list(rows), ylim=(-0.5, len(rows)))
    left.legend()
    right.legend(ncols=2)
    files.write(file, lambda draft: figure.savefig(draft, format=file.suffix[1:].lower(), dpi=120))

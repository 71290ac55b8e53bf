"""Training on the guided teacher's trajectories: each jump of a phase should end where the teacher ends.

A jump from one knot to the next is one linear update ``a * x + b * output``, so the output that lands on the teacher's
state is the average update of the teacher's own steps in between, and guidance is inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glance_trt.distill.fitting import Loss, LossFunction
from glance_trt.distill.student import Student
from glance_trt.distill.teacher import advance, inputs_of
from glance_trt.recipe import Distill
from glance_trt.schedule import Step


@dataclass(frozen=True)
class Trajectories:
    """What one phase is trained on.

    entry [N, C, h, w]: the latents that the phase starts from. states [N, K + 1, C, h, w]: the teacher's before each of
    its K jumps, and behind the last. embeds [M, L, D], of which `caption` [N] gives each trajectory's. scales [N]: the
    teacher's guidance scales. All but `caption` are float32.
    """

    entry: Tensor
    states: Tensor
    embeds: Tensor
    caption: Tensor
    scales: Tensor


def trajectory_loss(student: Student, data: Trajectories, jumps: Sequence[Step], *, settings: Distill) -> LossFunction:
    """The squared distance to the teacher's state after each jump of the phase, averaged over the jumps.

    Every sample of the batch draws a trajectory and makes all jumps of the phase. With `on_policy` each starts where
    the student's last one ended, so that it learns to come back from its own errors; else where the teacher's did. No
    gradient flows from one jump into the one before.
    """
    device = data.entry.device

    def loss_of_step(generator: torch.Generator) -> Iterator[Loss]:
        rows = torch.randint(len(data.entry), (settings.batch_size,), generator=generator).to(device)
        embeds, scales, latents = data.embeds[data.caption[rows]], data.scales[rows], data.entry[rows]
        for k, jump in enumerate(jumps):
            if not settings.on_policy:
                latents = data.states[rows, k]
            ended = advance(latents, jump, student(*inputs_of(latents, jump), embeds, scales))
            yield Loss(F.mse_loss(ended, data.states[rows, k + 1]) / len(jumps), (jump.timestep,))
            latents = ended.detach()

    return loss_of_step


@torch.no_grad()
def through(
    predict: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    data: Trajectories,
    jumps: Sequence[Step],
    batch: int = 16,
) -> Tensor:
    """Where a phase's own jumps lead from `data.entry`: the entry [N, C, h, w] of the next phase.

    `predict` is a `Student`, or where guidance takes two evaluations `Teacher.predict`.
    """
    found = []
    for rows in torch.arange(len(data.entry), device=data.entry.device).split(batch):
        latents = data.entry[rows]
        for jump in jumps:
            output = predict(*inputs_of(latents, jump), data.embeds[data.caption[rows]], data.scales[rows])
            latents = advance(latents, jump, output)
        found.append(latents)
    return torch.cat(found)

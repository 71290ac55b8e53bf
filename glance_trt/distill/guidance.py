"""Training on the base model's own guided prediction, so that one evaluation does for two.

With a LoRA that is arXiv 2312.06899, with a guide arXiv 2406.01954. Teacher and student are one network: what is
trained is off while the teacher predicts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from glance_trt.distill.data import Examples
from glance_trt.distill.fitting import Loss, LossFunction
from glance_trt.distill.ground_truth import Knots
from glance_trt.distill.student import Student
from glance_trt.distill.teacher import Teacher
from glance_trt.recipe import Distill


def draw_scales(student_has_guide: bool, teacher: Teacher, settings: Distill, fraction: Tensor) -> Tensor:
    """The guidance scales for fractions [N] in 0..1: over the range that a guide learns, else the teacher's own."""
    if not student_has_guide:
        return torch.full_like(fraction, teacher.guidance.scale)
    low, high = settings.scales
    return low + (high - low) * fraction


def guidance_loss(
    student: Student, teacher: Teacher, examples: Examples, knots: Knots, *, settings: Distill
) -> LossFunction:
    """The mean squared error to the teacher's guided output for fresh noise.

    Every sample of the batch draws an example and one of the knots uniformly, its own noise, and where a guide is
    trained a guidance scale of its own.
    """
    size, device = settings.batch_size, examples.latents.device

    def loss_of_step(generator: torch.Generator) -> Iterator[Loss]:
        chosen = torch.randint(len(knots.timesteps), (size,), generator=generator)
        fraction = torch.rand(size, generator=generator)
        noise = torch.randn(size, *examples.latents.shape[1:], generator=generator).to(device)
        rows = torch.randint(len(examples.latents), (size,), generator=generator).to(device)
        scale = draw_scales(student.guide is not None, teacher, settings, fraction).to(device)
        timesteps, embeds = knots.timesteps[chosen].to(device), examples.embeds[examples.caption[rows]]
        sample, _, _ = knots.noised(examples.latents[rows], noise, chosen)
        with student.off():
            target = teacher.predict(sample, timesteps, embeds, scale)
        yield Loss(F.mse_loss(student(sample, timesteps, embeds, scale), target), tuple(timesteps.tolist()))

    return loss_of_step

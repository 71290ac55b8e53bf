"""Training on the base model's own target, at a phase's own noise levels (Glance, arXiv 2512.02899).

No teacher is evaluated. Where the paper trains flow models on ``noise - image``, Stable Diffusion has the noise or the
velocity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glance_trt.distill.data import Examples
from glance_trt.distill.fitting import Loss, LossFunction
from glance_trt.distill.student import Student
from glance_trt.recipe import Distill
from glance_trt.schedule import teacher_grid


@dataclass(frozen=True)
class Knots:
    """Noise levels.

    timesteps [K] float32: what the UNet is given. alphas_cumprod [K] float32: the share of the image in the variance.
    """

    timesteps: Tensor
    alphas_cumprod: Tensor

    def noised(self, latents: Tensor, noise: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the UNet is given for latents [B, C, h, w] at the knots `chosen` [B], and the square roots [B, 1, 1, 1]
        of the shares of image and noise."""
        alphas = self.alphas_cumprod[chosen].to(latents.device)[:, None, None, None]
        signal, spread = alphas**0.5, (1 - alphas) ** 0.5
        return signal * latents + spread * noise, signal, spread


def knots_of(scheduler_config: Mapping[str, Any], teacher_steps: int, steps: tuple[int, ...]) -> Knots:
    """The noise levels at the 1-based `steps` of the teacher's grid. Raises `RecipeError` as `teacher_grid` does."""
    grid = teacher_grid(scheduler_config, teacher_steps)
    indices = [step - 1 for step in steps]
    levels = torch.from_numpy(grid.levels[indices])
    if scheduler_config["_class_name"].startswith("Euler"):  # sigmas of x / alpha, so that sigma^2 = (1 - a) / a
        levels = 1 / (levels**2 + 1)
    return Knots(torch.from_numpy(grid.timesteps[indices]), levels)


def ground_truth_loss(
    student: Student, examples: Examples, knots: Knots, *, prediction_type: str, settings: Distill
) -> LossFunction:
    """The mean squared error to the model's own target for fresh noise, with weight 1.

    Every sample of the batch draws an example and one of the knots uniformly, its own noise, and with probability
    `caption_dropout` the empty caption. The target is the noise for `epsilon`, the velocity of arXiv 2202.00512 for
    `v_prediction`, the image for `sample`.
    """
    size, device = settings.batch_size, examples.latents.device
    embeds = torch.cat([examples.embeds, examples.empty])

    def loss_of_step(generator: torch.Generator) -> Iterator[Loss]:
        chosen = torch.randint(len(knots.timesteps), (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < settings.caption_dropout
        noise = torch.randn(size, *examples.latents.shape[1:], generator=generator).to(device)
        rows = torch.randint(len(examples.latents), (size,), generator=generator).to(device)
        latents, timesteps = examples.latents[rows], knots.timesteps[chosen]
        captions = torch.where(dropped.to(device), len(embeds) - 1, examples.caption[rows])
        sample, signal, spread = knots.noised(latents, noise, chosen)
        target = {"epsilon": noise, "v_prediction": signal * noise - spread * latents, "sample": latents}
        predicted = student(sample, timesteps.to(device), embeds[captions], torch.ones(size, device=device))
        yield Loss(F.mse_loss(predicted, target[prediction_type]), tuple(timesteps.tolist()))

    return loss_of_step

"""The teacher: the base model with guidance, all steps of its own grid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from glance_trt import strict
from glance_trt.distill import files
from glance_trt.distill.base import Base, device_of
from glance_trt.distill.data import encode_captions
from glance_trt.errors import TrainingError
from glance_trt.progress import Progress, silent
from glance_trt.recipe import Guidance, Recipe
from glance_trt.schedule import Step, compile_schedule

BATCH = 16
"""Trajectories that are sampled together."""


class Teacher:
    """Predicts with guidance, and samples whole trajectories.

    negative [1, L, D] float32: what the text encoder makes of the negative prompt. precision: that the UNet computes
    in. `identity` (what JSON can hold) is what it predicts by, besides its weights.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler_config: Mapping[str, Any],
        steps: int,
        guidance: Guidance,
        negative: Tensor,
        precision: str = "float32",
    ) -> None:
        table = compile_schedule(scheduler_config, [("teacher", range(1, steps + 1))], teacher_steps=steps)
        self.steps, self.initial_noise_scale = table.steps, table.initial_noise_scale
        self.guidance = guidance
        self.identity = {
            "guidance": strict.write(guidance),
            "scheduler": dict(scheduler_config),
            "steps": steps,
            "precision": precision,
        }
        self._unet, self._negative, self._precision = unet, negative, precision

    @torch.no_grad()
    def predict(self, sample: Tensor, timestep: Tensor, embeds: Tensor, scale: Tensor) -> Tensor:
        """The guided output for sample [B, C, h, w] as the UNet takes it, timestep [] or [B], embeds [B, L, D], and
        scale [B]; float32. Adapters that the UNet has must be off."""
        with torch.autocast(sample.device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
            if self.guidance.mode == "none":
                return self._unet(sample, timestep, embeds, return_dict=False)[0].float()
            both = torch.cat([self._negative.expand_as(embeds), embeds])
            times = timestep.expand(len(sample)).repeat(2)
            output = self._unet(torch.cat([sample, sample]), times, both, return_dict=False)[0].float()
        without, conditional = output.chunk(2)
        guided = without + scale.view(-1, 1, 1, 1) * (conditional - without)
        return rescale_noise_cfg(guided, conditional, self.guidance.rescale) if self.guidance.rescale else guided

    def rollout(self, noise: Tensor, embeds: Tensor, scale: Tensor) -> Iterator[Tensor]:
        """The latents [B, C, h, w] before each step, then the finished ones. `noise` has unit variance."""
        latents = noise * self.initial_noise_scale
        for step in self.steps:
            yield latents
            latents = advance(latents, step, self.predict(*inputs_of(latents, step), embeds, scale))
        yield latents


def open_teacher(base: Base, recipe: Recipe, scheduler_config: Mapping[str, Any]) -> Teacher:
    """The recipe's teacher, which guides as `Recipe.teacher_guidance` says."""
    settings, guidance = recipe.distill, recipe.teacher_guidance
    negative = encode_captions(base, (guidance.negative_prompt,))
    precision = settings.precision if settings else "float32"
    return Teacher(base.unet, scheduler_config, recipe.teacher_steps, guidance, negative, precision)


def latent_shape(base: Base, recipe: Recipe) -> tuple[int, int, int]:
    """[C, H, W] of one image's latents."""
    factor = 2 ** (len(base.vae.config["block_out_channels"]) - 1)
    return base.unet.config["in_channels"], recipe.height // factor, recipe.width // factor


def inputs_of(latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """What the UNet is given at a step: the scaled latents, and the timestep []."""
    return latents * step.c_in, torch.tensor(step.timestep, device=latents.device)


def advance(latents: Tensor, step: Step, output: Tensor) -> Tensor:
    """The scheduler's update."""
    return step.a * latents + step.b * output


def noise_of(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """[B, C, h, w] of unit variance, each image from its own seed, as diffusers draws it on the CPU."""
    return torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def trajectories(
    teacher: Teacher,
    *,
    captions: Sequence[str],
    embeds: Tensor,
    scales: Tensor,
    seed: int,
    shape: tuple[int, ...],
    keep: Sequence[int],
    model: str,
    folder: Path,
    progress: Progress = silent,
) -> Tensor:
    """Sample one trajectory per row of captions [N], their embeds [N, L, D], and scales [N], from the noise of
    ``seed + row``.

    Returns the states [N, len(keep), C, h, w] float32 before the steps whose 0-based indices `keep` lists, where the
    number of steps means the end. Whole trajectories are kept in `folder`, `BATCH` of them in a file whose name says
    what they depend on (`model` is a digest of the base model), so that an interrupted call goes on, and recipes with
    other knots or another method find them there. Reports the stage ``sample``, in trajectories.

    Raises `TrainingError` for a file that cannot be read, `OutputError` if `folder` cannot be written.
    """
    device, found = device_of(teacher._unet), []
    progress("sample", 0, len(captions))
    teacher._unet.to(memory_format=torch.channels_last)  # 1.5 times faster on a CPU; its backward crashes there
    for start in range(0, len(captions), BATCH):
        rows = slice(start, min(start + BATCH, len(captions)))
        record = {
            **teacher.identity,
            "model": model,
            "captions": list(captions[rows]),
            "scales": scales[rows].tolist(),
            "seed": seed + start,
            "shape": list(shape),
        }
        file = folder / f"{hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:24]}.safetensors"
        if not file.exists():
            noise = noise_of(range(seed + rows.start, seed + rows.stop), shape).to(device)
            states = enumerate(teacher.rollout(noise, embeds[rows], scales[rows]))
            files.write_bytes(file, save({str(index): state.cpu() for index, state in states}))
        try:
            with safe_open(file, "pt") as opened:
                found.append(torch.stack([opened.get_tensor(str(index)) for index in keep], dim=1))
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{file}: not readable: {error}; delete it, and it is sampled again") from None
        progress("sample", rows.stop, len(captions))
    teacher._unet.to(memory_format=torch.contiguous_format)
    return torch.cat(found).to(device)

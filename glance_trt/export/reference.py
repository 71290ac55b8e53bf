"""The same images by diffusers: what a bundle is compared with and timed against.

Components, LoRA loading and the scheduler's step are all diffusers' own; only the loop that switches the LoRA at each
phase, which diffusers has not, is written here.

``python -m glance_trt.export.reference RECIPE PROMPT SEED OUT.png`` makes one image. With RECIPE alone, it makes a
batch per line of JSON that it reads (``{"prompt": str, "seeds": [int]}``), and answers with the seconds it took;
``RECIPE --fused`` does so with a UNet per phase.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer

from glance_trt import recipe as recipes
from glance_trt.errors import RecipeError
from glance_trt.export.quiet import quiet
from glance_trt.recipe import Phase, Recipe


class DiffusersReference:
    """A Stable Diffusion pipeline with one LoRA adapter per phase, switched inside one run. Needs peft.

    fused: instead, each phase has a UNet of its own with its LoRA fused in. Steps are faster, memory grows with the
    number of phases, images differ by rounding.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, fused: bool = False) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        if guided := [phase.name for phase in recipe.phases if phase.guide]:
            raise RecipeError(
                f"phases.{guided[0]}: has a guide, which diffusers has not; whole images cannot be compared"
            )
        self._recipe = recipe
        self._unets: dict[str, Any] = {}
        with quiet():
            self._pipe = StableDiffusionPipeline.from_pretrained(folder / recipe.model, torch_dtype=torch.float32)
            for phase in recipe.phases:
                if fused:
                    self._unets[phase.name] = self._fuse(phase, folder)
                elif phase.lora:
                    self._pipe.load_lora_weights(str(folder / phase.lora.file), adapter_name=phase.name)
        self._pipe.set_progress_bar_config(disable=True)
        name = recipe.scheduler or type(self._pipe.scheduler).__name__
        if name != "DDIMScheduler":
            raise RecipeError(f"{recipe.model}: whole images are compared for DDIMScheduler only; this is {name}")
        self._pipe.scheduler = DDIMScheduler.from_config(self._pipe.scheduler.config)
        scheduler = self._pipe.scheduler
        scheduler.set_timesteps(recipe.teacher_steps)
        grid = scheduler.timesteps.tolist()
        self._knots = [(phase, grid[step - 1]) for phase in recipe.phases for step in phase.steps]
        self._inference_steps = self._strides()

    def _fuse(self, phase: Phase, folder: Path) -> Any:
        """The phase's own UNet; the pipeline keeps the base."""
        if phase.lora is None:
            return self._pipe.unet
        base, self._pipe.unet = self._pipe.unet, copy.deepcopy(self._pipe.unet)
        self._pipe.load_lora_weights(str(folder / phase.lora.file), adapter_name=phase.name)
        self._scale(phase)
        self._pipe.fuse_lora(components=["unet"])
        self._pipe.unload_lora_weights()
        unet, self._pipe.unet = self._pipe.unet, base
        return unet

    @torch.no_grad()
    def generate(self, prompt: str, seeds: Sequence[int]) -> NDArray[np.uint8]:
        """One image per seed, [B, height, width, 3] uint8."""
        guidance, pipe = self._recipe.guidance, self._pipe
        cfg = guidance.mode == "cfg"
        embeds, negative = pipe.encode_prompt(prompt, "cpu", len(seeds), cfg, negative_prompt=guidance.negative_prompt)
        shape = (1, pipe.unet.config.in_channels, self._recipe.height, self._recipe.width)
        scale = pipe.vae_scale_factor
        shape = (*shape[:2], shape[2] // scale, shape[3] // scale)
        noise = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
        latents = torch.cat(noise) * pipe.scheduler.init_noise_sigma
        context = torch.cat([negative, embeds]) if cfg else embeds
        current = None
        for (phase, timestep), inference_steps in zip(self._knots, self._inference_steps, strict=True):
            if phase is not current:
                self._switch(phase)
                current = phase
            sample = torch.cat([latents, latents]) if cfg else latents
            predicted = pipe.unet(sample, timestep, context, return_dict=False)[0]
            if cfg:
                without, with_ = predicted.chunk(2)
                predicted = without + guidance.scale * (with_ - without)
                if guidance.rescale:
                    predicted = rescale_noise_cfg(predicted, with_, guidance.rescale)
            pipe.scheduler.num_inference_steps = inference_steps
            latents = pipe.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        images = pipe.image_processor.postprocess(image, output_type="np")
        return (images * 255).round().astype(np.uint8)  # type: ignore[no-any-return]

    def _switch(self, phase: Phase) -> None:
        if self._unets:
            self._pipe.unet = self._unets[phase.name]
        elif phase.lora is None:
            self._pipe.disable_lora()
        else:
            self._pipe.enable_lora()
            self._pipe.set_adapters(phase.name)
            self._scale(phase)

    def _scale(self, phase: Phase) -> None:
        """The recipe's scale replaces alpha / rank; diffusers' own weight for an adapter would multiply it."""
        if phase.lora and phase.lora.scale is not None:
            for layer in self._pipe.unet.modules():
                if isinstance(layer, LoraLayer) and phase.name in layer.scaling:
                    layer.scaling[phase.name] = phase.lora.scale

    def _strides(self) -> list[int | Fraction]:
        """What makes the scheduler's step at each knot end at the next one, or with `released` where the released code
        of Glance would: it goes ``num_train_timesteps // num_inference_steps`` down, which a fraction hits exactly."""
        if self._recipe.sampler == "released":
            first, *rest = self._recipe.phases
            counts = [self._recipe.teacher_steps, *(len(phase.steps) for phase in rest)]
            return [count for count, phase in zip(counts, [first, *rest], strict=True) for _ in phase.steps]
        timesteps = [timestep for _, timestep in self._knots]
        ends = [*timesteps[1:], -1]
        count = self._pipe.scheduler.config.num_train_timesteps
        return [Fraction(count, start - end) for start, end in zip(timesteps, ends, strict=True)]


def _main(recipe: str, prompt: str = "", seed: str = "", out: str = "") -> None:
    reference = DiffusersReference(*recipes.load(recipe), fused=prompt == "--fused" and not out)
    if out:
        from PIL import Image

        Image.fromarray(reference.generate(prompt, [int(seed)])[0]).save(out)
        return
    for line in sys.stdin:
        request, start = json.loads(line), time.perf_counter()
        reference.generate(request["prompt"], request["seeds"])
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])

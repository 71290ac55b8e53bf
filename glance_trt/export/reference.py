"""The same images by diffusers: what a bundle is compared with and timed against.

The pipeline is diffusers' own from the prompt to the pixels, and so are the loading of LoRAs and the scheduler's step.
What diffusers has not stands here: the LoRA is switched at each phase, and of the scheduler's steps only the recipe's
are taken.

``python -m glance_trt.export.reference RECIPE PROMPT SEED OUT.png`` makes one image. With RECIPE alone, it makes a
batch per line of JSON that it reads (``{"prompt": str, "seeds": [int]}``), and answers with the seconds it took;
``RECIPE --fused`` does so with a denoiser per phase.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer

from glance_trt import recipe as recipes
from glance_trt.errors import ModelError, RecipeError
from glance_trt.export import model as models
from glance_trt.export.quiet import quiet
from glance_trt.recipe import Phase, Recipe
from glance_trt.schedule import RELEASED_IMAGE_TOKENS


@dataclass(frozen=True)
class _Pipeline:
    """What differs between pipelines. scale: its name of the scale of guidance in two evaluations. empty: what it takes
    for no negative prompt. rescales: whether it rescales guidance. parts: what is left out when it is loaded."""

    scale: str = "guidance_scale"
    empty: str | None = None
    rescales: bool = False
    parts: Mapping[str, Any] = field(default_factory=dict)


_PIPELINES = {
    "StableDiffusionPipeline": _Pipeline(rescales=True, parts={"safety_checker": None}),
    "StableDiffusionXLPipeline": _Pipeline(rescales=True, parts={"add_watermarker": False}),
    "StableDiffusion3Pipeline": _Pipeline(),
    "FluxPipeline": _Pipeline("true_cfg_scale", ""),
    "QwenImagePipeline": _Pipeline("true_cfg_scale", ""),
}


class DiffusersReference:
    """A model's own pipeline in float32, with one LoRA adapter per phase, switched inside one run. Needs peft.

    fused: instead, each phase has a denoiser of its own with its LoRA fused in. Steps are faster, memory grows with the
    number of phases, images differ by rounding.

    Raises `ModelError`, and `RecipeError` for what diffusers cannot do.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, fused: bool = False) -> None:
        if guided := [phase.name for phase in recipe.phases if phase.guide]:
            raise RecipeError(
                f"phases.{guided[0]}: has a guide, which diffusers has not; whole images cannot be compared"
            )
        model = models.find(recipe, folder)
        kind, root = str(model.index().get("_class_name")), model.whole_folder()
        if kind not in _PIPELINES:
            raise ModelError(f"{model.folder}: {kind} is not supported; supported pipelines: {', '.join(_PIPELINES)}")
        self._recipe = recipe
        self._arguments = _arguments(kind, recipe)
        # diffusers wants to be told once more which parts were left out.
        absent = {part: None for part, entry in model.index().items() if entry == [None, None]}
        parts = absent | dict(_PIPELINES[kind].parts)
        with quiet():
            if recipe.decoder:
                from diffusers import AutoencoderTiny

                parts["vae"] = AutoencoderTiny.from_pretrained(folder / recipe.decoder, local_files_only=True)
            self._pipe = DiffusionPipeline.from_pretrained(root, dtype=torch.float32, local_files_only=True, **parts)
            self._pipe.scheduler = on_knots(self._pipe.scheduler, recipe)
            if kind == "FluxPipeline" and not self._pipe.transformer.config.guidance_embeds:
                self._arguments.setdefault("max_sequence_length", 256)  # what FLUX.1 [schnell] was trained with
            self._denoiser = "unet" if hasattr(self._pipe, "unet") else "transformer"
            self._fused: dict[str, Any] = {}
            self._encoders: set[str] = set()
            for phase in recipe.phases:
                if fused:
                    self._fused[phase.name] = self._fuse(phase, folder)
                elif phase.lora:
                    self._pipe.load_lora_weights(str(folder / phase.lora.file), adapter_name=phase.name)
                    self._scale(phase)
        for encoder in self._text_encoders().values():  # a prompt is encoded once for all phases
            if adapters := list(getattr(encoder, "peft_config", ())):
                encoder.set_adapter(adapters[0])
        self._pipe.set_progress_bar_config(disable=True)

    def _text_encoders(self) -> dict[str, Any]:
        found = self._pipe.components.items()
        return {name: part for name, part in found if name.startswith("text_encoder") and part is not None}

    def _fuse(self, phase: Phase, folder: Path) -> Any:
        """The phase's own denoiser; the pipeline keeps the base, and text encoders of which the LoRA is a part."""
        base = getattr(self._pipe, self._denoiser)
        if phase.lora is None:
            return base
        setattr(self._pipe, self._denoiser, copy.deepcopy(base))
        self._pipe.load_lora_weights(str(folder / phase.lora.file), adapter_name=phase.name)
        self._scale(phase)
        changed = [name for name, part in self._text_encoders().items() if hasattr(part, "peft_config")]
        self._pipe.fuse_lora(components=[self._denoiser, *(name for name in changed if name not in self._encoders)])
        self._encoders.update(changed)
        self._pipe.unload_lora_weights()
        fused = getattr(self._pipe, self._denoiser)
        setattr(self._pipe, self._denoiser, base)
        return fused

    def generate(
        self, prompt: str, seeds: Sequence[int], height: int | None = None, width: int | None = None
    ) -> NDArray[np.uint8]:
        """One image per seed, [B, height, width, 3] uint8, by default of the recipe's size."""
        phases = [phase for phase in self._recipe.phases for _ in phase.steps]

        def switch(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step + 1 < len(phases) and phases[step + 1] is not phases[step]:
                self._switch(phases[step + 1])
            return values

        self._switch(phases[0])
        images = self._pipe(
            prompt=prompt,
            height=height or self._recipe.height,
            width=width or self._recipe.width,
            num_inference_steps=self._recipe.teacher_steps,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=switch,
            output_type="np",
            **self._arguments,
        ).images
        return (images * 255).round().astype(np.uint8)  # type: ignore[no-any-return]

    def _switch(self, phase: Phase) -> None:
        denoiser = getattr(self._pipe, self._denoiser)
        if self._fused:
            setattr(self._pipe, self._denoiser, self._fused[phase.name])
        elif phase.lora:
            denoiser.enable_lora()
            denoiser.set_adapters(phase.name)
            self._scale(phase)
        elif any(other.lora for other in self._recipe.phases):
            denoiser.disable_lora()

    def _scale(self, phase: Phase) -> None:
        """The recipe's scale replaces alpha / rank; diffusers' own weight for an adapter would multiply it."""
        if phase.lora and phase.lora.scale is not None:
            for part in (getattr(self._pipe, self._denoiser), *self._text_encoders().values()):
                for layer in part.modules():
                    if isinstance(layer, LoraLayer) and phase.name in layer.scaling:
                        layer.scaling[phase.name] = phase.lora.scale


def _arguments(kind: str, recipe: Recipe) -> dict[str, Any]:
    """What a pipeline's call is given besides prompt, size and seeds. Raises `RecipeError`."""
    own, guidance = _PIPELINES[kind], recipe.guidance
    arguments: dict[str, Any] = {own.scale: 1.0}
    if guidance.mode == "embedded":
        arguments["guidance_scale"] = guidance.scale
    elif guidance.mode == "cfg":
        if guidance.scale < 1:
            raise RecipeError(
                f"guidance.scale: diffusers guides by more than 1 only, and this is {guidance.scale:g}; whole images "
                "cannot be compared"
            )
        if guidance.rescale and not own.rescales:
            raise RecipeError(f"guidance.rescale: {kind} has none; whole images cannot be compared")
        arguments |= {own.scale: guidance.scale, "negative_prompt": guidance.negative_prompt or own.empty}
        if own.rescales:
            arguments["guidance_rescale"] = guidance.rescale
    if recipe.prompt_tokens:
        arguments["max_sequence_length"] = recipe.prompt_tokens
    return arguments


class _Knots:
    """Set in a scheduler: `knots` are the recipe's steps on the teacher's grid, from 0; the pipeline sets the grid."""

    recipe: Recipe
    timesteps: Any
    sigmas: Any

    @property
    def knots(self) -> list[int]:
        return [step - 1 for phase in self.recipe.phases for step in phase.steps]


class _DDIM(_Knots, DDIMScheduler):
    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = self.timesteps[self.knots]

    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
        self.num_inference_steps = self._strides()[int(timestep)]
        return super().step(model_output, timestep, sample, **options)

    def _strides(self) -> dict[int, int | Fraction]:
        """What makes the step at each knot end at the next one, or with `released` where the released code of Glance
        would: it goes ``num_train_timesteps // num_inference_steps`` down, which a fraction hits exactly."""
        starts, count = self.timesteps.tolist(), self.config.num_train_timesteps
        if self.recipe.sampler == "released":
            counts = _released_counts(self.recipe)
            return dict(zip(starts, [count for count, steps in counts for _ in range(steps)], strict=True))
        return {start: Fraction(count, start - end) for start, end in zip(starts, [*starts[1:], -1], strict=True)}


class _Euler(_Knots, EulerDiscreteScheduler):
    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.timesteps, self.sigmas = self.timesteps[self.knots], self.sigmas[[*self.knots, num_inference_steps]]


class _FlowMatchEuler(_Knots, FlowMatchEulerDiscreteScheduler):
    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, mu)
        self.timesteps, self.sigmas = self.timesteps[self.knots], self.sigmas[[*self.knots, -1]]
        if self.recipe.sampler == "released":
            self._release(mu, own=sigmas is None)

    def _release(self, mu: float | None, own: bool) -> None:
        """As the released code of Glance has it: the timesteps of 1024 x 1024 in bfloat16, and each phase on the sigmas
        of a grid of its own, of which only the differences count here. own: the pipeline gives no sigmas."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        def set_grid(count: int, mu: float | None) -> None:
            sigmas = None if own else np.linspace(1, 1 / count, count)
            FlowMatchEulerDiscreteScheduler.set_timesteps(self, count, sigmas=sigmas, mu=mu)

        strides = []
        for count, steps in _released_counts(self.recipe):
            set_grid(count, mu)
            strides.append(self.sigmas.diff()[:steps])
        config = self.config
        if config.use_dynamic_shifting:
            line = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
            mu = calculate_shift(RELEASED_IMAGE_TOKENS, *line)
        set_grid(self.recipe.teacher_steps, mu)
        self.timesteps = self.timesteps[self.knots].bfloat16().float()
        self.sigmas = torch.cat([torch.ones(1), 1 + torch.cat(strides).cumsum(0)])


_SCHEDULERS: dict[str, Any] = {
    "DDIMScheduler": _DDIM,
    "EulerDiscreteScheduler": _Euler,
    "FlowMatchEulerDiscreteScheduler": _FlowMatchEuler,
}


def on_knots(scheduler: Any, recipe: Recipe) -> Any:
    """The recipe's scheduler, with the configuration of the pipeline's own, which takes the recipe's steps only. Raises
    `RecipeError` for one that is not known."""
    name = recipe.scheduler or type(scheduler).__name__
    if name not in _SCHEDULERS:
        known = ", ".join(_SCHEDULERS)
        raise RecipeError(f"{recipe.model}: whole images are compared for {known} only; this is {name}")
    if name == "EulerDiscreteScheduler" and recipe.sampler == "released":
        raise RecipeError(f"sampler: 'released' is not known for {name}; use 'consistent'")
    made = _SCHEDULERS[name].from_config(scheduler.config)
    made.recipe = recipe
    return made


def _released_counts(recipe: Recipe) -> list[tuple[int, int]]:
    """Of each phase, the number of steps of the grid that the released code takes it from, and how many it takes."""
    sizes = [len(phase.steps) for phase in recipe.phases]
    return list(zip([recipe.teacher_steps, *sizes[1:]], sizes, strict=True))


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

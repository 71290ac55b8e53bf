"""Phase experts: one LoRA per phase, trained on one image-caption pair (Glance, arXiv 2512.02899).

Each expert learns the base model's own target, from fresh noise, at the timesteps of its own phase only; no teacher
is evaluated. Where the paper trains flow models on ``noise - image``, Stable Diffusion has the noise or the velocity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from glance_trt import __version__, strict
from glance_trt.distill import checkpoint, fitting, loras, pair
from glance_trt.distill.base import Base, device_of, load_base, read_scheduler_config
from glance_trt.distill.fitting import Loss, LossFunction
from glance_trt.distill.pair import Pair
from glance_trt.errors import OutputError, RecipeError
from glance_trt.progress import Progress, silent
from glance_trt.recipe import Distill, Phase, Recipe
from glance_trt.schedule import compile_schedule, teacher_grid

SIZE_MULTIPLE = 8
"""Of images, in pixels; what diffusers' pipeline asks for."""


@dataclass(frozen=True)
class Knots:
    """The noise levels of a phase.

    timesteps [K] float32: what the UNet is given. alphas_cumprod [K] float32: the share of the image in the variance.
    """

    timesteps: Tensor
    alphas_cumprod: Tensor


@dataclass(frozen=True)
class _Expert:
    """One LoRA to train."""

    phase: str
    knots: Knots
    file: Path


def knots_of(scheduler_config: Mapping[str, Any], teacher_steps: int, steps: tuple[int, ...]) -> Knots:
    """The noise levels at the 1-based `steps` of the teacher's grid. Raises `RecipeError` as `teacher_grid` does."""
    grid = teacher_grid(scheduler_config, teacher_steps)
    indices = [step - 1 for step in steps]
    levels = torch.from_numpy(grid.levels[indices])
    if scheduler_config["_class_name"].startswith("Euler"):  # sigmas of x / alpha, so that sigma^2 = (1 - a) / a
        levels = 1 / (levels**2 + 1)
    return Knots(torch.from_numpy(grid.timesteps[indices]), levels)


def ground_truth_loss(
    unet: UNet2DConditionModel,
    pair: Pair,
    knots: Knots,
    *,
    prediction_type: str,
    batch_size: int = 1,
    caption_dropout: float = 0.0,
) -> LossFunction:
    """The paper's loss: the mean squared error to the model's own target for fresh noise, with weight 1.

    Every sample of the batch draws one of the knots uniformly, its own noise, and with probability `caption_dropout`
    the empty caption. The target is the noise for `epsilon`, the velocity of arXiv 2202.00512 for `v_prediction`, the
    image for `sample`. The pair and the UNet are on one device.
    """
    device = device_of(unet)
    embeds = torch.cat([pair.prompt_embeds, pair.empty_embeds])

    def loss_of_step(generator: torch.Generator) -> Loss:
        chosen = torch.randint(len(knots.timesteps), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < caption_dropout
        noise = torch.randn(batch_size, *pair.latents.shape[1:], generator=generator).to(device)
        timesteps = knots.timesteps[chosen]
        alphas = knots.alphas_cumprod[chosen].to(device)[:, None, None, None]
        signal, spread = alphas**0.5, (1 - alphas) ** 0.5
        target = {
            "epsilon": noise,
            "v_prediction": signal * noise - spread * pair.latents,
            "sample": pair.latents.expand_as(noise),
        }[prediction_type]
        predicted = unet(
            signal * pair.latents + spread * noise, timesteps.to(device), embeds[dropped.long().to(device)]
        ).sample
        return Loss(F.mse_loss(predicted, target), tuple(timesteps.tolist()))

    return loss_of_step


def train(
    recipe: Recipe,
    folder: Path,
    *,
    work: Path,
    out: Path | None = None,
    overwrite: bool = False,
    device: str | None = None,
    progress: Progress = silent,
) -> list[Path]:
    """Train one LoRA for each phase of the recipe that names one, and return their files.

    `folder` is what the recipe's paths are relative to. A LoRA goes to the file that its phase names, or to
    ``<out>/<phase>.safetensors``, in diffusers' layout with alpha and its provenance in the metadata. `work` takes
    checkpoints (``<phase>.pt``), logs (``<phase>.loss.csv``) and, where the recipe names no image, the base model's own
    sample (``pair.png``). A run that was interrupted goes on from them when it is called again, and phases whose result
    is there are not trained twice. `device` is PyTorch's; nothing means CUDA where there is one. Reports the stages
    ``sample`` and ``train <phase>``, in steps.

    Raises `RecipeError` for a recipe or an image that does not fit, `ModelError` for a base model that is no Stable
    Diffusion, `OutputError` for a LoRA file that exists (unless `overwrite`), and whatever `fitting.fit` raises.
    """
    settings = _checked(recipe)
    model = folder / recipe.model
    config = read_scheduler_config(model, recipe.scheduler)
    phases = [(phase.name, phase.steps) for phase in recipe.phases]
    compile_schedule(config, phases, teacher_steps=recipe.teacher_steps, sampler=recipe.sampler)  # or raises
    experts = [
        _Expert(phase.name, knots_of(config, recipe.teacher_steps, phase.steps), file)
        for phase, file in _results(recipe, folder, out)
    ]
    unet, encoded, common = _prepare(load_base(model), recipe, settings, folder, config, work, device, progress)
    identities = {expert.phase: _identity(expert, common) for expert in experts}
    done = {expert.phase for expert in experts if _is_done(expert, identities[expert.phase], settings.steps, overwrite)}
    for expert in experts:
        if expert.phase in done:
            continue
        identity = identities[expert.phase]
        loras.add(unet, settings, fitting.seed_of(settings.seed, expert.phase))
        loss = ground_truth_loss(
            unet,
            encoded,
            expert.knots,
            prediction_type=common["prediction_type"],
            batch_size=settings.batch_size,
            caption_dropout=settings.caption_dropout,
        )
        fitting.fit(expert.phase, unet, loss, settings, identity=identity, work=work, progress=progress)
        loras.save(unet, expert.file, _provenance(identity, settings.steps))
        loras.remove(unet)
    return [expert.file for expert in experts]


def _checked(recipe: Recipe) -> Distill:
    if recipe.distill is None:
        raise RecipeError(
            "distill: missing; training needs at least a prompt there, such as 'distill: {prompt: a cat}'"
        )
    for key in ("height", "width"):
        if getattr(recipe, key) % SIZE_MULTIPLE:
            raise RecipeError(f"{key}: {getattr(recipe, key)} is not a multiple of {SIZE_MULTIPLE}")
    return recipe.distill


def _results(recipe: Recipe, folder: Path, out: Path | None) -> list[tuple[Phase, Path]]:
    results: list[tuple[Phase, Path]] = []
    for i, phase in enumerate(recipe.phases):
        if phase.lora is None:
            continue
        file = folder / phase.lora.file if out is None else out / f"{phase.name}.safetensors"
        if file in [other for _, other in results]:
            raise RecipeError(f"phases[{i}].lora.file: {phase.lora.file} is another phase's too; give each its own")
        results.append((phase, file))
    if not results:
        raise RecipeError("phases: none names a lora file, so there is nothing to train")
    return results


def _prepare(
    base: Base,
    recipe: Recipe,
    settings: Distill,
    folder: Path,
    config: Mapping[str, Any],
    work: Path,
    device: str | None,
    progress: Progress,
) -> tuple[UNet2DConditionModel, Pair, dict[str, Any]]:
    """What training needs of the base: the UNet and the encoded pair, and what identifies all of its runs.

    The text encoder and the VAE go with `base`, which nobody holds after this.
    """
    digest = base.digest()
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for module in (base.text_encoder, base.unet, base.vae):
        module.to(place)
    if settings.image is None:
        image = pair.sampled_image(base, recipe, settings, config, digest, work / "pair.png", progress)
    else:
        image = pair.read_image(folder / settings.image, recipe)
    common = {
        **{key: value for key, value in strict.write(settings).items() if key not in ("image", "steps")},
        "model": digest,
        "image": pair.digest(image),
        "height": recipe.height,
        "width": recipe.width,
        "prediction_type": config.get("prediction_type", "epsilon"),
    }
    return base.unet, pair.encode(base, image, settings.prompt), common


def _identity(expert: _Expert, common: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's result depends on, but for the number of its steps."""
    return {
        "phase": expert.phase,
        **common,
        "timesteps": expert.knots.timesteps.tolist(),
        "alphas_cumprod": expert.knots.alphas_cumprod.tolist(),
    }


def _provenance(identity: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {**identity, "method": "ground truth (arXiv 2512.02899)", "steps": steps, "glance_trt": __version__}


def _is_done(expert: _Expert, identity: Mapping[str, Any], steps: int, overwrite: bool) -> bool:
    """Whether an earlier call has made this file already. Raises `OutputError` if another run did."""
    if overwrite or not expert.file.exists():
        return False
    found = loras.read_provenance(expert.file)
    if found is None:
        raise OutputError(
            f"{expert.file}: exists, and is no result of this training; remove it, or ask to overwrite it"
        )
    wanted = {**_provenance(identity, steps), "glance_trt": found.get("glance_trt")}
    if difference := checkpoint.first_difference(found, wanted):
        raise OutputError(f"{expert.file}: exists, from another run: {difference}; remove it, or ask to overwrite it")
    return True

"""Training of what a recipe's phases name, phase by phase, by the recipe's method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from glance_trt import __version__, strict
from glance_trt.distill import checkpoint, checks, data, files, fitting, loras, teacher
from glance_trt.distill.base import Base, device_of, find_model, load_base
from glance_trt.distill.data import Examples
from glance_trt.distill.fitting import LossFunction
from glance_trt.distill.ground_truth import Knots, ground_truth_loss, knots_of
from glance_trt.distill.guidance import draw_scales, guidance_loss
from glance_trt.distill.student import Parts, Student
from glance_trt.distill.teacher import Teacher
from glance_trt.distill.trajectory import Trajectories, through, trajectory_loss
from glance_trt.errors import OutputError, RecipeError
from glance_trt.progress import Progress, silent
from glance_trt.recipe import Distill, Phase, Recipe
from glance_trt.schedule import Schedule, Step, compile_schedule

_METHODS = {
    "ground-truth": "ground truth (arXiv 2512.02899)",
    "guidance": "guidance (arXiv 2312.06899)",
    "trajectory": "trajectories of the guided teacher",
}
_SHOWN = 16  # sampled images that a preview shows


@dataclass(frozen=True)
class _Run:
    """The training of one phase."""

    phase: Phase
    knots: Knots
    jumps: tuple[Step, ...]
    first: int
    """Which of the schedule's steps, counted from 0, is the first of `jumps`."""
    parts: Parts


@dataclass(frozen=True)
class _Material:
    """What all runs share: the UNet and its teacher, and what they are trained on."""

    unet: UNet2DConditionModel
    teacher: Teacher
    examples: Examples
    scales: Tensor
    states: Tensor


def train(
    recipe: Recipe,
    folder: Path,
    *,
    work: Path,
    samples: Path | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    device: str | None = None,
    progress: Progress = silent,
) -> list[Path]:
    """Train the LoRA and the guide of each phase of the recipe that names one, and return their files.

    `folder` is what the recipe's paths are relative to. A result goes to the file that its phase names, or to
    ``<out>/<phase>.safetensors`` and ``<out>/<phase>.guide.safetensors``; LoRAs are in diffusers' layout, with alpha
    and their provenance in the metadata. `work` takes checkpoints (``<phase>.pt``), logs (``<phase>.loss.csv``), and
    a preview of what the base model samples (``samples.png``); the samples go to `samples`, which recipes can share, or
    else to a folder in `work`. A run that was interrupted goes on from them when it is called again, and phases whose
    results are there are not trained twice. `device` is PyTorch's; nothing means CUDA where there is one. Reports the
    stages ``sample``, in images or trajectories, and ``train <phase>``, in steps.

    Raises `RecipeError` for a recipe or an image that does not fit, `ModelError` for a base model that is no Stable
    Diffusion, `OutputError` for a result that exists (unless `overwrite`), and whatever `fitting.fit` raises.
    """
    settings = checks.settings_of(recipe)
    given = data.read(settings, recipe, folder)
    found, config = find_model(recipe, folder, progress)
    phases = [(phase.name, phase.steps) for phase in recipe.phases]
    table = compile_schedule(config, phases, teacher_steps=recipe.teacher_steps, sampler=recipe.sampler)  # or raises
    runs = _runs(recipe, folder, out, config, table)
    for place in {work, *(file.parent for run in runs for file in run.parts)}:
        files.make_folder(place)
    base = load_base(found.whole_folder())
    digest = base.digest()
    base.to(device)
    model = teacher.open_teacher(base, recipe, config)
    chained = settings.method == "trajectory" and settings.on_policy
    shared = _shared_identity(recipe, settings, given, config, digest, model)
    identities = [_identity(run, shared, runs[:i] if chained else [], settings) for i, run in enumerate(runs)]
    trained = [run for run in runs if list(run.parts)]
    done = [_is_done(run.parts, identities[runs.index(run)], settings, overwrite) for run in trained]
    results = [file for run in trained for file in run.parts]
    if all(done):
        return results
    samples = samples or work / "samples"
    material = _prepare(base, model, recipe, settings, given, digest, work, samples, progress)
    del base  # its text encoder and VAE
    # What a bundle starts from: where the first step is skipped, that is not a state of the teacher's.
    seeds = range(settings.seed, settings.seed + len(material.states))
    entry = teacher.noise_of(seeds, material.states.shape[2:]).to(material.states) * table.initial_noise_scale
    for run, identity in zip(runs, identities, strict=True):
        if run in trained and (chained or not done[trained.index(run)]):
            student = Student(material.unet, run.parts, settings, fitting.seed_of(settings.seed, run.phase.name))
            if done[trained.index(run)]:
                student.load(run.parts)
            else:
                loss = _loss(student, run, material, settings, config, entry)
                fitting.fit(run.phase.name, student, loss, settings, identity=identity, work=work, progress=progress)
                student.save(run.parts, _provenance(identity, settings))
        else:
            student = Student(material.unet, Parts(None, None), settings, 0)
        if chained:
            guided = recipe.guidance.mode == "cfg" and run not in trained  # then the bundle evaluates the base twice
            predict = material.teacher.predict if guided else student
            entry = through(predict, _trajectories(run, material, entry), run.jumps)
        student.remove()
    return results


def _runs(recipe: Recipe, folder: Path, out: Path | None, config: Mapping[str, Any], table: Schedule) -> list[_Run]:
    runs, taken = [], dict[Path, str]()
    for i, phase in enumerate(recipe.phases):
        parts = Parts(
            None if phase.lora is None else _place(folder, phase.lora.file, out, f"{phase.name}.safetensors"),
            None if phase.guide is None else _place(folder, phase.guide, out, f"{phase.name}.guide.safetensors"),
        )
        for file in parts:
            if file in taken:
                raise RecipeError(f"phases[{i}]: {file.name} is a result of {taken[file]} too; give each its own file")
            taken[file] = phase.name
        jumps = tuple(step for step in table.steps if step.phase == phase.name)
        first = table.steps.index(jumps[0])
        runs.append(_Run(phase, knots_of(config, recipe.teacher_steps, phase.steps), jumps, first, parts))
    return runs


def _place(folder: Path, file: str, out: Path | None, name: str) -> Path:
    return folder / file if out is None else out / name


def _shared_identity(
    recipe: Recipe,
    settings: Distill,
    given: data.Given,
    config: Mapping[str, Any],
    digest: str,
    model: Teacher,
) -> dict[str, Any]:
    """What the results of all phases depend on."""
    left_out = ("images", "image", "prompts", "steps", "samples", "guidance")
    return {
        **{key: value for key, value in strict.write(settings).items() if key not in left_out},
        **({"decay_steps": settings.steps} if settings.decay != "none" else {}),
        "model": digest,
        "captions": given.digest(),
        "samples": _count(settings, given),
        "guidance": strict.write(model.guidance),
        "height": recipe.height,
        "width": recipe.width,
        "prediction_type": config.get("prediction_type", "epsilon"),
    }


def _count(settings: Distill, given: data.Given) -> int:
    """How many images or trajectories are trained on."""
    return len(given.images) or settings.samples or len(given.captions)


def _prepare(
    base: Base,
    model: Teacher,
    recipe: Recipe,
    settings: Distill,
    given: data.Given,
    digest: str,
    work: Path,
    samples: Path,
    progress: Progress,
) -> _Material:
    place, count = device_of(base.unet), _count(settings, given)
    embeds, empty = (data.encode_captions(base, captions) for captions in (given.captions, ("",)))
    caption = torch.arange(count, device=place) % len(given.captions)
    by_trajectory = settings.method == "trajectory"
    has_guide = by_trajectory and any(phase.guide for phase in recipe.phases)
    fraction = torch.rand(count, generator=torch.Generator().manual_seed(settings.seed)).to(place)
    scales = draw_scales(has_guide, model, settings, fraction)
    if given.images:
        states = data.encode_images(base, given.images)[:, None]
    else:
        steps = [step - 1 for phase in recipe.phases for step in phase.steps] if by_trajectory else []
        states = teacher.trajectories(
            model,
            captions=[given.captions[i] for i in caption.tolist()],
            embeds=embeds[caption],
            scales=scales,
            seed=settings.seed,
            shape=teacher.latent_shape(base, recipe),
            keep=[*steps, recipe.teacher_steps],
            model=digest,
            folder=samples,
            progress=progress,
        )
        _preview(base, states[:_SHOWN, -1], work / "samples.png")
    examples = Examples(states[:, -1], embeds, caption, empty)
    return _Material(base.unet, model, examples, scales, states)


def _loss(
    student: Student, run: _Run, material: _Material, settings: Distill, config: Mapping[str, Any], entry: Tensor
) -> LossFunction:
    if settings.method == "trajectory":
        return trajectory_loss(student, _trajectories(run, material, entry), run.jumps, settings=settings)
    if settings.method == "guidance":
        count = config.get("num_train_timesteps", 1000)
        every = knots_of({**config, "steps_offset": 0}, count, tuple(range(1, count + 1)))
        return guidance_loss(student, material.teacher, material.examples, every, settings=settings)
    kind = config.get("prediction_type", "epsilon")
    return ground_truth_loss(student, material.examples, run.knots, prediction_type=kind, settings=settings)


def _trajectories(run: _Run, material: _Material, entry: Tensor) -> Trajectories:
    """A phase's own part of the states, which are those before each of the schedule's jumps and at the end."""
    examples, states = material.examples, material.states[:, run.first : run.first + len(run.jumps) + 1]
    return Trajectories(entry, states, examples.embeds, examples.caption, material.scales)


@torch.no_grad()
def _preview(base: Base, latents: Tensor, file: Path) -> None:
    """A row of the sampled images, to be looked at."""
    images = [base.vae.decode(one[None] / base.vae.config["scaling_factor"]).sample[0] for one in latents]
    pixels = ((torch.cat(images, dim=2).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    files.write(file, lambda draft: Image.fromarray(pixels).save(draft, "PNG"))


def _identity(run: _Run, shared: Mapping[str, Any], before: list[_Run], settings: Distill) -> dict[str, Any]:
    """What a run's result depends on, but for the number of its own steps."""
    knots = {"timesteps": run.knots.timesteps.tolist(), "alphas_cumprod": run.knots.alphas_cumprod.tolist()}
    return {
        "phase": run.phase.name,
        **shared,
        **(knots if settings.method != "guidance" else {}),  # which is learned at all timesteps
        "after": [[run.phase.name, run.knots.timesteps.tolist(), settings.steps] for run in before],
    }


def _provenance(identity: Mapping[str, Any], settings: Distill) -> dict[str, Any]:
    return {
        **identity,
        "method": _METHODS[settings.method],
        "steps": settings.steps,
        "glance_trt": __version__,
    }


def _is_done(parts: Parts, identity: Mapping[str, Any], settings: Distill, overwrite: bool) -> bool:
    """Whether an earlier call has made these files already. Raises `OutputError` if another run did."""
    there = [] if overwrite else [file for file in parts if file.exists()]
    for file in there:
        found = loras.read_provenance(file)
        if found is None:
            raise OutputError(f"{file}: exists, and is no result of this training; give --overwrite or another -o")
        wanted = {**_provenance(identity, settings), "glance_trt": found.get("glance_trt")}
        if difference := checkpoint.first_difference(found, wanted):
            raise OutputError(f"{file}: exists, from another run: {difference}; give --overwrite or another -o")
    return there == list(parts)

"""From a recipe to a bundle: fuse, trace, build engines, compare with PyTorch, and put it all in its place at once.

What is heavy runs in processes of its own (`glance_trt.worker`), so that this one never holds a model and never imports
PyTorch, and the memory of one stage is free for the next.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from glance_trt import bundle as format_
from glance_trt import hashing, preflight, recipe, schedule, strict
from glance_trt.bundle import Bundle, DType, EngineSet, Graph, Manifest
from glance_trt.compiling import Precision, check_buildable, engine_set, portable_files
from glance_trt.engines import backends, targets
from glance_trt.engines.targets import Profile, Target
from glance_trt.errors import BundleError, OutputError, RecipeError
from glance_trt.export import inputs as inputs_
from glance_trt.export.compare import Taken, comparable, compare
from glance_trt.export.exporter import Exported, export
from glance_trt.export.families import Family
from glance_trt.export.inputs import Inputs
from glance_trt.export.parity import LIMIT
from glance_trt.progress import Progress, silent
from glance_trt.prompts import PromptTruncated
from glance_trt.recipe import Recipe
from glance_trt.report import BuildRecord, Sample, render
from glance_trt.requirements import unrunnable
from glance_trt.runtime.pipeline import Pipeline
from glance_trt.staging import Staging, key_of, locked, present, writing
from glance_trt.worker import Worker


@dataclass(frozen=True)
class Report:
    """What a build did: the bundle, seconds per stage (wall clock), the parity of each graph by what was compared (a
    target's engines, or the portable graphs), and notes that a user should read. `page`: the file that shows all this.
    `unchanged`: the bundle was there already, as the recipe wants it."""

    bundle: Bundle
    seconds: dict[str, float]
    parity: dict[str, Sequence[Any]]
    notes: tuple[str, ...]
    page: Path | None = None
    unchanged: bool = False


def build(
    recipe_name: str,
    output: Path,
    *,
    engines: Sequence[str] = (),
    lora_scales: Mapping[str | None, float] | None = None,
    overwrite: bool = False,
    check_resources: bool = True,
    progress: Progress = silent,
) -> Report:
    """Build the bundle of a recipe (a YAML file, or the name of a shipped one) at `output`.

    engines: targets to build for, instead of the recipe's. lora_scales: by phase, or under None for all of them, the
    scales to fuse the LoRAs at, instead of the recipe's. check_resources: refuse to begin where disk or memory cannot
    suffice. An interrupted build goes on where it stopped; a bundle already at `output` is returned as it is if it is
    what the recipe makes, and replaced only with `overwrite`, taking over what did not change. Of several builds of one
    output at a time, one works and the others wait for it. Raises `GlanceError`s of every kind; then nothing is left at
    `output` that was not there.
    """
    plan, folder = recipe.load(recipe_name)
    if engines:
        wanted = targets.load_all(engines)
    else:
        with recipe.naming(recipe_name):
            wanted = targets.load_all(plan.engines, folder)
    check_buildable(wanted)
    with writing(output), recipe.naming(recipe_name):
        _check_phase_names(plan)
        plan = _scaled(plan, lora_scales or {})
        work = _Build(inputs_.read(plan, folder, progress), wanted, output, progress)
        with contextlib.suppress(BundleError, OSError):  # looked at closely below
            if work.is_current(bundle := Bundle.open(output)):
                return work.unchanged(bundle)
        with locked(output, progress):
            previous = _previous(output)
            if previous and work.is_current(previous):  # by now
                return work.unchanged(previous)
            if output.exists() and not overwrite:
                raise OutputError(
                    f"{output}: exists and is not what the recipe makes now; give --overwrite or another -o"
                )
            if check_resources:
                work.check_resources(previous)
            return work.run(previous)


def _previous(output: Path) -> Bundle | None:
    """The bundle at `output`; nothing if there is none, or a damaged one. Raises `OutputError` for anything else."""
    if not output.exists():
        return None
    file = output / format_.MANIFEST
    if not file.is_file():
        raise OutputError(f"{output}: exists and is no bundle; give another -o")
    try:
        listed = format_.load(file.read_bytes(), str(file)).files
    except BundleError as error:
        raise OutputError(f"{output}: exists and is no bundle that can be read ({error}); give another -o") from None
    if strange := sorted({entry.name for entry in output.iterdir()} - {file.name, *listed}):
        raise OutputError(f"{output}: holds files that are not the bundle's ({', '.join(strange)}); move them away")
    try:
        return Bundle.open(output)
    except BundleError:
        return None


class _Build:
    """One run of `build`; its methods are the stages, in order."""

    def __init__(self, inputs: Inputs, wanted: Sequence[Target], output: Path, progress: Progress) -> None:
        self.inputs, self.targets, self.output, self.progress = inputs, wanted, output, progress
        self.plan, self.family = inputs.recipe, inputs.family
        self.image = self.family.image()
        for target in wanted:
            backends.check_profiles(target, self.family.size_unit())
        self.schedules = schedules(self.family, self.plan)
        self.notes = inputs.notes(self.schedules["default"])
        self.requires = {target.name: backends.requires(target) for target in wanted}
        self.key = self._key()
        self.seconds: dict[str, float] = {}
        self.precision: dict[str, Precision] = {}
        self.not_compared: dict[str, str] = {}

    def is_current(self, bundle: Bundle) -> bool:
        """Whether a bundle is, whole and unaltered, what this build would make."""
        if bundle.manifest.provenance.tools.get("build") != self.key:
            return False
        try:
            bundle.check(bundle.manifest.files, progress=self.progress)
        except BundleError:
            return False
        return True

    def unchanged(self, bundle: Bundle) -> Report:
        """The report where nothing was to be done."""
        return Report(bundle, {}, {}, self.notes, unchanged=True)

    def check_resources(self, previous: Bundle | None) -> None:
        """Raise `OutputError` or `TargetError` where disk or memory cannot suffice."""
        components = self.inputs.components()
        engines = [preflight.Engines(target.name, target.backend, self._dtypes(target)) for target in self.targets]
        preflight.check_disk(self.output, preflight.disk(components, engines) - present(self.output, previous))
        preflight.check_memory(preflight.memory(components, engines, LIMIT), preflight.free_memory())

    def run(self, previous: Bundle | None) -> Report:
        """Make what is not there yet, and put the bundle in its place."""
        dtypes = [target.dtype for target in self.targets]
        reasons = {target.name: unrunnable(target.backend, self.requires[target.name]) for target in self.targets}
        self.not_compared = {name: reason for name, reason in reasons.items() if reason}
        with self._timed("fuse and export"), Worker("fuse and export") as worker:
            exported = worker.call(
                export,
                self.inputs,
                self.output,
                previous,
                dtypes,
                comparable=len(self.not_compared) == len(self.targets),
                progress=self.progress,
            )
        staging = Staging(self.output, previous)
        engines: dict[str, EngineSet] = {}
        for target in self.targets:
            counts = self.precision.setdefault(target.name, {})
            with self._timed(f"engines {target.name}"):
                engines[target.name] = engine_set(
                    target, exported.graphs, self._dtypes(target), self.image, staging, counts, progress=self.progress
                )
        with self._timed("parity"):
            parity = self._compare(exported.graphs, engines, staging.folder)
        with self._timed("finish"):
            staging.finish(self._manifest(exported, engines, staging))
        bundle = Bundle.open(self.output)
        return Report(bundle, self.seconds, parity, self.notes, self._report(bundle, parity))

    def _key(self) -> str:
        """The key of the whole bundle, for which nothing heavy is imported."""
        made = [strict.write(part) for part in (*self.schedules.values(), self.image)]
        made_for = [(strict.write(target), self._dtypes(target), self.requires[target.name]) for target in self.targets]
        return key_of(self.inputs.key(), made, made_for)

    def _dtypes(self, target: Target) -> dict[str, DType]:
        """What each graph of a target computes in, by the graph's name."""
        kinds = self.family.components
        return {name: self.family.dtype(kind, target.dtype) for kind in kinds for name in self.inputs.graphs(kind)}

    def _compare(
        self, graphs: Mapping[str, Graph], engines: Mapping[str, EngineSet], folder: Path
    ) -> dict[str, Sequence[Any]]:
        """The engines that run here against PyTorch; without any, the portable graphs through ONNX Runtime."""
        parity: dict[str, Sequence[Any]] = {}
        for target in self.targets:
            if target.name not in self.not_compared:
                parity[target.name] = self._compared(
                    folder, engines[target.name], self._dtypes(target), self._taken(target)
                )
        if not parity:
            dtypes = {name: comparable(graph.files) for name, graph in graphs.items()}
            files = {name: graph.files[dtypes[name]] for name, graph in graphs.items()}
            parity["portable graphs"] = self._compared(folder, files, dtypes)
        return parity

    def _compared(
        self,
        folder: Path,
        engines: EngineSet | Mapping[str, str],
        dtypes: Mapping[str, str],
        taken: Taken | None = None,
    ) -> Sequence[Any]:
        with Worker("parity") as worker:
            return worker.call(compare, self.inputs, folder, engines, dtypes, taken=taken, progress=self.progress)

    def _taken(self, target: Target) -> Taken | None:
        """What the plans of a target take: the fewest and the most images, at the usual size."""
        if target.backend.startswith("onnxruntime"):
            return None
        profile, scale = (target.profiles or (Profile(),))[0], self.image.latent_scale
        height = profile.height[1] if profile.height else self.image.height
        width = profile.width[1] if profile.width else self.image.width
        fewest, _, most = profile.batch
        return Taken(tuple(dict.fromkeys((fewest, most))), (height // scale, width // scale))

    def _report(self, bundle: Bundle, parity: Mapping[str, Sequence[Any]]) -> Path:
        """Write the page that shows what was done, beside the bundle."""
        config, knots = self.family.scheduler_config(), [i - 1 for phase in self.plan.phases for i in phase.steps]
        tokens = self.family.image_tokens(self.plan.height, self.plan.width)
        levels = schedule.teacher_grid(config, self.plan.teacher_steps, tokens).levels[[*knots, -1]]
        samples: list[Sample] = []
        if self.plan.examples and len(self.not_compared) < len(self.targets):
            with self._timed("examples"), Worker("examples") as worker:
                samples = worker.call(examples, self.output, self.plan.examples, progress=self.progress)
        record = BuildRecord(
            datetime.now(timezone.utc),
            self.seconds,
            parity,
            self.not_compared,
            {name: counts for name, counts in self.precision.items() if counts},
            {"default": schedule.log_snr(config, levels).tolist()},
            samples,
            self.notes,
        )
        page = self.output.with_name(f"{self.output.name}.report.html")
        page.write_text(render(bundle.manifest, record), encoding="utf-8")
        return page

    def _manifest(self, exported: Exported, engines: dict[str, EngineSet], staging: Staging) -> Manifest:
        loras = tuple(
            format_.LoraSource(phase, item.file.name, hashing.sha256_of_file(item.file), item.scale, item.alpha)
            for phase, item in self.inputs.loras.items()
            if item
        )
        files = portable_files(exported.tokenizers, exported.graphs)
        files += [file for item in engines.values() for file in item.files()]
        model, guidance = self.family.model.name, self.plan.guidance
        return Manifest(
            format=format_.FORMAT,
            name=self.plan.name,
            family=self.family.name,
            provenance=format_.Provenance(model, loras, self.inputs.tools | {"build": self.key}, exported.guides),
            image=self.image,
            tokenizers=exported.tokenizers,
            guidance=format_.Guidance(guidance.scale, guidance.negative_prompt, exported.scales),
            schedules=self.schedules,
            graphs=exported.graphs,
            engines=engines,
            files=staging.entries(files, self.progress),
        )

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def examples(bundle: Path, prompts: Sequence[str], progress: Progress = silent) -> list[Sample]:
    """An image of each prompt, by the first target that runs here."""
    samples = []
    with Pipeline.open(bundle, trust=True) as pipeline, warnings.catch_warnings():  # it has just been built
        warnings.simplefilter("ignore", PromptTruncated)
        for i, prompt in enumerate(prompts):
            progress("examples", i, len(prompts))
            file = io.BytesIO()
            pipeline.generate(prompt, seed=0)[0].save(file, "PNG")
            samples.append(Sample(prompt, 0, file.getvalue()))
    progress("examples", len(prompts), len(prompts))
    return samples


def _check_phase_names(plan: Recipe) -> None:
    """Phases name files: beside ``denoiser.base.safetensors``, and on file systems where case does not count."""
    taken = {"base"}
    for i, name in enumerate(phase.name for phase in plan.phases):
        if name.lower() in taken:
            raise RecipeError(
                f"phases[{i}].name: {name!r} would name a file that the bundle has already; choose another name"
            )
        taken.add(name.lower())


def _scaled(plan: Recipe, scales: Mapping[str | None, float]) -> Recipe:
    """A recipe with other scales for its LoRAs. Raises `RecipeError` where a phase has none."""
    with_lora = [phase.name for phase in plan.phases if phase.lora]
    for name in scales:
        if not with_lora or name not in (None, *with_lora):
            what = "has no LoRA" if name is None else f"has no phase {name!r} with a LoRA"
            raise RecipeError(f"--lora-scale: the recipe {what} (with one: {', '.join(with_lora) or 'none'})")
    phases = tuple(
        replace(
            item, lora=item.lora and replace(item.lora, scale=scales.get(item.name, scales.get(None, item.lora.scale)))
        )
        for item in plan.phases
    )
    return replace(plan, phases=phases)


def schedules(family: Family, plan: Recipe) -> dict[str, format_.Schedule]:
    """A recipe's schedules, as a bundle holds them: ``default``, and where they depend on the image's size, one for
    each further size, named ``<height>x<width>``. Raises `RecipeError`."""
    config = family.scheduler_config()
    usual = (plan.height, plan.width)
    default = _table(config, plan, family.image_tokens(*usual))
    if not config.get("use_dynamic_shifting"):
        return {"default": default}
    found = {"default": replace(default, sizes=(usual,))}
    for height, width in plan.sizes:
        compiled = _table(config, plan, family.image_tokens(height, width))
        found[f"{height}x{width}"] = replace(compiled, sizes=((height, width),))
    return found


def _table(config: Mapping[str, Any], plan: Recipe, image_tokens: int | None) -> format_.Schedule:
    phases = [(phase.name, phase.steps) for phase in plan.phases]
    compiled = schedule.compile_schedule(
        config, phases, teacher_steps=plan.teacher_steps, sampler=plan.sampler, image_tokens=image_tokens
    )
    steps = tuple(
        format_.Step(step.phase, step.timestep, (step.c_in, step.a, step.b), step.mix if plan.from_image else ())
        for step in compiled.steps
    )
    # diffusers' pipelines from images round the number of steps down for diffusion, and up for flow matching.
    rounding: Literal["up", "down"] = "up" if schedule.is_flow_matching(config) else "down"
    return format_.Schedule(steps, initial_noise_scale=compiled.initial_noise_scale, strength_rounding=rounding)

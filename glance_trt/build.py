"""From a recipe to a bundle: fuse, trace, build engines, compare with PyTorch, and put it all in its place at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from glance_trt import __version__, hashing, recipe, schedule, strict
from glance_trt import bundle as format_
from glance_trt.bundle import Bundle, Engine, EngineSet, Graph, Manifest
from glance_trt.engines import backends, targets
from glance_trt.engines.targets import Target
from glance_trt.errors import BundleError, ModelError, OutputError, RecipeError, TargetError
from glance_trt.progress import Progress, silent
from glance_trt.recipe import Recipe
from glance_trt.runtime.runners import Runner
from glance_trt.schema import GuidanceMode
from glance_trt.staging import Staging, key_of, writing

_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors")


@dataclass(frozen=True)
class Report:
    """What a build did: the bundle, seconds per stage (wall clock), the parity of each graph that was compared, and
    notes that a user should read. `unchanged`: the bundle was there already, as the recipe wants it."""

    bundle: Bundle
    seconds: dict[str, float]
    parity: Sequence[Any]
    notes: tuple[str, ...]
    unchanged: bool = False


def build(
    recipe_name: str,
    output: Path,
    *,
    engines: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = silent,
) -> Report:
    """Build the bundle of a recipe (a YAML file, or the name of a shipped one) at `output`.

    engines: targets to build for, instead of the recipe's. An interrupted build goes on where it stopped; a bundle
    already at `output` is returned as it is if it is what the recipe makes, and replaced only with `overwrite`, taking
    over what did not change. Raises `GlanceError`s of every kind; then nothing is left at `output` that was not there.
    """
    plan, folder = recipe.load(recipe_name)
    wanted = targets.load_all(engines or plan.engines)
    for target in wanted:
        if reason := backends.unavailable(target):
            raise TargetError(f"target {target.name}: {reason}. Buildable here: {_buildable()}")
    with writing(output), recipe.naming(recipe_name):
        return _Build(plan, folder, wanted, _previous(output), progress).run(output, overwrite)


def _buildable() -> str:
    shipped = [targets.load(name) for name in recipe.shipped_files("target")]
    return (
        ", ".join(target.name for target in shipped if backends.unavailable(target) is None)
        or "none of the shipped targets"
    )


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

    def __init__(
        self, plan: Recipe, folder: Path, wanted: Sequence[Target], previous: Bundle | None, progress: Progress
    ) -> None:
        from glance_trt.export import phases
        from glance_trt.export.families import open_model

        self.plan, self.targets, self.previous, self.progress = plan, wanted, previous, progress
        _check_phase_names(plan)
        self.model = folder / plan.model
        self.family = open_model(self.model, plan)
        self.image = self.family.image()
        self.schedules = {"default": table(self.family.scheduler_config(), plan)}
        self.tensors = self._read_weights()
        self.loras = phases.loras(plan, folder, self.tensors["denoiser"])
        self.guides = phases.guides(plan, folder, self.family)
        self.scales = phases.scales(plan, self.guides)
        self.sources = self.family.sources(self.guides)
        self.texts = self.family.tokenizers()
        self.graphs: dict[str, Graph] = {}
        self.engines: dict[str, EngineSet] = {}
        self.tokenizers: dict[str, format_.Tokenizer] = {}
        self.seconds: dict[str, float] = {}
        self.tools = {name: metadata.version(name) for name in _TOOLS} | {"glance-trt": __version__}
        self.source_keys = {kind: self._source_key(kind) for kind in self.family.components}
        self.phase_keys = {phase.name: self._phase_key(phase.name) for phase in plan.phases}
        self.key = self._build_key()

    def run(self, output: Path, overwrite: bool) -> Report:
        if self.previous and self._is_current(self.previous):
            return Report(self.previous, {}, [], self._notes(), unchanged=True)
        if output.exists() and not overwrite:
            raise OutputError(f"{output}: exists and is not what the recipe makes now; give --overwrite or another -o")
        self.staging = Staging(output, self.previous)
        with self._timed("tokenizer"):
            self._write_tokenizers()
        for kind in self.family.components:
            with self._timed("fuse and export"):
                self._export(kind)
        for target in self.targets:
            with self._timed(f"engines {target.name}"):
                self._compile(target)
        with self._timed("parity"):
            parity = self._compare()
        with self._timed("finish"):
            self.staging.finish(self._manifest())
        return Report(Bundle.open(output), self.seconds, parity, self._notes())

    # --- what the build starts from ---

    def _read_weights(self) -> dict[str, dict[str, Any]]:
        from glance_trt.export.weights import component_tensors

        return {kind: component_tensors(self.model / part) for kind, part in self.family.components.items()}

    def _notes(self) -> tuple[str, ...]:
        notes = []
        for phase in self.plan.phases:
            item = self.loras[phase.name]
            if not item or not phase.lora:
                continue
            if phase.lora.scale is None and any(pair.alpha is None for pair in item.pairs.values()):
                notes.append(
                    f"{item.file} gives no alpha; its scale is taken as {item.scale:g}. If it was trained at alpha / "
                    "rank, set 'scale' beside the file in the recipe"
                )
            runs = {step.timestep for step in self.schedules["default"].steps if step.phase == phase.name}
            if strange := sorted(runs - set(item.timesteps or runs), reverse=True):
                notes.append(
                    f"{item.file} was not trained at timesteps {', '.join(f'{timestep:g}' for timestep in strange)} of "
                    f"phase {phase.name}. Train it for this recipe: glance-trt distill"
                )
        return tuple(notes)

    def _source_key(self, kind: str) -> str:
        """The key of a component's weights."""
        return key_of(
            [hashing.sha256_of_file(file) for file in sorted({ref.file for ref in self.tensors[kind].values()})]
        )

    def _phase_key(self, phase: str) -> str:
        """The key of what a phase changes in the denoiser's weights, and adds to them."""
        lora, guide = self.loras[phase], self.guides.get(phase)
        scales = {name: pair.scale for name, pair in lora.pairs.items()} if lora else {}
        return key_of([hashing.sha256_of_file(item.file) for item in (lora, guide) if item], scales)

    def _graph_key(self, graph: str) -> str:
        """The key of what is traced, which is independent of the weights' values."""
        from glance_trt.export.families import source_of

        source, (kind, _, phase) = source_of(self.sources, graph), graph.partition(".")
        config = self.model / self.family.components[kind] / "config.json"
        ports = [strict.write(port) for port in (*source.inputs, *source.outputs)]
        guidance = (self.plan.guidance.mode, self.plan.guidance.rescale) if kind == "denoiser" else None
        guide = strict.write(self.guides[phase].config) if phase in self.guides else None
        return key_of(self.family.name, hashing.sha256_of_file(config), ports, guidance, guide, self.tools)

    def _names(self, kind: str) -> list[str]:
        """The graphs that a component makes."""
        return [f"{kind}.{phase.name}" for phase in self.plan.phases] if kind == "denoiser" else [kind]

    def _build_key(self) -> str:
        """The key of the whole bundle."""
        parts = [strict.write(part) for part in (self.schedules["default"], self.image, self.plan.guidance)]
        phases = list(self.phase_keys.items())
        graphs = [(name, self._graph_key(name)) for kind in self.source_keys for name in self._names(kind)]
        components = [self.source_keys, graphs]
        made_for = [(strict.write(target), backends.requires(target)) for target in self.targets]
        return key_of(self.plan.name, parts, phases, components, self.texts, made_for)

    def _is_current(self, bundle: Bundle) -> bool:
        if bundle.manifest.provenance.tools.get("build") != self.key:
            return False
        try:
            bundle.check(bundle.manifest.files, progress=self.progress)
        except BundleError:
            return False
        return True

    # --- the stages ---

    def _write_tokenizers(self) -> None:
        for name, (text, length, pad) in self.texts.items():
            file = f"{name}.json"

            def make(folder: Path, file: str = file, text: str = text) -> list[str]:
                (folder / file).write_text(text, encoding="utf-8")
                return [file]

            self.staging.stage(key_of("tokenizer", file, text), make)
            self.tokenizers[name] = format_.Tokenizer(file, length, pad)

    def _export(self, kind: str) -> None:
        """The weights of one component, and a graph for each dtype that a target asks for (and each phase)."""
        from glance_trt.export import trace, weights
        from glance_trt.export.families import source_of

        traced: dict[Any, Any] = {}
        files = self._write_weights(kind, trace.parameter_names(self.sources[kind]))
        tensors = {file: weights.read_header(self.staging.folder / file)[0] for file in files}
        for name in self._names(kind):
            source = source_of(self.sources, name)
            own = [file for file in files if file in ("denoiser.base.safetensors", f"{name}.safetensors")]
            bound = {tensor: ref for file in own for tensor, ref in tensors[file].items()}  # a phase's own come last
            layout = {tensor: (ref.file.name, ref.dtype, ref.shape, ref.offset) for tensor, ref in bound.items()}
            graph_files: dict[str, str] = {}
            for dtype in sorted({target.dtype for target in self.targets}):

                def make(
                    folder: Path, name: str = name, dtype: str = dtype, bound: Any = bound, source: Any = source
                ) -> list[str]:
                    if (id(source), dtype) not in traced:  # phases mostly share one source
                        self.progress(f"trace {name} {dtype}", 0, 1)
                        traced[id(source), dtype] = trace.trace(source, dtype)
                        self.progress(f"trace {name} {dtype}", 1, 1)
                    trace.bind(traced[id(source), dtype], bound, folder / f"{name}.{dtype}.onnx")
                    return [f"{name}.{dtype}.onnx"]

                graph_key = key_of("graph", name, dtype, self._graph_key(name), layout)
                graph_files[dtype] = self.staging.stage(graph_key, make)[0]
            guidance: GuidanceMode = "none"
            if kind == "denoiser":
                guidance = "embedded" if name.partition(".")[2] in self.guides else self.plan.guidance.mode
            self.graphs[name] = Graph(source.inputs, source.outputs, graph_files, tuple(own), guidance)

    def _write_weights(self, kind: str, names: Sequence[str]) -> list[str]:
        from glance_trt.export import fuse, weights

        available = self.tensors[kind]
        stored = {name: name if name in available else self.family.weight_name(name) for name in names}
        if lacking := [name for name in names if stored[name] not in available]:
            raise _lacking(self.model / self.family.components[kind], lacking)
        chosen = {name: available[stored[name]] for name in names}
        contents = fuse.plan(chosen, self.loras, self.guides) if kind == "denoiser" else {f"{kind}.safetensors": chosen}
        for file, tensors in contents.items():
            stage = f"write {file.removesuffix('.safetensors')}"

            def make(folder: Path, file: str = file, tensors: Any = tensors, stage: str = stage) -> list[str]:
                weights.write(folder / file, tensors, self.progress, stage)
                return [file]

            phase_key = self.phase_keys.get(file.split(".")[1])
            self.staging.stage(key_of("weights", file, self.source_keys[kind], phase_key, sorted(tensors)), make)
        return list(contents)

    def _compile(self, target: Target) -> None:
        """The engines of one target. With ONNX Runtime, the denoiser's phases share weights, so are made together."""
        requires = backends.requires(target)
        groups: dict[str, list[str]] = {}
        for name in self.graphs:
            groups.setdefault(name.partition(".")[0] if target.backend == "onnxruntime" else name, []).append(name)
        engines: dict[str, Engine] = {}
        for group, members in groups.items():
            graphs = {name: self.graphs[name] for name in members}
            files = {name: self.staging.folder / graph.files[target.dtype] for name, graph in graphs.items()}
            ranges = {name: backends.ranges(graph, target, self.image) for name, graph in graphs.items()}

            def make(folder: Path, group: str = group, files: Any = files, ranges: Any = ranges) -> Iterator[str]:
                built = backends.build(target, files, ranges, group=group, directory=folder, progress=self.progress)
                for engine in built.values():
                    yield from (engine.file, *engine.weights)

            inputs = [self.staging.key(file) for name in members for file in (files[name].name, *graphs[name].weights)]
            self.staging.stage(key_of("engine", strict.write(target), requires, ranges, inputs), make)
            engines |= {name: backends.built(target, self.staging.folder, name) for name in members}
        self.engines[target.name] = EngineSet(target.backend, target.dtype, engines, requires)

    def _compare(self) -> Sequence[Any]:
        """The engines that run here against PyTorch; without any, the portable graphs through ONNX Runtime.

        What is too large to be loaded is compared in small, and its fused weights by samples.
        """
        from glance_trt.export import large, parity
        from glance_trt.runtime.runners.onnxruntime import OnnxRuntimeRunner

        here = next((target for target in self.targets if target.backend == "onnxruntime"), None)
        runner: Runner
        if here:
            dtype = here.dtype
            engines = {name: engine.file for name, engine in self.engines[here.name].graphs.items()}
            runner = OnnxRuntimeRunner(self.staging.folder, engines)
        else:
            dtype = self.targets[0].dtype
            runner = parity.PortableRunner(self.staging.folder, {n: g.files[dtype] for n, g in self.graphs.items()})
        oversized = large.oversized(self.tensors)
        whole = [name for name in self.graphs if name.partition(".")[0] not in oversized]
        reference = parity.Reference(self.family, self.model, self.loras, self.guides)
        try:
            results = parity.check(runner, dict.fromkeys(whole, dtype), reference, self.sources, self.progress)
        finally:
            runner.close()
        if oversized:
            family, guides = self.family.reduced(self.guides)
            results += large.check_reduced(family, guides, oversized, dtype, progress=self.progress)
        if "denoiser" in oversized:
            results += large.check_fused(self.staging.folder, self.tensors["denoiser"], self.loras)
        return results

    def _manifest(self) -> Manifest:
        loras = tuple(
            format_.LoraSource(phase, item.file.name, hashing.sha256_of_file(item.file), item.scale, item.alpha)
            for phase, item in self.loras.items()
            if item
        )
        guides = tuple(
            format_.GuideSource(phase, item.file.name, hashing.sha256_of_file(item.file), item.config.kind)
            for phase, item in self.guides.items()
        )
        files = [item.file for item in self.tokenizers.values()]
        for graph in self.graphs.values():
            files += [*graph.files.values(), *graph.weights]
        for engines in self.engines.values():
            for engine in engines.graphs.values():
                files += [engine.file, *engine.weights]
        return Manifest(
            format=format_.FORMAT,
            name=self.plan.name,
            family=self.family.name,
            provenance=format_.Provenance(self.model.resolve().name, loras, self.tools | {"build": self.key}, guides),
            image=self.image,
            tokenizers=self.tokenizers,
            guidance=format_.Guidance(self.plan.guidance.scale, self.plan.guidance.negative_prompt, self.scales),
            schedules=self.schedules,
            graphs=self.graphs,
            engines=self.engines,
            files=self.staging.entries(files),
        )

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _check_phase_names(plan: Recipe) -> None:
    """Phases name files: beside ``denoiser.base.safetensors``, and on file systems where case does not count."""
    taken = {"base"}
    for i, name in enumerate(phase.name for phase in plan.phases):
        if name.lower() in taken:
            raise RecipeError(
                f"phases[{i}].name: {name!r} would name a file that the bundle has already; choose another name"
            )
        taken.add(name.lower())


def table(config: Mapping[str, Any], plan: Recipe) -> format_.Schedule:
    """A recipe's schedule for a model with this scheduler config, as a bundle holds it. Raises `RecipeError`."""
    phases = [(phase.name, phase.steps) for phase in plan.phases]
    compiled = schedule.compile_schedule(config, phases, teacher_steps=plan.teacher_steps, sampler=plan.sampler)
    steps = tuple(format_.Step(step.phase, step.timestep, (step.c_in, step.a, step.b)) for step in compiled.steps)
    return format_.Schedule(steps, initial_noise_scale=compiled.initial_noise_scale)


def _lacking(folder: Path, names: Sequence[str]) -> ModelError:
    return ModelError(
        f"{folder}: its weights lack {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    )

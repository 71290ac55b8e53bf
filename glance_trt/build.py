"""From a recipe to a bundle: fuse, trace, build engines, compare with PyTorch, and put it all in its place at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from glance_trt import __version__, hashing, recipe, schedule, strict
from glance_trt import bundle as format_
from glance_trt.bundle import Bundle, Engine, EngineSet, Graph, Manifest
from glance_trt.engines import targets
from glance_trt.engines.targets import Target
from glance_trt.errors import GlanceError, OutputError, TargetError
from glance_trt.progress import Progress, silent
from glance_trt.recipe import Recipe
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
    wanted = [targets.load(name) for name in engines or plan.engines]
    for target in wanted:
        if reason := unavailable(target):
            raise TargetError(f"target {target.name}: {reason}. Buildable here: {_buildable()}")
    previous = _previous(output)
    with writing(output):
        return _Build(plan, folder, wanted, output, previous, overwrite, progress).run()


def unavailable(target: Target) -> str | None:
    """Why this machine cannot build a target; None if it can."""
    if target.backend == "onnxruntime":
        from glance_trt.engines import onnxruntime

        return onnxruntime.unavailable(target)
    from glance_trt.engines import tensorrt

    return tensorrt.unavailable(target)


def _buildable() -> str:
    shipped = [targets.load(name) for name in recipe.shipped_files("target")]
    return ", ".join(target.name for target in shipped if unavailable(target) is None) or "none of the shipped targets"


def _previous(output: Path) -> Bundle | None:
    if not output.exists():
        return None
    if not (output / format_.MANIFEST).is_file():
        raise OutputError(f"{output}: exists and is no bundle; give another -o")
    try:
        return Bundle.open(output)
    except GlanceError:
        return None  # damaged: there is nothing to take over


class _Build:
    """One run of `build`; its methods are the stages, in order."""

    def __init__(
        self,
        plan: Recipe,
        folder: Path,
        wanted: Sequence[Target],
        output: Path,
        previous: Bundle | None,
        overwrite: bool,
        progress: Progress,
    ) -> None:
        from glance_trt.export.families import open_model

        self.plan, self.targets, self.output, self.progress = plan, wanted, output, progress
        self.previous, self.overwrite = previous, overwrite
        self.model = folder / plan.model
        self.family = open_model(self.model, plan)
        self.image = self.family.image()
        self.schedules = {"default": _table(self.family.scheduler_config(), plan)}
        self.sources = self.family.sources()
        self.tensors = self._read_weights()
        self.loras = self._read_loras(folder)
        self.graphs: dict[str, Graph] = {}
        self.engines: dict[str, EngineSet] = {}
        self.tokenizers: dict[str, format_.Tokenizer] = {}
        self.seconds: dict[str, float] = {}
        self.tools = {name: metadata.version(name) for name in _TOOLS} | {"glance-trt": __version__}

    def run(self) -> Report:
        if self.output.exists() and not self.overwrite and not self._is_current():
            raise OutputError(f"{self.output} exists and differs from what the recipe makes; give --overwrite or another -o")
        if self.previous and self._is_current():
            return Report(self.previous, {}, [], self._notes(), unchanged=True)
        self.staging = Staging(self.output)
        if self.previous:
            self.staging.take_over(self.previous)
        with self._timed("tokenizer"):
            self._write_tokenizers()
        for kind in self.sources:
            with self._timed("fuse and export"):
                self._export(kind)
        for target in self.targets:
            with self._timed(f"engines {target.name}"):
                self._compile(target)
        with self._timed("parity"):
            parity = self._compare()
        with self._timed("finish"):
            self.staging.finish(self._manifest())
        return Report(Bundle.open(self.output), self.seconds, parity, self._notes())

    # --- what the build starts from ---

    def _read_weights(self) -> dict[str, dict[str, Any]]:
        from glance_trt.export.weights import component_tensors

        return {kind: component_tensors(self.model / part) for kind, part in self.family.components.items()}

    def _read_loras(self, folder: Path) -> dict[str, Any]:
        from glance_trt.export import lora

        return {
            phase.name: lora.read(folder / phase.lora.file, self.tensors["denoiser"], phase.lora.scale) if phase.lora else None
            for phase in self.plan.phases
        }

    def _notes(self) -> tuple[str, ...]:
        return tuple(
            f"{item.file} gives no alpha; its scale is taken as {item.scale:g}. If it was trained at alpha / rank, set "
            f"'scale' beside the file in the recipe"
            for phase in self.plan.phases
            if (item := self.loras[phase.name]) and item.alpha is None and phase.lora and phase.lora.scale is None
        )

    def _inputs_key(self, kind: str) -> str:
        """The key of everything from outside that a graph's weights depend on."""
        files = sorted({ref.file for ref in self.tensors[kind].values()})
        loras = self.loras if kind == "denoiser" else {}
        return key_of(
            [hashing.sha256_of_file(file) for file in files],
            [(phase, item and (hashing.sha256_of_file(item.file), item.scale)) for phase, item in loras.items()],
        )

    def _graph_key(self, kind: str, dtype: str) -> str:
        config = (self.model / self.family.components[kind] / "config.json").read_text()
        source = self.sources[kind]
        guidance = strict.write(self.plan.guidance) if kind == "denoiser" else None
        ports = [strict.write(port) for port in (*source.inputs, *source.outputs)]
        return key_of("graph", self._inputs_key(kind), config, guidance, ports, dtype, self.tools)

    def _build_key(self) -> str:
        """The key of the whole bundle."""
        graphs = [self._graph_key(kind, target.dtype) for kind in self.sources for target in self.targets]
        rest = [strict.write(self.schedules["default"]), strict.write(self.image), strict.write(self.plan.guidance)]
        return key_of(self.plan.name, graphs, rest, [(strict.write(t), _requires(t)) for t in self.targets])

    def _is_current(self) -> bool:
        return self.previous is not None and self.previous.manifest.provenance.tools.get("build") == self._build_key()

    # --- the stages ---

    def _write_tokenizers(self) -> None:
        for name, (text, length, pad) in self.family.tokenizers().items():
            file = f"{name}.json"

            def make(file: str = file, text: str = text) -> list[str]:
                (self.staging.folder / file).write_text(text, encoding="utf-8")
                return [file]

            self.staging.stage(key_of("tokenizer", file, text), make)
            self.tokenizers[name] = format_.Tokenizer(file, length, pad)

    def _export(self, kind: str) -> None:
        """The weights of one component, and a graph for each dtype that a target asks for (and phase, if a denoiser)."""
        from glance_trt.export import trace, weights

        names = [f"denoiser.{phase.name}" for phase in self.plan.phases] if kind == "denoiser" else [kind]
        dtypes = sorted({target.dtype for target in self.targets})
        weights_key = key_of("weights", kind, self._inputs_key(kind), self.tools)
        keys = {dtype: self._graph_key(kind, dtype) for dtype in dtypes}
        missing = [dtype for dtype in dtypes if not self.staging.has(keys[dtype])]
        traced = {}
        for dtype in missing or (dtypes[:1] if not self.staging.has(weights_key) else []):
            self.progress(f"trace {kind} {dtype}", 0, 1)
            traced[dtype] = trace.trace(self.sources[kind], dtype)
            self.progress(f"trace {kind} {dtype}", 1, 1)

        def fuse() -> list[str]:
            used = trace.weight_names(next(iter(traced.values())))
            return self._write_weights(kind, used)

        files = self.staging.stage(weights_key, fuse)
        tensors = {file: weights.read_header(self.staging.folder / file)[0] for file in files}
        for dtype in dtypes:

            def bind(dtype: str = dtype) -> Iterator[str]:
                for name in names:
                    trace.bind(traced[dtype], _merged(tensors, name), self.staging.folder / f"{name}.{dtype}.onnx")
                    yield f"{name}.{dtype}.onnx"

            self.staging.stage(keys[dtype], bind)
        source = self.sources[kind]
        guidance = self.plan.guidance.mode if kind == "denoiser" else "none"
        for name in names:
            own = [file for file in files if file in (f"{name}.safetensors", "denoiser.base.safetensors")]
            graph_files = {dtype: f"{name}.{dtype}.onnx" for dtype in dtypes}
            self.graphs[name] = Graph(source.inputs, source.outputs, graph_files, tuple(own), guidance)

    def _write_weights(self, kind: str, used: Sequence[str]) -> list[str]:
        from glance_trt.export import weights
        from glance_trt.export.fuse import fuse

        available = self.tensors[kind]
        chosen = {name: available.get(name) or available.get(self.family.weight_name(name)) for name in used}
        if lacking := [name for name, ref in chosen.items() if ref is None]:
            raise _lacking(self.model / self.family.components[kind], lacking)
        if kind == "denoiser":
            return fuse(chosen, self.loras, self.staging.folder, self.progress)
        file = f"{kind}.safetensors"
        weights.write(self.staging.folder / file, chosen, self.progress, f"copy {kind}")
        return [file]

    def _compile(self, target: Target) -> None:
        """The engines of one target."""
        files = {name: self.staging.folder / graph.files[target.dtype] for name, graph in self.graphs.items()}
        contents = {
            name: [hashing.sha256_of_file(self.staging.folder / file) for file in (files[name].name, *graph.weights)]
            for name, graph in self.graphs.items()
        }
        requires = _requires(target)
        if target.backend == "onnxruntime":
            from glance_trt.engines import onnxruntime

            groups = {name: "denoiser" for name in files if name.startswith("denoiser.")}

            def optimise() -> list[str]:
                engines = onnxruntime.build(
                    files, directory=self.staging.folder, prefix=target.name, groups=groups, progress=self.progress
                )
                return sorted({file for engine in engines.values() for file in (engine.file, *engine.weights)})

            names = self.staging.stage(key_of("engine", strict.write(target), requires, contents), optimise)
            engines = {name: _optimised(self.staging.folder, names, f"{target.name}.{name}.onnx") for name in files}
        else:
            engines = {}
            for name, file in files.items():
                make = self._tensorrt(target, name, file)
                key = key_of("engine", strict.write(target), requires, name, contents[name])
                engines[name] = Engine(self.staging.stage(key, make)[0])
        self.engines[target.name] = EngineSet(target.backend, target.dtype, engines, requires)

    def _tensorrt(self, target: Target, name: str, file: Path) -> Callable[[], list[str]]:
        from glance_trt.engines import tensorrt

        def make() -> list[str]:
            ranges = {name: _ranges(self.graphs[name], target, self.image)}
            built = tensorrt.build(
                {name: file}, directory=self.staging.folder, prefix=target.name, target=target, shapes=ranges,
                progress=self.progress,
            )  # fmt: skip
            return [built[name].file]

        return make

    def _compare(self) -> Sequence[Any]:
        """The engines that run here against PyTorch; without any, the portable graphs through ONNX Runtime."""
        from glance_trt.export import parity
        from glance_trt.runtime.runners.onnxruntime import OnnxRuntimeRunner

        here = next((target for target in self.targets if target.backend == "onnxruntime"), None)
        dtype = here.dtype if here else self.targets[0].dtype
        chosen = self.engines[here.name].graphs if here else {}
        files = {name: chosen[name].file if here else graph.files[dtype] for name, graph in self.graphs.items()}
        runner = OnnxRuntimeRunner(self.staging.folder, files)
        reference = parity.Reference(self.family, self.model, self.loras)
        try:
            return parity.check(runner, dict.fromkeys(files, dtype), reference, self.sources, self.progress)
        finally:
            runner.close()

    def _manifest(self) -> Manifest:
        loras = tuple(
            format_.LoraSource(phase, item.file.name, hashing.sha256_of_file(item.file), item.scale, item.alpha)
            for phase, item in self.loras.items()
            if item
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
            provenance=format_.Provenance(
                Path(self.plan.model).name, loras, self.tools | {"build": self._build_key()}
            ),
            image=self.image,
            tokenizers=self.tokenizers,
            guidance=format_.Guidance(self.plan.guidance.scale, self.plan.guidance.negative_prompt),
            schedules=self.schedules,
            graphs=self.graphs,
            engines=self.engines,
            files=self.staging.entries(files),
        )

    def _timed(self, stage: str) -> Any:
        return _Timer(self.seconds, stage)


class _Timer:
    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds, self._stage = seconds, stage

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + time.perf_counter() - self._start


def _table(config: Mapping[str, Any], plan: Recipe) -> format_.Schedule:
    phases = [(phase.name, phase.steps) for phase in plan.phases]
    compiled = schedule.compile_schedule(config, phases, teacher_steps=plan.teacher_steps, sampler=plan.sampler)
    steps = tuple(format_.Step(step.phase, step.timestep, (step.c_in, step.a, step.b)) for step in compiled.steps)
    return format_.Schedule(steps, initial_noise_scale=compiled.initial_noise_scale)


def _merged(tensors: Mapping[str, Mapping[str, Any]], graph: str) -> dict[str, Any]:
    """The tensors of one graph: its phase's own before the shared ones."""
    merged: dict[str, Any] = {}
    for file in ("denoiser.base.safetensors", f"{graph}.safetensors"):
        merged |= tensors.get(file, {})
    return merged


def _ranges(graph: Graph, target: Target, image: format_.Image) -> dict[str, Any]:
    """For each input with named dimensions: its smallest, usual and largest shape on a target."""
    _, height, width = image.latent_shape

    def shape(port: format_.Port, batch: int) -> tuple[int, ...]:
        sizes = {"h": height, "w": width}
        return tuple(
            dim if isinstance(dim, int) else batch if dim == "batch" else sizes[dim.rpartition("*")[2]] for dim in port.shape
        )

    batches = (target.min_batch, target.opt_batch, target.max_batch)
    return {
        port.name: tuple(shape(port, batch) for batch in batches)
        for port in graph.inputs
        if any(isinstance(dim, str) for dim in port.shape)
    }


def _requires(target: Target) -> dict[str, str]:
    if target.backend == "onnxruntime":
        from glance_trt.engines import onnxruntime

        return onnxruntime.requires(target)
    from glance_trt.engines import tensorrt

    return tensorrt.requires(target)


def _optimised(folder: Path, names: Sequence[str], file: str) -> Engine:
    """An optimised model among `names`, with the weights files it refers to."""
    import onnx_ir as ir

    tensors = [value.const_value for value in ir.load(folder / file).graph.initializers.values()]
    used = {Path(tensor.location).name for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return Engine(file, tuple(name for name in names if name in used))


def _lacking(folder: Path, names: Sequence[str]) -> GlanceError:
    from glance_trt.errors import ModelError

    return ModelError(f"{folder}: its weights lack {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))



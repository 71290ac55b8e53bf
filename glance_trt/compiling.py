"""Compiles engines from portable graphs: as a stage of a build, and for a bundle that is there already.

The second needs neither the model nor PyTorch, so that a bundle can be built on one machine and compiled on the GPU
that is to run it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from glance_trt import hashing, recipe, strict, trust
from glance_trt.bundle import Bundle, DType, Engine, EngineSet, Graph, Image, Tokenizer
from glance_trt.engines import backends, targets
from glance_trt.engines.targets import Target
from glance_trt.errors import BundleError, TargetError
from glance_trt.progress import Progress, silent
from glance_trt.staging import Staging, key_of, locked, writing
from glance_trt.worker import Worker

Precision = dict[str, dict[str, dict[str, int]]]
"""The number of layers by graph, type of layer and dtype."""


@dataclass(frozen=True)
class Compiled:
    """What `compile_bundle` did: the bundle, seconds per target (wall clock), and what the layers compute in."""

    bundle: Bundle
    seconds: dict[str, float] = field(default_factory=dict)
    precision: dict[str, Precision] = field(default_factory=dict)


def compile_bundle(folder: Path, engines: Sequence[str], *, progress: Progress = silent) -> Compiled:
    """Compile a bundle's graphs for targets (files, or names of shipped ones), and put the engines into the bundle.

    Engines that it has for a target of the same name are made anew, whoever made them. Raises `TargetError` for a
    target that this machine cannot build, or whose dtype the bundle's graphs are not in, and `GlanceError`s of other
    kinds; the bundle is as before then.
    """
    wanted = targets.load_all(engines)
    check_buildable(wanted)
    with writing(folder), locked(folder, progress):
        bundle = Bundle.open(folder)
        manifest = bundle.manifest
        dtypes = {target.name: _dtypes(bundle, target) for target in wanted}
        kept = {name: item for name, item in manifest.engines.items() if name not in dtypes}
        files = portable_files(manifest.tokenizers, manifest.graphs)
        files += [file for item in kept.values() for file in item.files()]
        # Without the engines that are to be replaced: those are taken over from nobody.
        previous = replace(manifest, engines=kept, files={name: manifest.files[name] for name in set(files)})
        staging = Staging(folder, Bundle(folder, previous, bundle.sha256))
        for name in dict.fromkeys(files):
            entry = manifest.files[name]
            staging.keep(name) if trust.is_foreign(name, entry.sha256) else staging.stage(entry.key, _refuse)
        made, seconds = dict(kept), dict[str, float]()
        precision: dict[str, Precision] = {}
        for target in wanted:
            start = time.perf_counter()
            precision[target.name] = {}
            made[target.name] = engine_set(
                target,
                manifest.graphs,
                dtypes[target.name],
                manifest.image,
                staging,
                precision[target.name],
                progress=progress,
            )
            seconds[target.name] = time.perf_counter() - start
        files += [file for item in made.values() for file in item.files()]
        staging.finish(replace(manifest, engines=made, files=staging.entries(files, progress)))
        return Compiled(Bundle.open(folder), seconds, precision)


def engine_set(
    target: Target,
    graphs: Mapping[str, Graph],
    dtypes: Mapping[str, DType],
    image: Image,
    staging: Staging,
    precision: Precision,
    *,
    progress: Progress = silent,
) -> EngineSet:
    """The engines of one target, compiled where `staging` has them not yet. dtypes: what each graph computes in.

    What layers compute in is put into `precision`, where a plan was compiled.
    """
    requires = backends.requires(target)
    engines = backends.portable(target, graphs, dtypes)
    if engines is None:
        engines, groups = {}, dict[str, dict[str, Graph]]()
        for name, graph in graphs.items():
            # With ONNX Runtime the denoiser's phases share weights, so are made together.
            group = name.partition(".")[0] if target.backend == "onnxruntime" else name
            groups.setdefault(group, {})[name] = graph
        for group, members in groups.items():
            engines |= _group(target, group, members, dtypes, image, staging, requires, precision, progress)
    return EngineSet(target.backend, target.dtype, engines, requires, target.weight_streaming_budget)


def check_buildable(wanted: Sequence[Target]) -> None:
    """Raise `TargetError` for a target that this machine cannot build, with the shipped ones that it can."""
    for target in wanted:
        if reason := backends.unavailable(target):
            shipped = [targets.load(name) for name in recipe.shipped_files("target")]
            able = ", ".join(item.name for item in shipped if backends.unavailable(item) is None)
            raise TargetError(
                f"target {target.name}: {reason}. Buildable here: {able or 'none of the shipped targets'}"
            )


def portable_files(tokenizers: Mapping[str, Tokenizer], graphs: Mapping[str, Graph]) -> list[str]:
    """The files of a bundle that no target needs alone: tokenizers, graphs and their weights."""
    files = [item.file for item in tokenizers.values()]
    return files + [file for graph in graphs.values() for file in (*graph.files.values(), *graph.weights)]


def _group(
    target: Target,
    group: str,
    graphs: Mapping[str, Graph],
    dtypes: Mapping[str, DType],
    image: Image,
    staging: Staging,
    requires: Mapping[str, str],
    precision: Precision,
    progress: Progress,
) -> dict[str, Engine]:
    files = {name: staging.folder / graph.files[dtypes[name]] for name, graph in graphs.items()}
    own = {name: dtypes[name] for name in graphs}
    ranges = {name: backends.ranges(graph, target, image) for name, graph in graphs.items()}

    def make(folder: Path) -> Iterator[str]:
        with Worker(f"{target.name}.{group}") as worker:
            built = worker.call(
                backends.build, target, files, ranges, group=group, directory=folder, dtypes=own, progress=progress
            )
        if target.backend != "onnxruntime":
            trust.remember(hashing.sha256_of_file(folder / item.file) for item in built.values())
        for name, item in built.items():
            if item.precision:
                precision[name] = item.precision
            yield from (item.file, *item.weights)

    made_of = [staging.key(file) for name in graphs for file in (files[name].name, *graphs[name].weights)]
    staging.stage(key_of("engine", strict.write(target), requires, ranges, made_of), make)
    engines = {}
    for name in graphs:
        engine = backends.built(target, staging.folder, name)
        engines[name] = replace(engine, dtype=dtypes[name]) if dtypes[name] != target.dtype else engine
    return engines


def _dtypes(bundle: Bundle, target: Target) -> dict[str, DType]:
    """What each graph is to compute in: the target's dtype, or where the bundle holds a graph in another on purpose,
    that one."""
    graphs = bundle.manifest.graphs
    known = sorted({dtype for graph in graphs.values() for dtype in graph.files})
    if target.dtype not in known:
        raise TargetError(
            f"{bundle.directory}: its graphs are in {', '.join(known)}, and target {target.name} computes in "
            f"{target.dtype}; build the bundle from its recipe for a target of that dtype too (glance-trt build RECIPE "
            "--engine cuda makes graphs in float16), or change the target's dtype"
        )
    others = {name: cast(DType, next(iter(graph.files))) for name, graph in graphs.items()}
    return {name: target.dtype if target.dtype in graph.files else others[name] for name, graph in graphs.items()}


def _refuse(_: Path) -> list[str]:
    raise BundleError("its files changed while it was compiled; check it with glance-trt verify")

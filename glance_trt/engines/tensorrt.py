"""TensorRT and TensorRT-RTX: compiles each portable graph into a plan.

The two are one Python API under two module names, so one implementation serves both, driven through Polygraphy. Each
plan is compiled in a process of its own (`glance_trt.engines.compiler`), for three reasons: at its import, Polygraphy
settles which of the two it drives; the builder spends nearly all its time in a stretch without callbacks, where only
ending its process stops it; and a builder that crashes, or runs out of memory, becomes an error.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from glance_trt import gpu
from glance_trt.engines.precision import Counts
from glance_trt.engines.targets import Ranges, Target
from glance_trt.errors import OutputError, TargetError
from glance_trt.progress import Progress, silent
from glance_trt.requirements import PACKAGES, is_installed, load, pip_install, this_platform
from glance_trt.trust import PLAN
from glance_trt.worker import RemoteError, Worker


def build(
    graphs: Mapping[str, Path],
    *,
    directory: Path,
    target: Target,
    ranges: Mapping[str, Sequence[Ranges]],
    dtypes: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> dict[str, Counts]:
    """Compile ``.onnx`` files, given by graph name, into `directory`; `file_name` tells what each plan is called there.

    A plan is the builder's own output, which trtexec and Polygraphy open, weights included. `ranges` gives, by graph,
    the shapes of the inputs that have dynamic dimensions, for each optimisation profile; `dtypes` what a graph is to
    compute in, where that is not the target's. The plans appear together once all are compiled; an error or an
    interruption leaves `directory` as it was. Each plan is a stage of `progress`: the share of its phases.

    Returns what each graph's layers compute in. Raises `TargetError`, with the builder's last errors, where this
    machine cannot build the target, the builder refuses a graph, or a graph does not compute in its dtype, and
    `OutputError` where a plan cannot be written.
    """
    if reason := unavailable(target):
        raise TargetError(f"target {target.name}: {reason}")
    counts = {}
    with _writing(directory):
        folder = tempfile.TemporaryDirectory(prefix=".building-", dir=directory)
    with folder as drafts:
        for graph, source in graphs.items():
            request = {
                "graph": graph,
                "dtype": (dtypes or {}).get(graph, target.dtype),
                "target": target,
                "profiles": [*ranges.get(graph, ())] or [{}],
                "stage": f"compile {target.name}.{graph}",
            }
            counts[graph] = _compile_apart(source, Path(drafts, file_name(target, graph)), progress, **request)
        with _writing(directory):
            for name in (file_name(target, graph) for graph in graphs):
                os.replace(Path(drafts, name), directory / name)
    return counts


def file_name(target: Target, graph: str) -> str:
    """Of the plan of a graph."""
    return f"{target.name}.{graph}{PLAN}"


def unavailable(target: Target) -> str | None:
    """Why this machine cannot build `target`, which is not named, and what can be done; None if it can."""
    package = PACKAGES[target.backend]
    if target.backend == "tensorrt":  # first of all: without a GPU nothing that could be installed would help
        try:
            present = gpu.compute_capability()
        except TargetError as error:
            return (
                f"{package.title} compiles for the GPU of the machine it runs on, and {error}; build on the machine "
                "that will run the engines, or for a tensorrt-rtx target, which needs no GPU"
            )
    try:
        module = load(target.backend)
    except TargetError as error:
        return str(error)
    if not is_installed("polygraphy"):
        return f"{package.title} needs Polygraphy to build, which is not installed; {pip_install(package.extra)}"
    if target.backend == "tensorrt-rtx":
        known = _compilable(module)
        if unknown := [capability for capability in target.compute_capabilities if capability not in known]:
            return (
                f"compute_capabilities: {package.title} {module.__version__} cannot compile for "
                f"{', '.join(unknown)}; it can for {', '.join(known)}"
            )
        return None
    if target.compute_capabilities and present not in target.compute_capabilities:
        return (
            f"compute_capabilities: {package.title} compiles for the GPU of the machine it runs "
            f"on, which is {present}, not {', '.join(target.compute_capabilities)}; build on such a machine"
        )
    if target.hardware_compatibility == "ampere_plus" and float(present) < 8:
        return (
            f"hardware_compatibility: ampere_plus is built on compute capability 8.0 or later, "
            f"and this machine's GPU has {present}"
        )
    return None


def requires(target: Target) -> dict[str, str]:
    """What a plan built here needs where it runs: the module's version, the compute capabilities that it holds and, of
    TensorRT, the platform; TensorRT-RTX's run on any. ``docs/bundle-format.md`` has the notation.

    Raises `TargetError` where this machine cannot build `target`.
    """
    if reason := unavailable(target):
        raise TargetError(f"target {target.name}: {reason}")
    module, version = PACKAGES[target.backend].module, str(load(target.backend).__version__)
    if target.backend == "tensorrt-rtx":
        return {module: version, "compute_capability": " ".join(target.compute_capabilities)}
    return {
        module: ".".join(version.split(".")[:2]) + "+" if target.version_compatible else version,
        "compute_capability": "8.0+" if target.hardware_compatibility == "ampere_plus" else gpu.compute_capability(),
        "platform": this_platform(),
    }


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{directory}: the plans cannot be written: {error.strerror}") from None


def _compilable(module: ModuleType) -> list[str]:
    """The compute capabilities that the module compiles for, such as ``"8.9"``, from enumerators such as SM89."""
    names = [name[2:] for name in module.ComputeCapability.__members__ if name.startswith("SM")]
    return [f"{name[:-1]}.{name[-1]}" for name in sorted(names, key=int)]


def _compile_apart(source: Path, plan: Path, progress: Progress, **request: Any) -> Counts:
    """Run `_compile` in a process of its own, which ends with this call, however this call ends."""
    target, stage = request["target"], request["stage"]
    what = f"{request['graph']}: {PACKAGES[target.backend].title}"
    environment = {"POLYGRAPHY_USE_TENSORRT_RTX": "1" if target.backend == "tensorrt-rtx" else "0"}
    progress(stage, 0, 1)
    with Worker(what, environment) as worker:
        try:
            counts = worker.call(_compile, source.absolute(), plan.absolute(), progress=progress, **request)
        except OSError as error:
            raise OutputError(f"{plan.name} cannot be written: {error.strerror}") from None
        except RemoteError as error:
            errors = _last_errors(worker.log()) or str(error).splitlines()[-1:]
            raise TargetError("\n  ".join([f"{what} could not compile {source}:", *errors])) from None
    progress(stage, 1, 1)
    return counts


def _compile(*arguments: Any, **named: Any) -> Counts:
    from glance_trt.engines import compiler  # this imports one of TensorRT and TensorRT-RTX, as the environment says

    return compiler.compile_plan(*arguments, **named)


def _last_errors(log: list[str]) -> list[str]:
    """The last three different errors that the builder logged; without any, Polygraphy's own."""
    lines = dict.fromkeys(line for line in log if not any(part in line for part in _NOISE))
    for mark in ("[E] ", "[!] "):
        if errors := [line[len(mark) :].strip() for line in lines if line.startswith(mark)]:
            return errors[-3:]
    return []


# TensorRT-RTX 1.7.1 logs the first as an error in every build, good ones too; the others frame a dump of a node.
_NOISE = ("Thread context has not been set!", "--- Begin node ---", "--- End node ---")

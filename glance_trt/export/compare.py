"""Parity of what a build made: engines that run here, or else the portable graphs, against PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from glance_trt.bundle import EngineSet
from glance_trt.export.inputs import Inputs
from glance_trt.export.parity import Parity, PortableRunner, Reference, check
from glance_trt.progress import Progress, silent
from glance_trt.runtime.runners import Runner, open_engines


@dataclass(frozen=True)
class Taken:
    """Shapes that engines take: numbers of images at once, and the latents' height and width."""

    batches: tuple[int, ...]
    latents: tuple[int, int]


def comparable(dtypes: Iterable[str]) -> str:
    """Of the dtypes that a portable graph is there in, the one to compare: ONNX Runtime has no bfloat16 on a CPU."""
    return next((dtype for dtype in sorted(dtypes) if dtype != "bfloat16"), "bfloat16")


def compare(
    inputs: Inputs,
    folder: Path,
    engines: EngineSet | Mapping[str, str],
    dtypes: Mapping[str, str],
    taken: Taken | None = None,
    progress: Progress = silent,
) -> list[Parity]:
    """Compare engines that were made in `folder`, or portable graphs given by the names of their files.

    dtypes: what each graph computes in. taken: what the engines take, if that is not everything. What is too large to
    be loaded is compared in small, and its fused weights by samples. Raises `ParityError`.
    """
    from glance_trt.export import large, phases

    runner: Runner
    if isinstance(engines, EngineSet):
        runner = open_engines(engines, folder, lambda file: (folder / file).read_bytes())
    else:
        runner = PortableRunner(folder, engines)
    guides = phases.guides(inputs.recipe, inputs.folder, inputs.family)
    oversized = large.oversized(inputs.tensors)
    whole = {name: dtype for name, dtype in dtypes.items() if name.partition(".")[0] not in oversized}
    reference = Reference(inputs.family, inputs.loras, inputs.encoders, guides)
    try:
        sources = inputs.family.sources(guides)
        if taken:
            results = check(runner, whole, reference, sources, progress, batches=taken.batches, latents=taken.latents)
        else:
            results = check(runner, whole, reference, sources, progress)
    finally:
        runner.close()
    if oversized:
        family, small = inputs.family.reduced(guides)
        kinds = {name.partition(".")[0]: dtype for name, dtype in dtypes.items()}
        results += large.check_reduced(family, small, oversized, kinds, progress=progress)
        changes = {graph: pairs for graph, pairs in inputs.changes().items() if graph.partition(".")[0] in oversized}
        results += large.check_fused(inputs.family, folder, inputs.tensors, changes)
    return results

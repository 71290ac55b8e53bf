"""The engine backends behind one door: what a target can be built with, what it needs, and building it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from glance_trt.bundle import Engine, Graph, Image, Port
from glance_trt.engines.targets import Target
from glance_trt.progress import Progress, silent

Ranges = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""For each input with named dimensions: its smallest, usual and largest shape."""

_FOR_ONNXRUNTIME = (("onnxruntime", "cpu"), ("onnx", "export"))


def unavailable(target: Target) -> str | None:
    """Why this machine cannot build a target; None if it can."""
    if target.backend == "onnxruntime":
        if target.dtype != "float32":
            return f"ONNX Runtime engines compute in float32 on a CPU, not in {target.dtype}; change the target's dtype"
        missing = [(name, extra) for name, extra in _FOR_ONNXRUNTIME if importlib.util.find_spec(name) is None]
        return f"{missing[0][0]} is not installed; pip install 'glance-trt[{missing[0][1]}]'" if missing else None
    from glance_trt.engines import tensorrt

    return tensorrt.unavailable(target)


def requires(target: Target) -> dict[str, str]:
    """What the engines of a target need where they run, if they are built here."""
    if target.backend == "onnxruntime":
        from glance_trt.runtime.runners.onnxruntime import requirements

        return requirements()
    from glance_trt.engines import tensorrt

    return tensorrt.requires(target)


def ranges(graph: Graph, target: Target, image: Image) -> Ranges:
    """The shapes that a graph's engine is to take; ONNX Runtime's take all."""
    if target.backend == "onnxruntime":
        return {}
    _, height, width = image.latent_shape

    def shape(port: Port, batch: int) -> tuple[int, ...]:
        sizes = {"h": height, "w": width}
        return tuple(
            dim if isinstance(dim, int) else batch if dim == "batch" else sizes[dim.rpartition("*")[2]]
            for dim in port.shape
        )

    return {
        port.name: (shape(port, target.min_batch), shape(port, target.opt_batch), shape(port, target.max_batch))
        for port in graph.inputs
        if any(isinstance(dim, str) for dim in port.shape)
    }


def build(
    target: Target,
    graphs: Mapping[str, Path],
    ranges: Mapping[str, Ranges],
    *,
    group: str,
    directory: Path,
    progress: Progress = silent,
) -> dict[str, Engine]:
    """Build a target's engines of ``.onnx`` files, given by graph name, into `directory`.

    ONNX Runtime's share the weights they have in common, in a file named for `group`. Raises `TargetError`,
    `ModelError` and `OutputError`.
    """
    if target.backend == "onnxruntime":
        from glance_trt.engines import onnxruntime

        groups = dict.fromkeys(graphs, group)
        return onnxruntime.build(graphs, directory=directory, prefix=target.name, groups=groups, progress=progress)
    from glance_trt.engines import tensorrt

    return tensorrt.build(
        graphs, directory=directory, prefix=target.name, target=target, shapes=ranges, progress=progress
    )


def built(target: Target, directory: Path, graph: str) -> Engine:
    """The engine of one graph among those that `build` left in `directory`."""
    if target.backend == "onnxruntime":
        return _optimised(directory, f"{target.name}.{graph}.onnx")
    return Engine(f"{target.name}.{graph}.plan")


def _optimised(folder: Path, file: str) -> Engine:
    """An optimised model, with the weights files that it refers to."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    model = onnx.load(folder / file, load_external_data=False)
    entries = (
        entry for tensor in _get_all_tensors(model) if uses_external_data(tensor) for entry in tensor.external_data
    )
    return Engine(file, tuple(sorted({entry.value for entry in entries if entry.key == "location"})))

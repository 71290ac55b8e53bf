"""The engine backends behind one door: what a target can be built with, what it needs, and building it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glance_trt.bundle import DType, Engine, Graph, Image, Port
from glance_trt.engines.targets import Profile, Ranges, Target
from glance_trt.errors import RecipeError
from glance_trt.progress import Progress, silent
from glance_trt.requirements import unrunnable

__all__ = [
    "Built",
    "build",
    "built",
    "check_profiles",
    "needs",
    "portable",
    "ranges",
    "requires",
    "unavailable",
    "unrunnable",
]

_MODULES = {"onnxruntime": ("onnxruntime", "onnx"), "onnxruntime-gpu": ("onnx",)}
"""By backend: the modules that building needs, which pip knows by the same names."""
_PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv_tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}


@dataclass(frozen=True)
class Built:
    """An engine that `build` made: its file, the weights files that this refers to, and what it was seen to compute in.

    precision: the number of layers, by type of layer and dtype; empty where the backend does not tell.
    """

    file: str
    weights: tuple[str, ...] = ()
    precision: dict[str, dict[str, int]] = field(default_factory=dict)


def unavailable(target: Target) -> str | None:
    """Why this machine cannot build a target; None if it can."""
    if target.backend not in _MODULES:
        from glance_trt.engines import tensorrt

        return tensorrt.unavailable(target)
    if target.backend == "onnxruntime" and target.dtype != "float32":
        return f"ONNX Runtime engines compute in float32 on a CPU, not in {target.dtype}; change the target's dtype"
    missing = [module for module in _MODULES[target.backend] if importlib.util.find_spec(module) is None]
    return f"{missing[0]} is not installed; pip install {' '.join(missing)}" if missing else None


def requires(target: Target) -> dict[str, str]:
    """What the engines of a target need where they run, if they are built here. Raises `TargetError`."""
    if target.backend == "onnxruntime":
        from glance_trt.runtime.runners.onnxruntime import requirements

        return requirements()
    if target.backend == "onnxruntime-gpu":
        return needs(target)
    from glance_trt.engines import tensorrt

    return tensorrt.requires(target)


def needs(target: Target) -> dict[str, str]:
    """What the engines of a target need where they run, wherever they are built."""
    if target.backend == "onnxruntime-gpu":
        return {"provider": _PROVIDERS[target.provider]}
    if target.hardware_compatibility == "ampere_plus":
        return {"compute_capability": "8.0+"}
    held = " ".join(target.compute_capabilities)
    return {"compute_capability": held} if held else {}


def ranges(graph: Graph, target: Target, image: Image) -> list[Ranges]:
    """The shapes that a graph's engine is to take, one for each optimisation profile; ONNX Runtime's take all.

    Raises `RecipeError` for a size of images that the graph cannot take.
    """
    if target.backend in _MODULES:
        return []
    found, (heights, widths) = [], _sides(image)
    for i, profile in enumerate(target.profiles or (Profile(),)):
        where = f"{target.name}: profiles[{i}]"
        sizes = {
            "batch": profile.batch,
            "h": _latents("height", profile.height or heights, graph, image, where),
            "w": _latents("width", profile.width or widths, graph, image, where),
        }
        shapes = {
            port.name: (_shape(port, sizes, 0, image), _shape(port, sizes, 1, image), _shape(port, sizes, 2, image))
            for port in graph.inputs
            if any(isinstance(dim, str) for dim in port.shape)
        }
        if shapes not in found:  # what differs for the denoiser may be the same for a text encoder
            found.append(shapes)
    return found


def check_profiles(target: Target, unit: int) -> None:
    """Raise `RecipeError` for a profile with a size of images that is no multiple of `unit` pixels."""
    for i, profile in enumerate(target.profiles):
        for side, pixels in (("height", profile.height), ("width", profile.width)):
            _check_multiples(f"{target.name}: profiles[{i}].{side}", pixels, unit)


def _check_multiples(where: str, pixels: tuple[int, ...], unit: int) -> None:
    for size in pixels:
        if size % unit:
            raise RecipeError(f"target {where}: expected multiples of {unit} pixels for this model, got {size}")


def _sides(image: Image) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The smallest, the usual and the largest height, and width, of all image sizes."""
    limits = image.sides[:2]
    heights = [image.height, *(height for height, _ in image.sizes), *limits]
    widths = [image.width, *(width for _, width in image.sizes), *limits]
    return (min(heights), image.height, max(heights)), (min(widths), image.width, max(widths))


def _latents(side: str, pixels: tuple[int, ...], graph: Graph, image: Image, where: str) -> tuple[int, ...]:
    """Sizes of images along one side, as sizes of the latents. Raises `RecipeError`."""
    ports = [port for port in graph.inputs if port.source != "image"]  # whose dimensions are pixels
    dims = [dim for port in ports for dim in port.shape if isinstance(dim, str)]
    factors = [int(factor) for factor, _, name in (dim.rpartition("*") for dim in dims) if name == side[0] and factor]
    unit = image.latent_scale * max(factors, default=1)
    _check_multiples(f"{where}.{side}", pixels, unit)
    return tuple(size // image.latent_scale for size in pixels)


def _shape(port: Port, sizes: Mapping[str, tuple[int, ...]], which: int, image: Image) -> tuple[int, ...]:
    names = [dim.rpartition("*")[2] if isinstance(dim, str) else dim for dim in port.shape]
    found = [name if isinstance(name, int) else sizes[name][which] for name in names]
    if port.source == "image":  # [B, height, width, 3], in pixels
        found[1:3] = [size * image.latent_scale for size in found[1:3]]
    return tuple(found)


def build(
    target: Target,
    graphs: Mapping[str, Path],
    ranges: Mapping[str, list[Ranges]],
    *,
    group: str,
    directory: Path,
    dtypes: Mapping[str, DType] | None = None,
    progress: Progress = silent,
) -> dict[str, Built]:
    """Build a target's engines of ``.onnx`` files, given by graph name, into `directory`.

    ONNX Runtime's share the weights they have in common, in a file named for `group`. dtypes: what each graph computes
    in, if that is not the target's own. Nothing is built where the portable graphs themselves are the engines, see
    `portable`. Raises `TargetError`, `ModelError` and `OutputError`.
    """
    if target.backend == "onnxruntime-gpu":
        return {}
    if target.backend == "onnxruntime":
        from glance_trt.engines import onnxruntime

        groups = dict.fromkeys(graphs, group)
        made = onnxruntime.build(graphs, directory=directory, prefix=target.name, groups=groups, progress=progress)
        return {name: Built(engine.file, engine.weights) for name, engine in made.items()}
    from glance_trt.engines import tensorrt

    counts = tensorrt.build(
        graphs, directory=directory, target=target, ranges=ranges, dtypes=dtypes or {}, progress=progress
    )
    return {graph: Built(tensorrt.file_name(target, graph), (), counted) for graph, counted in counts.items()}


def built(target: Target, directory: Path, graph: str) -> Engine:
    """The engine of one graph among those that `build` left in `directory`."""
    if target.backend == "onnxruntime":
        return _optimised(directory, f"{target.name}.{graph}.onnx")
    from glance_trt.engines import tensorrt

    return Engine(tensorrt.file_name(target, graph))


def portable(target: Target, graphs: Mapping[str, Graph], dtypes: Mapping[str, DType]) -> dict[str, Engine] | None:
    """The engines of a target that runs the portable graphs as they are; None for one whose engines are built.

    dtypes: what each graph computes in.
    """
    if target.backend != "onnxruntime-gpu":
        return None
    return {
        name: Engine(graph.files[dtypes[name]], graph.weights, None if dtypes[name] == target.dtype else dtypes[name])
        for name, graph in graphs.items()
    }


def _optimised(folder: Path, file: str) -> Engine:
    """An optimised model, with the weights files that it refers to."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    model = onnx.load(folder / file, load_external_data=False)
    entries = (
        entry for tensor in _get_all_tensors(model) if uses_external_data(tensor) for entry in tensor.external_data
    )
    return Engine(file, tuple(sorted({entry.value for entry in entries if entry.key == "location"})))

"""Parity: does a graph or an engine compute what PyTorch computes?

The reference is diffusers' and transformers' own modules, in float32. Its LoRAs are fused another way than
`glance_trt.export.lora` does, so that the comparison covers fusing too, and rounded like there: unfused ones would
differ by what rounding to bfloat16 does to the weights, which is no error.

PyTorch is imported where the reference computes, so that results can be read without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glance_trt.errors import ParityError
from glance_trt.export.families import Family, source_of, stored
from glance_trt.export.fuse import GUIDE
from glance_trt.export.lora import Lora, Pair
from glance_trt.export.source import Source
from glance_trt.export.weights import TensorRef, torch_dtype
from glance_trt.progress import Progress, silent
from glance_trt.runtime.runners import Runner

if TYPE_CHECKING:
    from torch import nn

    from glance_trt.export.guide import GuideFile

LIMIT = 2_000_000_000
"""A component whose weights in float32 are larger is not loaded, bytes: `glance_trt.export.large` compares it."""

TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest accepted error by the graph's compute dtype, relative to the reference's largest value."""

_PIXEL_TOLERANCE = {"float32": 1, "float16": 4, "bfloat16": 16}


@dataclass(frozen=True)
class Parity:
    """The largest difference of one graph from PyTorch: relative to the reference's largest value, or in pixel values
    of 0..255 for the decoder."""

    graph: str
    error: float
    tolerance: float

    def __str__(self) -> str:
        if self.graph == "decoder":
            return f"{self.error:g} of 255, at most {self.tolerance:g}"
        return f"{self.error:.1e} of the largest value, at most {self.tolerance:g}"


class Reference:
    """The PyTorch modules of a model, in float32, loaded one at a time."""

    def __init__(
        self,
        family: Family,
        loras: Mapping[str, Lora | None],
        encoders: Mapping[str, Mapping[str, Pair]] | None = None,
        guides: Mapping[str, GuideFile] | None = None,
    ) -> None:
        self._family, self._guides = family, guides or {}
        self._pairs: dict[str, Mapping[str, Pair]] = {
            f"denoiser.{phase}": item.pairs if item else {} for phase, item in loras.items()
        }
        self._pairs.update(encoders or {})
        self._sources = family.sources(self._guides)
        self._loaded: tuple[tuple[str, str], nn.Module] | None = None
        self._known: dict[str, tuple[str, TensorRef]] = {}

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What `graph` should put out for `inputs`, by name."""
        import torch

        kind, _, phase = graph.partition(".")
        source, key = source_of(self._sources, graph), (kind, phase if phase in self._guides else "")
        if not self._loaded or self._loaded[0] != key:
            self._loaded = None  # frees the module before, so that one is held at a time
            self._loaded = key, self._load(kind, phase, source)
        module = self._loaded[1]
        with torch.no_grad(), _fused(module, self._changes(graph)):
            values = [torch.from_numpy(np.asarray(inputs[port.name])) for port in source.inputs]
            found = module(*values)
        outputs = found if isinstance(found, tuple) else (found,)
        return {port.name: value.numpy() for port, value in zip(source.outputs, outputs, strict=True)}

    def _load(self, kind: str, phase: str, source: Source) -> nn.Module:
        module = source.build().float().eval()
        tensors = self._family.model.tensors(self._family.components[kind])
        if phase in self._guides:
            tensors |= {GUIDE + name: ref for name, ref in self._guides[phase].tensors.items()}
        names = {name.removeprefix(source.prefix): name for name in module.state_dict()}
        place = self._family.model.path(self._family.components[kind])
        found = stored(self._family, names, {name: (name, ref) for name, ref in tensors.items()}, place)
        module.load_state_dict({names[name]: ref.read().float() for name, (_, ref) in found.items()})
        self._known = {known: (names[name], ref) for name, (known, ref) in found.items()}
        return module

    def _changes(self, graph: str) -> Iterator[tuple[str, str, Pair]]:
        """What a LoRA changes in the loaded module: the parameter's name, the dtype it is stored in, the factors."""
        for known, pair in self._pairs.get(graph, {}).items():
            if known in self._known:  # a text encoder's graph may leave out the last layer
                name, ref = self._known[known]
                yield name, ref.dtype, pair


class PortableRunner:
    """A `Runner` of portable graphs as they are, through ONNX Runtime: slow to open, but no engine is needed."""

    def __init__(self, directory: Path, files: Mapping[str, str]) -> None:
        self._directory, self._files = directory, dict(files)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Runner.run`."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(str(self._directory / self._files[graph]), options, ["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, dict(inputs)), strict=True))

    def close(self) -> None:
        """Nothing stays open."""


def example_inputs(
    source: Source,
    batch: int,
    rng: np.random.Generator,
    vocabulary: int = 40,
    latents: tuple[int, int] | None = None,
) -> dict[str, NDArray[Any]]:
    """Random inputs in the range that sampling meets: unit noise, a middle timestep, a guidance scale of 4.

    latents: their height and width, where the engine does not take the small ones that are used otherwise.
    """
    fixed = {"timestep": 500.0, "guidance_scale": 4.0}
    sizes = dict(source.sizes) | {"batch": batch}
    for port in source.inputs:
        if latents and port.name in ("latents", "noise"):
            dims = [str(dim).rpartition("*") for dim in port.shape[2:]]
            sizes |= {name: size // int(factor or 1) for (factor, _, name), size in zip(dims, latents, strict=True)}
    inputs: dict[str, NDArray[Any]] = {}
    for port in source.inputs:
        shape = [dim if isinstance(dim, int) else _resolve(dim, sizes) for dim in port.shape]
        if port.dtype == "uint8":
            inputs[port.name] = rng.integers(0, 256, shape, np.uint8)
        elif port.name.endswith("mask"):  # tokens, of which a family may drop those of its template, then padding
            lengths = rng.integers(3 * shape[1] // 4, shape[1] + 1, (shape[0], 1))
            inputs[port.name] = (np.arange(shape[1]) < lengths).astype(np.int64)
        elif port.dtype == "int64":
            inputs[port.name] = rng.integers(0, vocabulary, shape)
        elif port.name in fixed:
            inputs[port.name] = np.array(fixed[port.name], np.float32)
        elif port.name == "coefficients":
            inputs[port.name] = np.array([0.9, 0.8, -0.5], np.float32)
        else:
            inputs[port.name] = rng.standard_normal(shape, dtype=np.float32)
    return inputs


def check(
    runner: Runner,
    graphs: Mapping[str, str],
    reference: Reference,
    sources: Mapping[str, Source],
    progress: Progress = silent,
    *,
    batches: Sequence[int] = (1, 3),
    latents: tuple[int, int] | None = None,
) -> list[Parity]:
    """Compare each graph (name to compute dtype) with the reference. Raises `ParityError`.

    batches: how many images at once. latents: as in `example_inputs`.
    """
    results = []
    progress("parity", 0, len(graphs))
    for done, (graph, dtype) in enumerate(graphs.items(), start=1):
        source, error = source_of(sources, graph), 0.0
        pixels = source.outputs[0].dtype == "uint8"
        for batch in batches:
            inputs = example_inputs(source, batch, np.random.default_rng(batch), latents=latents)
            found = runner.run(graph, inputs)
            for name, expected in reference.run(graph, inputs).items():
                largest = 1.0 if pixels else float(np.abs(expected).max()) or 1.0  # a mask may be all zeros
                differences = np.abs(found[name].astype(np.float64) - expected.astype(np.float64))
                error = float(np.maximum(error, differences.max() / largest))
        tolerance = _PIXEL_TOLERANCE[dtype] if pixels else TOLERANCES[dtype]
        if not error <= tolerance:
            raise ParityError(
                f"{graph}: differs from PyTorch by {error:.3g}; at most {tolerance:g} is accepted for {dtype}. Were "
                "the graph and the reference made from the same model and LoRAs?"
            )
        results.append(Parity(graph, error, tolerance))
        progress("parity", done, len(graphs))
    return results


def _resolve(dim: str, sizes: Mapping[str, int]) -> int:
    factor, _, name = dim.rpartition("*")
    return int(factor or 1) * sizes[name]


@contextlib.contextmanager
def _fused(module: nn.Module, changes: Iterable[tuple[str, str, Pair]]) -> Iterator[None]:
    """While open, parameters are changed by a LoRA's factors, and rounded to the dtype they are stored in."""
    from torch.nn import functional as F

    before = {}
    for name, dtype, pair in changes:
        weight = before[name] = module.get_parameter(name).data
        down, up = pair.down.read().double(), pair.up.read().double()
        # The update's columns are what the layer's two factors, one after the other, make of unit inputs.
        linear = weight.ndim == 2
        update = F.linear(down.T, up).T if linear else F.conv2d(down.transpose(0, 1), up).transpose(0, 1)
        changed = (weight.double() + pair.scale * update).to(torch_dtype(dtype))
        module.get_parameter(name).data = changed.float()
    try:
        yield
    finally:
        for name, weight in before.items():
            module.get_parameter(name).data = weight

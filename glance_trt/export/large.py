"""Parity of a model that is too large to be held in float32: its architecture in small, and samples of its weights.

Whether a graph computes what PyTorch computes depends on the model's kinds of blocks, not on their widths. So a model
of the same blocks with few channels and random weights is compared whole. What is left, fusing, is checked on samples
of the weights files that were written.
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from glance_trt.errors import ParityError
from glance_trt.export import parity, trace
from glance_trt.export.families import Family, stored
from glance_trt.export.guide import GuideFile
from glance_trt.export.lora import Pair
from glance_trt.export.model import Model
from glance_trt.export.parity import LIMIT, Parity
from glance_trt.export.source import Source
from glance_trt.export.weights import TensorRef, component_tensors, read_header, torch_dtype
from glance_trt.progress import Progress, silent
from glance_trt.runtime.runners import Runner

SAMPLES = 8
"""Fused tensors of each file that are checked, besides the largest."""


def oversized(tensors: Mapping[str, Mapping[str, TensorRef]]) -> dict[str, str]:
    """The components beyond `LIMIT`, of each component's tensors by name, with the dtype that they are stored in."""
    return {
        kind: next(iter(refs.values())).dtype
        for kind, refs in tensors.items()
        if 4 * sum(ref.size for ref in refs.values()) > LIMIT
    }


def check_reduced(
    family: Family,
    guides: Mapping[str, GuideFile],
    stored: Mapping[str, str],
    dtypes: Mapping[str, str],
    *,
    open_graphs: Callable[[Path, Mapping[str, str]], Runner] = parity.PortableRunner,
    progress: Progress = silent,
) -> list[Parity]:
    """Trace components of a small model, give them random weights, and compare their graphs with PyTorch.

    family, guides: what `Family.reduced` returns. stored: the components, with the dtype of their weights. dtypes:
    what each computes in. open_graphs: makes a runner of a folder and the graphs' files there by name, by default of
    the portable graphs as they are. Graphs are named as in `Family.sources`. Raises `ParityError`.
    """
    results: list[Parity] = []
    sources, done = family.sources(guides), set()
    for graph, source in sources.items():
        kind = graph.partition(".")[0]
        if kind not in stored or id(source) in done:  # phases with guides of one shape share a source
            continue
        done.add(id(source))
        with tempfile.TemporaryDirectory(prefix="glance-reduced-") as name:
            part = Path(name, family.components[kind])
            part.mkdir()
            save_file(_random_weights(source, stored[kind]), part / "diffusion_pytorch_model.safetensors")
            progress(f"trace reduced {graph}", 0, 1)
            trace.bind(trace.trace(source, dtypes[kind]), component_tensors(part), part / f"{graph}.onnx")
            progress(f"trace reduced {graph}", 1, 1)
            reference = parity.Reference(_at(family, Path(name)), dict.fromkeys(guides), guides=guides)
            runner = open_graphs(part, {graph: f"{graph}.onnx"})
            try:
                results += parity.check(runner, {graph: dtypes[kind]}, reference, sources, progress)
            except ParityError as error:
                raise ParityError(f"in a reduced model with random weights, {error}") from None
            finally:
                runner.close()
    return results


def check_fused(
    family: Family,
    folder: Path,
    tensors: Mapping[str, Mapping[str, TensorRef]],
    changes: Mapping[str, Mapping[str, Pair]],
) -> list[Parity]:
    """Compare samples of fused weights with ``W + scale * up @ down`` from the model and the LoRA.

    folder: that of the weights files, ``denoiser.<phase>.safetensors`` and ``text_encoder.safetensors``. tensors: the
    base model's, by component. changes: what is fused, by graph and by the weight's name in the base model. Which ones
    are sampled is always the same for a LoRA. Raises `ParityError` for any value that is not the result of float32
    arithmetic, rounded once, and for a weight that the file lacks.
    """
    results, sources = [], family.sources()
    for graph, pairs in changes.items():
        kind, file = graph.partition(".")[0], f"{graph}.safetensors"
        base = tensors[kind]
        known = stored(family, trace.parameter_names(sources[kind]), {name: name for name in base}, folder)
        names = {name: other for name, other in sorted(known.items()) if other in pairs}
        if not names:  # a text encoder's graph may leave out the last layer
            continue
        written = read_header(folder / file)[0]
        if lacking := names.keys() - written.keys():
            raise ParityError(f"{file}: lacks {min(lacking)}, which a LoRA changes; build the bundle again")
        largest = max(names, key=lambda name: written[name].length)
        for name in sorted({largest, *random.Random(0).sample(list(names), min(SAMPLES, len(names)))}):
            ref, pair = base[names[name]], pairs[names[name]]
            wrong = _wrong(written[name].read(), ref.read(), pair)
            if wrong:
                raise ParityError(
                    f"{file}: {wrong} values of {name} are not the model's plus the update of {pair.down.file}, "
                    f"rounded once to {ref.dtype}; build the bundle again"
                )
        results.append(Parity(file, 0.0, 0.0))
    return results


def _at(family: Family, folder: Path) -> Family:
    """A family's adapter whose weights are in another folder."""
    moved = copy.copy(family)
    moved.model = Model(folder, folder.name)
    return moved


def _random_weights(source: Source, dtype: str) -> dict[str, torch.Tensor]:
    """Such that every layer's outputs are about as large as its inputs, and no bias or norm does nothing."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, value in source.build().state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        value = noise / math.sqrt(value[0].numel()) if value.ndim > 1 else value + 0.1 * noise
        weights[name.removeprefix(source.prefix)] = value.to(torch_dtype(dtype))
    return weights


def _wrong(found: torch.Tensor, base: torch.Tensor, pair: Pair) -> int:
    """How many values of a fused tensor are wrong.

    A sum of float32 products depends on the order in which a machine adds them, within bounds (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1). So a value is right from the rounding of the lower bound to that of the
    upper one: in half precision these are almost always the same number.
    """
    down, up, wrong = pair.down.read().double().flatten(1), pair.up.read().double().flatten(1), 0
    for rows in _blocks(len(base)):
        weight, values = base[rows].double().flatten(1), found[rows].flatten(1)
        exact, terms = weight + pair.scale * (up[rows] @ down), abs(pair.scale) * (up[rows].abs() @ down.abs())
        slack = 2.0**-24 * (weight.abs() + (len(down) + 4) * terms)
        right = ((exact - slack).to(found.dtype) <= values) & (values <= (exact + slack).to(found.dtype))
        wrong += int((~right).sum())
    return wrong


def _blocks(rows: int, size: int = 256) -> Iterable[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))

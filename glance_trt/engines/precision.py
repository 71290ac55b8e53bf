"""What a network computes in: counted for the report, and checked against what was asked for.

Networks are strongly typed: TensorRT computes in the dtype of a layer's tensors, which the exported graph gives. One of
the wrong dtype would build, and be slow, or wrong, without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from glance_trt.errors import TargetError

if TYPE_CHECKING:
    import tensorrt as trt

Counts = dict[str, dict[str, int]]
"""The number of layers, by type of layer and dtype."""

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_FLOATS = frozenset(_DTYPES.values())

_HEAVY = {
    "CONVOLUTION",
    "DECONVOLUTION",
    "MATRIX_MULTIPLY",
    "EINSUM",
    "ATTENTION_INPUT",
    "ATTENTION_OUTPUT",
    "RECURRENCE",
}
"""Layers with most of the work, which have to be in the dtype that was asked for."""
_LIGHT = {"NORMALIZATION", "SOFTMAX", "RESIZE", "POOLING", "REDUCE", "SCALE", "ACTIVATION", "UNARY", "ELEMENTWISE"}
"""Layers that may be in float32 too: the sampler's step, timestep embeddings, what a model computes so itself. All
others move values, or convert them: weights, for example, may be stored in another dtype."""

# What the engine inspector calls layers with most of the work; TensorRT 10 and later fuses most of them in Myelin.
_HEAVY_IN_ENGINE = re.compile(r"conv|gemm|matmul|matrix|mha|attention", re.IGNORECASE)
# "Half", "Row major linear FP16 format", "Float", "BFloat16", ...; bfloat16 first, for it contains the other's name.
_NAMES_IN_ENGINE = (
    ("bfloat16", re.compile(r"bfloat|bf16", re.IGNORECASE)),
    ("float16", re.compile(r"half|fp16|float16", re.IGNORECASE)),
    ("float32", re.compile(r"float|fp32", re.IGNORECASE)),
)


def count(network: trt.INetworkDefinition) -> Counts:
    """The layers of a parsed network, by the dtype of their first output."""
    return _count((layer.type.name.lower(), _dtype(layer.get_output(0))) for layer in _layers(network))


def check(network: trt.INetworkDefinition, dtype: str, graph: str) -> None:
    """Raise `TargetError` where a network does not compute in `dtype`. graph: names it in the error."""
    wrong = []
    for layer in _layers(network):
        kind, found = layer.type.name, _dtype(layer.get_output(0))
        allowed = {dtype, "float32"} if kind in _LIGHT or _is_outer_product(layer) else {dtype}
        if kind in _HEAVY | _LIGHT and found in _FLOATS and found not in allowed:
            wrong.append(f"layer {layer.name} ({kind.lower()}) computes in {found}")
    _refuse(wrong, dtype, graph)


def count_engine(information: str) -> Counts:
    """The layers of a built engine, by the dtype of their first input; empty where the engine does not tell.

    information: what ``EngineInspector.get_engine_information`` says of a plan of detailed verbosity, as JSON. For
    dynamic shapes TensorRT has been seen to write "N/A due to dynamic shapes" in place of every dtype.
    """
    layers = [(str(layer.get("LayerType", "unknown")).lower(), _inputs(layer)[0]) for layer in _parsed(information)]
    return _count(layers) if any(dtype in _FLOATS for _, dtype in layers) else {}


def check_engine(information: str, dtype: str, graph: str) -> None:
    """Raise `TargetError` where a layer with most of the work has no input of `dtype`. Arguments as above."""
    wrong = []
    for layer in _parsed(information):
        kind, found = str(layer.get("LayerType", "")), _inputs(layer)
        if _HEAVY_IN_ENGINE.search(kind) and found[0] in _FLOATS and dtype not in found:
            wrong.append(f"layer {layer.get('Name')} ({kind}) of its engine computes in {found[0]}")
    _refuse(wrong, dtype, graph)


def _refuse(wrong: list[str], dtype: str, graph: str) -> None:
    if wrong:
        more = f", and {len(wrong) - 1} more do not compute in {dtype}" if len(wrong) > 1 else ""
        raise TargetError(
            f"{graph}: {wrong[0]}, asked for was {dtype}{more}. The graph was exported for another dtype, or holds a "
            "conversion that it should not: export it again, or change the target's dtype"
        )


def _count(layers: Iterable[tuple[str, str]]) -> Counts:
    counts: Counts = {}
    for kind, dtype in layers:
        of_kind = counts.setdefault(kind, {})
        of_kind[dtype] = of_kind.get(dtype, 0) + 1
    return {kind: dict(sorted(counts[kind].items())) for kind in sorted(counts)}


def _layers(network: trt.INetworkDefinition) -> list[trt.ILayer]:
    return [layer for layer in map(network.get_layer, range(network.num_layers)) if layer.num_outputs]


def _dtype(tensor: trt.ITensor) -> str:
    name: str = tensor.dtype.name
    return _DTYPES.get(name, name.lower())


def _is_outer_product(layer: trt.ILayer) -> bool:
    """Whether it multiplies vectors: positions by frequencies, for a rotary embedding, which is float32 by design."""
    if layer.type.name != "MATRIX_MULTIPLY":
        return False
    return all(1 in tuple(layer.get_input(i).shape)[-2:] for i in range(2))


def _parsed(information: str) -> list[dict[str, Any]]:
    try:
        layers = json.loads(information).get("Layers", [])
    except (ValueError, AttributeError):  # AttributeError: it is a list, or a text
        return []
    return [layer for layer in layers if isinstance(layer, dict)]  # of plans without detailed verbosity, they are names


def _inputs(layer: dict[str, Any]) -> list[str]:
    """The dtypes of a layer's inputs, at least one."""
    names = [str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs") or [] if isinstance(tensor, dict)]
    return [
        next((dtype for dtype, pattern in _NAMES_IN_ENGINE if pattern.search(name)), name.lower() or "unknown")
        for name in names
    ] or ["none"]

"""Finds attention in an exported graph and makes one node of it.

PyTorch's exporter writes scaled dot product attention as two products around a softmax, so that the scores of every
token against every other exist in memory: 512 MB in the first block of Stable Diffusion at 512 x 512, and again for the
softmax. ONNX Runtime's MultiHeadAttention works through them in blocks that fit the cache (FlashAttention, arXiv
2205.14135), but ONNX Runtime itself does not recognise the exporter's pattern.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

_DOMAIN = "com.microsoft"
_HEADS_FIRST = (0, 2, 1, 3)
"""[batch, tokens, heads, size] to [batch, heads, tokens, size]."""
_KEY_TRANSPOSED: tuple[list[Any], ...] = ([(0, 1, 3, 2)], ["Reshape", (0, 2, 1), "Reshape"])
"""What turns the last two axes of the keys, last operator first."""


@dataclass(frozen=True)
class _Heads:
    """A [batch, tokens, heads * size] tensor that the graph splits into heads and multiplies by `factor`."""

    tensor: str
    heads: int
    size: int
    factor: float


def fuse(model: onnx.ModelProto) -> int:
    """Replace each unmasked attention of `model`, in place, by a MultiHeadAttention node; returns how many.

    Attention with a mask, or whose heads are not split just before it, stays as it is.
    """
    graph = _Graph(model.graph)
    fused: dict[str, onnx.NodeProto] = {}
    for softmax in model.graph.node:
        if softmax.op_type == "Softmax" and (node := graph.attention(softmax)):
            fused[node.output[0]] = node
    nodes = [fused.get(node.output[0], node) for node in model.graph.node]
    live, kept = {output.name for output in model.graph.output}, []
    for node in reversed(nodes):
        if live.intersection(node.output):
            kept.append(node)
            live.update(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    if fused:
        constants = [tensor for tensor in model.graph.initializer if tensor.name in live]
        del model.graph.initializer[:]
        model.graph.initializer.extend(constants)
        del model.graph.value_info[:]  # would give shapes of what is gone
        if _DOMAIN not in [opset.domain for opset in model.opset_import]:
            model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return len(fused)


class _Graph:
    """A graph's nodes by what they produce and consume."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._consumers: dict[str, list[onnx.NodeProto]] = {output.name: [] for output in graph.output}
        for node in graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self._outputs = {output.name for output in graph.output}

    def attention(self, softmax: onnx.NodeProto) -> onnx.NodeProto | None:
        """What may stand for the attention around `softmax`; its output is [batch, tokens, heads * size]."""
        scores = self._producers.get(softmax.input[0])
        product = self._only_consumer(softmax, "MatMul")
        if _attribute(softmax, "axis", -1) not in (-1, 3) or scores is None or scores.op_type != "MatMul":
            return None
        if product is None or product.input[0] != softmax.output[0]:
            return None
        merged = self._only_consumer(product, "Transpose")
        if merged is None or _attribute(merged, "perm") != _HEADS_FIRST or not self._only_consumer(merged, "Reshape"):
            return None
        query = self._split(scores.input[0], [[]])
        key = self._split(scores.input[1], _KEY_TRANSPOSED)
        value = self._split(product.input[1], [[]])
        if query is None or key is None or value is None or value.factor != 1:
            return None
        if (query.heads, query.size) != (key.heads, key.size) or query.heads != value.heads:
            return None
        return helper.make_node(
            "MultiHeadAttention",
            [query.tensor, key.tensor, value.tensor],
            [merged.output[0]],
            name=f"{softmax.name}/attention",
            domain=_DOMAIN,
            num_heads=query.heads,
            scale=query.factor * key.factor,
        )

    def _split(self, name: str, between: list[list[Any]] | tuple[list[Any], ...]) -> _Heads | None:
        """Follow `name` back to where its heads are split, over one of the lists of operators in `between`."""
        factor, seen = 1.0, list[Any]()
        while (node := self._producers.get(name)) is not None:
            perm = _attribute(node, "perm") if node.op_type == "Transpose" else None
            if node.op_type == "Mul" and (constant := self._value(node.input[1])) is not None and constant.size == 1:
                factor *= constant.item()
            elif node.op_type == "Reshape":
                seen.append("Reshape")
            elif perm == _HEADS_FIRST:
                return self._unsplit(node.input[0], factor) if seen in between else None
            elif perm is not None:
                seen.append(perm)
            else:
                return None
            name = node.input[0]
        return None

    def _unsplit(self, name: str, factor: float) -> _Heads | None:
        node = self._producers.get(name)
        if node is None or node.op_type != "Reshape":
            return None
        dims = self._last_dims(node.input[1])
        return _Heads(node.input[0], *dims, factor) if dims and min(dims) > 0 else None

    def _last_dims(self, name: str) -> tuple[int, int] | None:
        """The last two of the four dimensions in the shape tensor `name`, if they are constant."""
        node = self._producers.get(name)
        if node is not None and node.op_type == "Concat" and len(node.input) == 4:
            parts = [self._value(part) for part in node.input[2:]]
        else:
            shape = self._value(name)
            parts = [] if shape is None or shape.size != 4 else [shape[2], shape[3]]
        sizes = [int(part.item()) for part in parts if part is not None and part.size == 1]
        return (sizes[0], sizes[1]) if len(sizes) == 2 else None

    def _value(self, name: str) -> NDArray[Any] | None:
        """The value of a constant that the graph itself holds."""
        tensor, node = self._constants.get(name), self._producers.get(name)
        if tensor is None and node is not None and node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL or math.prod(tensor.dims) > 4:
            return None
        return np.asarray(numpy_helper.to_array(tensor))

    def _only_consumer(self, node: onnx.NodeProto, operator: str) -> onnx.NodeProto | None:
        consumers = self._consumers.get(node.output[0], [])
        alone = len(consumers) == 1 and node.output[0] not in self._outputs
        return consumers[0] if alone and consumers[0].op_type == operator else None


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            value = helper.get_attribute_value(attribute)
            return tuple(value) if isinstance(value, list) else value
    return default

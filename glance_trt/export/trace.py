"""Traces a module without its weights, and points the resulting graph into weights files."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
from onnxscript import rewriter
from onnxscript.optimizer import optimize_ir
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from glance_trt.bundle import Port
from glance_trt.errors import ModelError
from glance_trt.export.source import Source
from glance_trt.export.weights import TensorRef

OPSET = 20
INLINE_LIMIT = 65536
"""Bytes; a larger constant in a graph is taken for a weight that lost its name. The causal mask of CLIP's 77 tokens
takes 5,929."""

_TORCH = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int64", "uint8")}
_STORED = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}

# onnxscript 0.7.2 tries its one rule for several nodes at once (SlicesSplit) on every pair of nodes: with it, FLUX.1's
# graph of 7,600 nodes, where it finds nothing, took 460 s of CPU time instead of 95 s.
_RULES = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule._target_pattern.has_single_output_node)


def trace(source: Source, dtype: str) -> ir.Model:
    """The optimised graph in compute dtype `dtype`, its initializers named like the weights and without data.

    No weight is allocated: parameters are fake tensors throughout. Raises `ModelError` for a model with a constant of
    more than `INLINE_LIMIT` bytes that is no weight.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _quiet(), torch.no_grad():
        with _fake_parameters(mode, _TORCH[dtype]):
            module = source.build().eval().requires_grad_(False)
        with mode:
            example = tuple(
                torch.zeros([_size(dim, source.sizes) for dim in port.shape], dtype=_TORCH[port.dtype])
                for port in source.inputs
            )
            symbols = {name: torch.export.Dim(name, min=1, max=limit) for name, limit in source.limits.items()}
            dynamic = [
                {i: _dimension(dim, symbols) for i, dim in enumerate(port.shape) if isinstance(dim, str)}
                for port in source.inputs
            ]
            program = torch.export.export(module, example, dynamic_shapes=_as_signature(module, dynamic))
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=[port.name for port in source.inputs],
            output_names=[port.name for port in source.outputs],
        )
    assert exported is not None
    model = exported.model
    _name_dimensions(model.graph.inputs, source.inputs)
    _name_dimensions(model.graph.outputs, source.outputs)
    # The optimizer must run (TensorRT's parser rejects the sequence ops it removes), and must not fold, merge or rename
    # weights. As inputs of the graph they are unknown to it.
    weights = _weights_to_inputs(model, module.state_dict().keys(), source.prefix)
    with mock.patch.object(rewriter, "_DEFAULT_REWRITE_RULES", _RULES):
        optimize_ir(model, onnx_shape_inference=False)
    _inputs_to_weights(model, weights)
    _strip(model)
    _check_constants(model, source.name)
    return model


def parameter_names(source: Source) -> list[str]:
    """The names of all weights of a module, which need not exist for it."""
    with _quiet(), _fake_parameters(FakeTensorMode(), torch.float32):
        return [name.removeprefix(source.prefix) for name in source.build().state_dict()]


def bind(model: ir.Model, tensors: Mapping[str, TensorRef], path: Path) -> tuple[str, ...]:
    """Save a copy of the traced graph whose initializers are `tensors`, beside the files these lie in.

    Where a tensor is stored in another dtype than the graph computes in, a Cast stands behind it. Returns the names of
    the weights files that the graph refers to.
    """
    model = model.clone()
    files = set()
    for name, value in list(model.graph.initializers.items()):
        if not isinstance(value.const_value, ir.ExternalTensor):
            continue
        if name not in tensors:
            raise ModelError(f"{path.name}: the model's weights lack {name}")
        ref = tensors[name]
        if tuple(value.const_value.shape) != ref.shape:
            raise ModelError(
                f"{ref.file}: {name} has shape {list(ref.shape)}, the model's configuration says "
                f"{list(value.const_value.shape)}"
            )
        if ref.dtype not in _STORED:
            raise ModelError(f"{ref.file}: {name} has dtype {ref.dtype}; a weight has one of {', '.join(_STORED)}")
        wanted, stored = value.const_value.dtype, _STORED[ref.dtype]
        value.const_value = _external(name, stored, ref.shape, ref.file.name, ref.offset, ref.length, path.parent)
        value.dtype = stored
        files.add(ref.file.name)
        if stored != wanted:
            _insert_cast(model, value, wanted)
    ir.save(model, path)
    return tuple(sorted(files))


def _insert_cast(model: ir.Model, value: ir.Value, wanted: ir.DataType) -> None:
    uses = list(value.uses())
    cast = ir.node("Cast", [value], attributes={"to": wanted}, name=f"{value.name}/cast")
    cast.outputs[0].name = f"{value.name}/{wanted.name.lower()}"
    cast.outputs[0].dtype = wanted
    cast.outputs[0].shape = value.shape
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])
    model.graph.insert_before(model.graph[0], cast)


def _external(
    name: str, dtype: ir.DataType, shape: Sequence[int], file: str, offset: int, length: int, folder: Path
) -> ir.ExternalTensor:
    return ir.ExternalTensor(file, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=folder)


def _weights_to_inputs(model: ir.Model, names: Iterable[str], prefix: str) -> list[ir.Value]:
    weights = [model.graph.initializers[name] for name in names if name in model.graph.initializers]
    for value in weights:
        assert value.name is not None and value.const_value is not None
        del model.graph.initializers[value.name]
        value.name = value.name.removeprefix(prefix)
        value.shape, value.dtype = ir.Shape(value.const_value.shape.numpy()), value.const_value.dtype
        value.const_value = None
        model.graph.inputs.append(value)
    return weights


def _inputs_to_weights(model: ir.Model, weights: Sequence[ir.Value]) -> None:
    for value in weights:
        assert value.name is not None and value.dtype is not None and value.shape is not None
        model.graph.inputs.remove(value)
        if value.uses():
            shape = tuple(int(n) for n in value.shape if isinstance(n, int))
            value.const_value = _external(value.name, value.dtype, shape, "weights", 0, 0, Path())
            model.graph.initializers.add(value)


def _strip(model: ir.Model) -> None:
    """Drop stack traces (with this machine's paths) and inferred shapes, whose symbols have no meaning any more."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "glance-trt", None, None
    model.graph.name = "main"
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = None
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def _check_constants(model: ir.Model, name: str) -> None:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        tensors += [a.as_tensor() for a in node.attributes.values() if a.type == ir.AttributeType.TENSOR]
    largest = max(
        (tensor.nbytes for tensor in tensors if tensor and not isinstance(tensor, ir.ExternalTensor)), default=0
    )
    if largest > INLINE_LIMIT:
        raise ModelError(
            f"{name}: the traced graph holds a constant of {largest} bytes; those above {INLINE_LIMIT} must come from "
            "the model's weights files, so this variant of the model is not supported"
        )


def _name_dimensions(values: Sequence[ir.Value], ports: Sequence[Port]) -> None:
    for value, port in zip(values, ports, strict=True):
        value.shape = ir.Shape(port.shape)


def _as_signature(module: nn.Module, values: Sequence[Any]) -> tuple[Any, ...]:
    """Values of a module's inputs, those that its ``forward`` takes as ``*rest`` in a tuple of their own."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = [item for item in parameters if item.kind is not inspect.Parameter.VAR_POSITIONAL]
    rest = tuple(values[len(named) :])
    return (*values[: len(named)], rest) if len(named) < len(parameters) else tuple(values)


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    factor, _, name = dim.rpartition("*")
    return int(factor or 1) * sizes[name]


def _dimension(dim: str, symbols: Mapping[str, object]) -> object:
    factor, _, name = dim.rpartition("*")
    return int(factor) * symbols[name] if factor else symbols[name]  # type: ignore[operator]


@contextlib.contextmanager
def _fake_parameters(mode: FakeTensorMode, dtype: torch.dtype) -> Iterator[None]:
    """Parameters become fake, and of `dtype`, as they are registered, before anything writes to them.

    Buffers stay real: the values of those that are not saved (position ids, frequency tables) belong into the graph.
    """
    register = nn.Module.register_parameter

    def register_fake(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            with mode:
                parameter = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
        register(self, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", register_fake):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs what it could not find of torchvision, and warns of its own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

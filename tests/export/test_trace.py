"""Traced graphs: structure only, every weight in its file under its own name, and what PyTorch computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from glance_trt.bundle import Port
from glance_trt.errors import ModelError
from glance_trt.export import parity, trace, weights
from glance_trt.export.families import Family, open_model, stored
from glance_trt.export.model import Model
from glance_trt.export.weights import component_tensors, read_header
from glance_trt.recipe import Recipe

Traced = Callable[..., ir.Model]
KINDS = ("text_encoder", "denoiser", "decoder")
CASES = [(kind, "float32") for kind in KINDS] + [("text_encoder", "float16"), ("decoder", "float16")]


def _bind(family: Family, model: Path, kind: str, dtype: str, traced: Traced, folder: Path) -> Path:
    """The graph, saved beside a weights file of the component, which is stored in float16."""
    source = family.sources()[kind]
    available = component_tensors(model / family.components[kind])
    chosen = stored(family, trace.parameter_names(source), available, model)
    weights.write(folder / f"{kind}.safetensors", chosen)
    refs = read_header(folder / f"{kind}.safetensors")[0]
    files = trace.bind(traced(source, dtype), refs, folder / f"{kind}.onnx")
    assert files == (f"{kind}.safetensors",)
    return folder / f"{kind}.onnx"


def _run(path: Path, inputs: dict[str, Any]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"]).run(None, inputs)[0]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_every_weight_is_external_under_its_own_name(
    family: Family, tiny_model: Path, traced: Traced, tmp_path: Path, kind: str, dtype: str
) -> None:
    path = _bind(family, tiny_model, kind, dtype, traced, tmp_path)
    source = family.sources()[kind]
    names = {name.removeprefix(source.prefix) for name in source.build().state_dict()}
    graph = onnx.load(path, load_external_data=False).graph
    external = {
        tensor.name: tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    assert external.keys() == names
    refs = read_header(tmp_path / f"{kind}.safetensors")[0]
    for name, tensor in external.items():
        entries = {entry.key: entry.value for entry in tensor.external_data}
        ref = refs[name]
        assert entries == {"location": f"{kind}.safetensors", "offset": str(ref.offset), "length": str(ref.length)}
        assert tuple(tensor.dims) == ref.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_holds_structure_only(
    family: Family, tiny_model: Path, traced: Traced, tmp_path: Path, kind: str
) -> None:
    path = _bind(family, tiny_model, kind, "float32", traced, tmp_path)
    model = onnx.load(path, load_external_data=False)
    inline = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    inline += [a.t for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    assert max((len(t.SerializeToString()) for t in inline), default=0) <= trace.INLINE_LIMIT + 64
    content = path.read_bytes()
    for private in (b"/work", b"/tmp", b"/home", b"site-packages", b".py", str(tiny_model).encode(), b"pkg.torch"):
        assert private not in content
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    # The TensorRT parser takes no sequences, which the unoptimised export is full of.
    assert not [node.op_type for node in model.graph.node if "Sequence" in node.op_type]


def test_ports_are_those_of_the_manifest(family: Family, tiny_model: Path, traced: Traced, tmp_path: Path) -> None:
    for kind, source in family.sources().items():
        graph = onnx.load(_bind(family, tiny_model, kind, "float32", traced, tmp_path), load_external_data=False).graph
        for values, ports in ((graph.input, source.inputs), (graph.output, source.outputs)):
            found = [
                (value.name, tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim))
                for value in values
            ]
            assert found == [(port.name, port.shape) for port in ports]


def test_the_decoders_last_node_is_the_cast_to_pixels(
    family: Family, tiny_model: Path, traced: Traced, tmp_path: Path
) -> None:
    graph = onnx.load(_bind(family, tiny_model, "decoder", "float32", traced, tmp_path), load_external_data=False).graph
    (last,) = [node for node in graph.node if "images" in node.output]
    assert last.op_type == "Cast"


def test_weights_need_not_exist_for_a_trace(
    tiny_model: Path, make_recipe: Callable[..., Recipe], family: Family, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(tmp_path.rglob("*.safetensors"))
    bare = open_model(Model(tmp_path / "model", "tiny"), make_recipe()).sources()
    assert trace.trace(bare["text_encoder"], "float32").graph.initializers
    for kind, source in family.sources().items():
        assert trace.parameter_names(bare[kind]) == trace.parameter_names(source)


def test_tracing_allocates_no_parameter(family: Family) -> None:
    kinds = set()

    def build() -> nn.Module:
        module = family.sources()["denoiser"].build()
        kinds.update(type(parameter.data).__name__ for parameter in module.parameters())
        return module

    source = family.sources()["denoiser"]
    trace.parameter_names(trace.Source(source.name, build, source.inputs, source.outputs, source.prefix, {}, {}))
    assert kinds == {"FakeTensor"}


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_a_graph_computes_what_pytorch_does_at_every_batch_and_size(
    family: Family, tiny_model: Path, traced: Traced, tmp_path: Path, kind: str, dtype: str
) -> None:
    path = _bind(family, tiny_model, kind, dtype, traced, tmp_path)
    source = family.sources()[kind]
    reference = parity.Reference(family, {"all": None})
    for batch, sizes in ((1, {"h": 4, "w": 4}), (3, {"h": 2, "w": 7})):
        if "h" not in source.sizes:
            sizes = {}
        resized = trace.Source(**(vars(source) | {"sizes": {**source.sizes, **sizes}}))
        inputs = parity.example_inputs(resized, batch, np.random.default_rng(batch))
        (expected,) = reference.run("denoiser.all" if kind == "denoiser" else kind, inputs).values()
        found = _run(path, inputs)
        assert found.shape == expected.shape
        assert found.shape[0] == batch
        if found.dtype == np.uint8:
            assert np.abs(found.astype(int) - expected).max() <= (1 if dtype == "float32" else 2)
        else:
            tolerance = 1e-5 if dtype == "float32" else 1e-2
            assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_a_cast_stands_behind_a_weight_that_is_stored_in_another_dtype(
    family: Family, tiny_model: Path, traced: Traced, tmp_path: Path
) -> None:
    (tmp_path / "single").mkdir()
    (tmp_path / "half").mkdir()
    stored = component_tensors(tiny_model / "text_encoder")
    assert {ref.dtype for ref in stored.values()} == {"F16"}
    for folder, casts in (("single", True), ("half", False)):
        dtype = "float32" if casts else "float16"
        path = _bind(family, tiny_model, "text_encoder", dtype, traced, tmp_path / folder)
        graph = onnx.load(path, load_external_data=False).graph
        external = {t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        cast = {node.input[0] for node in graph.node if node.op_type == "Cast"} & external
        assert cast == (external if casts else set())


class Affine(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(float(size))[:, None] * torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] * self.scale * self.table).sum(1)


def _affine(size: int) -> trace.Source:
    ports = (Port("x", "float32", ("batch", 4)),), (Port("y", "float32", ("batch", 4)),)
    return trace.Source("affine", lambda: Affine(size), *ports, "", {"batch": 2}, {"batch": 8})


def test_a_small_table_stays_in_the_graph_and_a_large_one_is_refused(tmp_path: Path) -> None:
    model = trace.trace(_affine(8), "float32")
    weights_file = tmp_path / "w.safetensors"
    from safetensors.torch import save_file

    save_file({"scale": torch.full((4,), 2.0)}, weights_file)
    trace.bind(model, read_header(weights_file)[0], tmp_path / "x.onnx")
    assert np.array_equal(_run(tmp_path / "x.onnx", {"x": np.ones((3, 4), np.float32)}), np.full((3, 4), 56.0))
    with pytest.raises(ModelError, match="affine: the traced graph holds a constant of 80000 bytes; those above 65536"):
        trace.trace(_affine(5000), "float32")


def test_weights_that_do_not_belong_to_the_configuration_are_refused(
    family: Family, tiny_model: Path, traced: Traced, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    model = traced(family.sources()["text_encoder"], "float32")
    tensors = {
        n.removeprefix("text_model."): r.read() for n, r in component_tensors(tiny_model / "text_encoder").items()
    }
    first = "final_layer_norm.weight"
    for changed, message in (
        (torch.ones(3), r"final_layer_norm\.weight has shape \[3\], the model's configuration says \[16\]"),
        (torch.ones(16, dtype=torch.int64), r"final_layer_norm\.weight has dtype I64; a weight has one of F64"),
        (None, r"the model's weights lack final_layer_norm\.weight"),
    ):
        altered = (
            {**tensors, first: changed} if changed is not None else {n: t for n, t in tensors.items() if n != first}
        )
        save_file(altered, tmp_path / "w.safetensors")
        with pytest.raises(ModelError, match=message):
            trace.bind(model, read_header(tmp_path / "w.safetensors")[0], tmp_path / "x.onnx")

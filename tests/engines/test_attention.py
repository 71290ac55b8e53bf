from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glance_trt.engines import attention

HEADS, SIZE, CONTEXT = 2, 8, 7


class Attention(nn.Module):
    """Cross attention as diffusers writes it, but with a scale of its own."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.query, self.key, self.value = (nn.Linear(HEADS * SIZE, HEADS * SIZE, bias=False) for _ in range(3))

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.view(tokens.shape[0], -1, HEADS, SIZE).transpose(1, 2)

        query, key, value = split(self.query(tokens)), split(self.key(context)), split(self.value(context))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, scale=0.5)
        return mixed.transpose(1, 2).reshape(tokens.shape[0], -1, HEADS * SIZE) + tokens


def exported(module: nn.Module) -> onnx.ModelProto:
    """With dynamic batch and tokens, and a context of fixed length, as text has."""
    example = (torch.zeros(2, 12, HEADS * SIZE), torch.zeros(2, CONTEXT, HEADS * SIZE))
    batch = torch.export.Dim("batch")
    shapes = ({0: batch, 1: torch.export.Dim("tokens")}, {0: batch})
    options = {"dynamic_shapes": shapes, "opset_version": 20, "optimize": True, "verbose": False}
    program = torch.onnx.export(module.eval(), example, dynamo=True, **options)
    return program.model_proto


@pytest.fixture(scope="module")
def module() -> Attention:
    torch.manual_seed(0)
    return Attention(causal=False)


@pytest.fixture(scope="module")
def graph(module: Attention) -> onnx.ModelProto:
    return exported(module)


@pytest.fixture
def model(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy, for `fuse` changes it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy


def run(model: onnx.ModelProto, *inputs: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})[0]


def operators(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def test_fused_attention_computes_what_pytorch_computes(module: Attention, model: onnx.ModelProto) -> None:
    tokens, context = torch.randn(3, 20, HEADS * SIZE), torch.randn(3, CONTEXT, HEADS * SIZE)
    assert attention.fuse(model) == 1
    assert "MultiHeadAttention" in operators(model)
    assert not {"Softmax", "Transpose"} & operators(model)
    onnx.checker.check_model(model)
    with torch.no_grad():
        expected = module(tokens, context).numpy()
    np.testing.assert_allclose(run(model, tokens, context), expected, atol=1e-6)


def test_nothing_that_fused_attention_no_longer_needs_is_left(model: onnx.ModelProto) -> None:
    attention.fuse(model)
    used = {name for node in model.graph.node for name in node.input}
    made = {name for node in model.graph.node for name in node.output}
    assert {tensor.name for tensor in model.graph.initializer} <= used
    assert made <= used | {output.name for output in model.graph.output}


def test_masked_attention_stays_as_it_is() -> None:
    model = exported(Attention(causal=True))
    before = model.SerializeToString()
    assert attention.fuse(model) == 0
    assert model.SerializeToString() == before
    assert "Softmax" in operators(model)


def test_attention_whose_scores_are_an_output_stays(model: onnx.ModelProto) -> None:
    (softmax,) = (node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(onnx.helper.make_tensor_value_info(softmax.output[0], onnx.TensorProto.FLOAT, None))
    assert attention.fuse(model) == 0


def test_a_softmax_without_heads_stays() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
        similarity (float[n,4] x, float[4,m] y, float[m,4] z) => (float[n,4] mixed) {
            scores = MatMul(x, y)
            weights = Softmax<axis = -1>(scores)
            mixed = MatMul(weights, z)
        }"""
    model = onnx.parser.parse_model(text)
    assert attention.fuse(model) == 0
    assert operators(model) == {"MatMul", "Softmax"}

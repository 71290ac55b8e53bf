"""Networks are parsed by the real TensorRT-RTX; what an engine's inspector says is a text as TensorRT 10 writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from glance_trt.engines import precision
from glance_trt.errors import TargetError

CODES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}

# A step in small: a convolution and a product, each in its own dtype, the softmax and the sampler's sum in float32, and
# the angles of a rotary embedding. Weights are stored in float32.
STEP = """<ir_version: 10, opset_import: ["" : 18]>
    step (float[batch,4,16,16] latents, float[batch,16,1] positions, float[batch,1,8] frequencies)
        => (float[batch,4,16,16] denoised, float[batch,16,8] angles)
    <float[4,4,3,3] conv_weight = {%s}, float[16,16] product_weight = {%s}> {
        conv_in = Cast<to = %d>(latents)
        conv_w = Cast<to = %d>(conv_weight)
        [conv] conv_out = Conv<pads = [1, 1, 1, 1]>(conv_in, conv_w)
        product_in = Cast<to = %d>(conv_out)
        product_w = Cast<to = %d>(product_weight)
        [product] product_out = MatMul(product_in, product_w)
        wide = Cast<to = 1>(product_out)
        weights = Softmax<axis = -1>(wide)
        denoised = Add(weights, latents)
        angles = MatMul(positions, frequencies)
    }"""


@pytest.fixture
def parse(tmp_path: Path) -> Any:
    """Parses the step, with a convolution and a product of these dtypes; keeps what owns the networks."""
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install glance-trt[rtx]")
    alive: list[Any] = []

    def parse(conv: str, product: str) -> Any:
        ones = [",".join("1" * size) for size in (144, 256)]
        codes = [CODES[conv]] * 2 + [CODES[product]] * 2
        onnx.save(onnx.parser.parse_model(STEP % (*ones, *codes)), tmp_path / "step.onnx")
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(tmp_path / "step.onnx"))
        alive.extend((logger, builder, parser))
        return network

    return parse


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_network_of_the_dtype_that_was_asked_for_passes_and_is_counted(parse: Any, dtype: str) -> None:
    network = parse(dtype, dtype)
    precision.check(network, dtype, "denoiser.slow")
    counts = precision.count(network)
    assert counts["convolution"] == {dtype: 1}
    products = {dtype: 1, "float32": 1} if dtype != "float32" else {"float32": 2}
    assert counts["matrix_multiply"] == products
    assert counts["softmax"] == {"float32": 1}
    assert sum(map(sum, (of_kind.values() for of_kind in counts.values()))) == network.num_layers


@pytest.mark.parametrize(
    ("conv", "product", "asked", "text"),
    [
        ("float32", "float16", "float16", r"layer conv \(convolution\) computes in float32, asked for was float16\. "),
        ("float16", "float32", "float16", r"layer product \(matrix_multiply\) computes in float32, asked for was flo"),
        ("bfloat16", "float16", "float16", r"layer conv \(convolution\) computes in bfloat16, asked for was float16"),
        ("float16", "float16", "float32", r"layer conv \(convolution\) computes in float16, asked for was float32, an"),
        ("float16", "float16", "float32", r", and 1 more do not compute in float32\. The graph was exported for anoth"),
    ],
)
def test_a_layer_of_another_dtype_is_named(parse: Any, conv: str, product: str, asked: str, text: str) -> None:
    with pytest.raises(TargetError, match=rf"^denoiser\.slow: .*{text}"):
        precision.check(parse(conv, product), asked, "denoiser.slow")


def inspected(*layers: tuple[str, str, list[str]]) -> str:
    """As TensorRT writes it: name, type and formats of the inputs of each layer."""
    return json.dumps(
        {
            "Layers": [
                {
                    "Name": name,
                    "LayerType": kind,
                    "Inputs": [{"Name": "x", "Dimensions": [1], "Format/Datatype": form} for form in formats],
                    "Outputs": [],
                }
                for name, kind, formats in layers
            ],
            "Bindings": ["latents"],
        }
    )


def test_what_an_engine_computes_in_is_counted() -> None:
    text = inspected(
        ("__myl_Cast", "kgen", ["Float"]),
        ("conv_in", "CaskConvolution", ["Channel major FP16 format where channel % 8 == 0"]),
        ("fc", "gemm", ["Half", "Half"]),
        ("fc2", "gemm", ["BFloat16"]),
        ("signal", "signal", []),
    )
    assert precision.count_engine(text) == {
        "caskconvolution": {"float16": 1},
        "gemm": {"bfloat16": 1, "float16": 1},
        "kgen": {"float32": 1},
        "signal": {"none": 1},
    }


def test_an_engine_s_layer_that_has_no_input_of_the_dtype_is_named() -> None:
    text = inspected(
        ("cast", "kgen", ["Float"]), ("fc", "gemm", ["Float", "Half"]), ("fc2", "gemm", ["Float", "Float"])
    )
    with pytest.raises(
        TargetError, match=r"^decoder: layer fc2 \(gemm\) of its engine computes in float32, asked for "
    ):
        precision.check_engine(text, "float16", "decoder")
    precision.check_engine(text, "float32", "decoder")


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", '{"Layers": ["only", "names"]}', '{"Layers": [{}]}'])
def test_an_engine_that_tells_little_passes(text: str) -> None:
    precision.check_engine(text, "float16", "decoder")
    assert precision.count_engine(text) in ({}, {"unknown": {"none": 1}})


def test_an_engine_that_does_not_tell_its_dtypes_counts_for_nothing() -> None:
    """So that what the network said is shown instead."""
    text = inspected(("conv", "CaskConvolution", ["N/A due to dynamic shapes"]))
    assert precision.count_engine(text) == {}
    precision.check_engine(text, "float16", "decoder")

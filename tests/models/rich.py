"""A tiny bundle with all that the format knows: two text encoders, a mask, a template, sizes, an encoder, tiles.

The first text encoder looks tokens up in a table; so does the second, in another table, but for what its mask leaves
out, and it puts the mask out again. A denoiser step is ``x' = a * x + b * model(c_in * x)``, where the model is
``tanh(x) * (mean(prompt_embeds) + sum(embeds_2) / sum(mask_2)) + gain * timestep / 1000``, with guidance. The decoder
averages latents with their neighbours, so that it is local but not blind to them, and makes 2 x 2 pixels of each. The
encoder averages 2 x 2 pixels, and adds a quarter of the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tokenizers
from numpy.typing import NDArray
from onnx import TensorProto, helper

from glance_trt import schema

from . import tiny

HEIGHT, WIDTH, SCALE = 8, 12, 2
"""Pixels, and pixels per latent."""
SIZES = ((12, 8), (8, 40), (20, 24))
TEMPLATE = "a {} and no stars"
LENGTH = 20
"""Of the second tokenizer, tokens; that of the first is `tiny.LENGTH`."""
TABLE = np.random.default_rng(1).normal(size=(694, 2)).astype(np.float32)
SCHEDULES = {
    "usual": schema.Schedule(
        (
            schema.Step("slow", 999.0, (1.0, 0.75, -0.5), (0.0, 1.0)),
            schema.Step("slow", 700.0, (0.875, 0.9375, -0.25), (0.25, 0.875)),
            schema.Step("fast", 400.0, (0.75, 1.0625, -0.5), (0.625, 0.5)),
            schema.Step("fast", 20.0, (0.5, 0.875, 0.375), (0.9375, 0.125)),
        ),
        initial_noise_scale=2.0,
        sizes=((8, 12), (12, 8)),
    ),
    "any": schema.Schedule(
        (
            schema.Step("slow", 900.0, (1.0, 0.75, -0.25), (0.125, 1.0)),
            schema.Step("fast", 300.0, (0.75, 0.875, 0.25), (0.75, 0.25)),
        ),
        strength_rounding="up",
    ),
}
IMAGE = schema.Image(HEIGHT, WIDTH, 3, SCALE, SIZES)

Floats = NDArray[np.float32]
Conditions = Mapping[str, NDArray[Any]]

_LATENTS = ("batch", 3, "h", "w")
_PIXELS = ("batch", "2*h", "2*w", 3)
_CONDITIONS = (
    schema.Port("prompt_embeds", "float32", ("batch", tiny.LENGTH, 3)),
    schema.Port("embeds_2", "float32", ("batch", LENGTH, 2)),
    schema.Port("mask_2", "int64", ("batch", LENGTH)),
)
_TEXT_ENCODER_2 = schema.Graph(
    inputs=(
        schema.Port("input_ids", "int64", ("batch", LENGTH), "tokens.tokenizer_2"),
        schema.Port("attention_mask", "int64", ("batch", LENGTH), "mask.tokenizer_2"),
    ),
    outputs=_CONDITIONS[1:],
    files={"float32": "text_encoder_2.onnx"},
)
_DECODER = schema.Graph(
    inputs=(schema.Port("latents", "float32", _LATENTS, "latents"),),
    outputs=(schema.Port("images", "uint8", _PIXELS),),
    files={"float32": "decoder.onnx"},
)


def tokens(prompt: str) -> dict[str, NDArray[np.int64]]:
    """ids, ids_2 and mask_2 [1, ...], by the tokenizers library's own truncation and padding."""
    found = {}
    for key, text, length in (
        ("ids", prompt, tiny.LENGTH),
        ("ids_2", TEMPLATE.replace("{}", prompt), LENGTH),
    ):
        tokenizer = tokenizers.Tokenizer.from_file(str(tiny.TOKENIZER))
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=1)
        encoding = tokenizer.encode(text)
        found |= {key: np.array([encoding.ids]), key.replace("ids", "mask"): np.array([encoding.attention_mask])}
    del found["mask"]
    return found


def encode(ids: NDArray[np.int64], ids_2: NDArray[np.int64], mask_2: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The conditions of token ids, [B, tiny.LENGTH] and [B, LENGTH]."""
    return {
        "prompt_embeds": tiny.encode(ids),
        "embeds_2": TABLE[ids_2] * mask_2[..., np.newaxis].astype(np.float32),
        "mask_2": mask_2,
    }


def denoise(
    phase: str,
    x: Floats,
    timestep: float,
    coefficients: tuple[float, ...],
    conditions: Conditions,
    negative: Conditions,
    scale: float,
) -> Floats:
    """One step of `phase`: x [B, 3, h, w]; computed in float64."""
    c_in, a, b = coefficients

    def model(given: Conditions) -> NDArray[np.float64]:
        mean = given["prompt_embeds"].astype(np.float64).mean(axis=(1, 2))
        mean = mean + given["embeds_2"].astype(np.float64).sum(axis=(1, 2)) / given["mask_2"].sum(axis=1)
        return np.tanh(c_in * x.astype(np.float64)) * mean.reshape(-1, 1, 1, 1) + tiny.GAINS[phase] * timestep / 1000

    without = model(negative)
    return (a * x + b * (without + scale * (model(conditions) - without))).astype(np.float32)


def decode(latents: Floats) -> NDArray[np.uint8]:
    """[B, 3, h, w] to [B, 2h, 2w, 3]."""
    padded = np.pad(latents.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    _, _, h, w = latents.shape
    around = sum(padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)) / 9
    pixels = np.clip(np.rint(around.transpose(0, 2, 3, 1) * 64 + 128), 0, 255)
    return pixels.repeat(SCALE, axis=1).repeat(SCALE, axis=2).astype(np.uint8)


def encode_image(image: NDArray[np.uint8], noise: Floats) -> Floats:
    """[B, 2h, 2w, 3] to [B, 3, h, w]."""
    batch, height, width, _ = image.shape
    blocks = image.astype(np.float32).reshape(batch, height // SCALE, SCALE, width // SCALE, SCALE, 3)
    mean = blocks.mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    return (mean - 128) / 64 + np.float32(0.25) * noise


def _denoiser(phase: str) -> schema.Graph:
    inputs = [
        schema.Port("latents", "float32", _LATENTS, "latents"),
        schema.Port("timestep", "float32", (), "table.timestep"),
        schema.Port("coefficients", "float32", (3,), "table.coefficients"),
        schema.Port("guidance_scale", "float32", (), "guidance_scale"),
    ]
    for kind, prefix in (("condition", ""), ("negative", "negative_")):
        inputs += [
            schema.Port(f"{prefix}{port.name}", port.dtype, port.shape, f"{kind}.{port.name}") for port in _CONDITIONS
        ]
    outputs = (schema.Port("latents_out", "float32", _LATENTS),)
    return schema.Graph(tuple(inputs), outputs, {"float32": f"denoiser.{phase}.onnx"}, guidance="cfg")


def _encoder(*, posterior: bool) -> schema.Graph:
    inputs = [schema.Port("image", "uint8", _PIXELS, "image")]
    if posterior:
        inputs.append(schema.Port("noise", "float32", _LATENTS, "noise"))
    return schema.Graph(tuple(inputs), (schema.Port("encoded", "float32", _LATENTS),), {"float32": "encoder.onnx"})


def _text_encoder_2_model() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["looked_up"]),
        helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["kept", "last"], ["factor"]),
        helper.make_node("Mul", ["looked_up", "factor"], ["embeds_2"]),
        helper.make_node("Identity", ["attention_mask"], ["mask_2"]),
    ]
    return tiny.onnx_model(_TEXT_ENCODER_2, nodes, {"table": TABLE, "last": np.array([2], np.int64)})


def _denoiser_model(phase: str) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Split", ["coefficients"], ["c_in", "a", "b"], num_outputs=3),
        helper.make_node("Mul", ["latents", "c_in"], ["scaled"]),
        helper.make_node("Tanh", ["scaled"], ["tanh"]),
        helper.make_node("Mul", ["timestep", "gain"], ["drift"]),
    ]
    for prefix in ("", "negative_"):
        nodes += [
            helper.make_node("ReduceMean", [f"{prefix}prompt_embeds", "axes"], [f"{prefix}mean"], keepdims=0),
            helper.make_node("ReduceSum", [f"{prefix}embeds_2", "axes"], [f"{prefix}sum"], keepdims=0),
            helper.make_node("ReduceSum", [f"{prefix}mask_2", "tokens"], [f"{prefix}count"], keepdims=0),
            helper.make_node("Cast", [f"{prefix}count"], [f"{prefix}divisor"], to=TensorProto.FLOAT),
            helper.make_node("Div", [f"{prefix}sum", f"{prefix}divisor"], [f"{prefix}mean_2"]),
            helper.make_node("Add", [f"{prefix}mean", f"{prefix}mean_2"], [f"{prefix}both"]),
            helper.make_node("Reshape", [f"{prefix}both", "shape"], [f"{prefix}factor"]),
            helper.make_node("Mul", ["tanh", f"{prefix}factor"], [f"{prefix}product"]),
            helper.make_node("Add", [f"{prefix}product", "drift"], [f"{prefix}output"]),
        ]
    nodes += [
        helper.make_node("Sub", ["output", "negative_output"], ["difference"]),
        helper.make_node("Mul", ["difference", "guidance_scale"], ["guided"]),
        helper.make_node("Add", ["negative_output", "guided"], ["predicted"]),
        helper.make_node("Mul", ["latents", "a"], ["kept"]),
        helper.make_node("Mul", ["predicted", "b"], ["added"]),
        helper.make_node("Add", ["kept", "added"], ["latents_out"]),
    ]
    constants = {
        "gain": np.float32(tiny.GAINS[phase] / 1000),
        "axes": np.array([1, 2], np.int64),
        "tokens": np.array([1], np.int64),
        "shape": np.array([-1, 1, 1, 1], np.int64),
    }
    return tiny.onnx_model(_denoiser(phase), nodes, constants)


def _decoder_model() -> onnx.ModelProto:
    nodes = [
        helper.make_node(
            "AveragePool", ["latents"], ["around"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1
        ),
        helper.make_node("Transpose", ["around"], ["nhwc"], perm=[0, 2, 3, 1]),
        helper.make_node("Mul", ["nhwc", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "middle"], ["shifted"]),
        helper.make_node("Round", ["shifted"], ["rounded"]),
        helper.make_node("Clip", ["rounded", "low", "high"], ["clipped"]),
        helper.make_node(
            "Resize",
            ["clipped", "", "factors"],
            ["enlarged"],
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        helper.make_node("Cast", ["enlarged"], ["images"], to=TensorProto.UINT8),
    ]
    numbers = {"scale": 64, "middle": 128, "low": 0, "high": 255}
    constants = {name: np.float32(value) for name, value in numbers.items()}
    return tiny.onnx_model(_DECODER, nodes, constants | {"factors": np.array([1, SCALE, SCALE, 1], np.float32)})


def _encoder_model(*, posterior: bool) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["nchw"], ["mean"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Sub", ["mean", "middle"], ["shifted"]),
        helper.make_node("Div", ["shifted", "scale"], ["signal" if posterior else "encoded"]),
    ]
    numbers = {"middle": 128.0, "scale": 64.0}
    if posterior:
        numbers["quarter"] = 0.25
        nodes += [
            helper.make_node("Mul", ["noise", "quarter"], ["deviation"]),
            helper.make_node("Add", ["signal", "deviation"], ["encoded"]),
        ]
    constants = {name: np.float32(value) for name, value in numbers.items()}
    return tiny.onnx_model(_encoder(posterior=posterior), nodes, constants)


def make_bundle(folder: Path, *, posterior: bool = True, **changes: Any) -> Path:
    """Write the bundle. posterior: whether the encoder takes noise. `changes` are to the manifest."""
    graphs = {"text_encoder": tiny.TEXT_ENCODER, "text_encoder_2": _TEXT_ENCODER_2}
    models = {"text_encoder": tiny.text_encoder_model(), "text_encoder_2": _text_encoder_2_model()}
    for phase in tiny.GAINS:
        graphs[f"denoiser.{phase}"], models[f"denoiser.{phase}"] = _denoiser(phase), _denoiser_model(phase)
    graphs |= {"decoder": _DECODER, "encoder": _encoder(posterior=posterior)}
    models |= {"decoder": _decoder_model(), "encoder": _encoder_model(posterior=posterior)}
    parts = {
        "name": "rich",
        "image": IMAGE,
        "tokenizers": {
            "tokenizer": schema.Tokenizer("tokenizer.json", tiny.LENGTH, pad_token_id=1),
            "tokenizer_2": schema.Tokenizer("tokenizer.json", LENGTH, pad_token_id=1, template=TEMPLATE),
        },
        "guidance": tiny.GUIDANCE,
        "schedules": SCHEDULES,
        "graphs": graphs,
    }
    return tiny.write_bundle(folder, models, parts | changes, {})

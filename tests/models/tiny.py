"""A bundle of tiny ONNX graphs for the CPU, made in milliseconds, and each graph's function in numpy.

The text encoder looks tokens up in a table. A denoiser step is ``x' = a * x + b * model(c_in * x)``, where the model is
``tanh(x) * mean(embeds) + gain * timestep / 1000`` and the phases differ in their gain. The decoder scales, clips and
rounds. Images are 6 x 4 pixels, so that a swap of width and height shows.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from glance_trt import manifest, schema
from glance_trt.runtime.runners import onnxruntime as runner

TOKENIZER = Path(__file__).parents[2] / "examples/shapes/model/tokenizer/tokenizer.json"
LENGTH = 8  # tokens, of which two are the start and the end
HEIGHT, WIDTH = 4, 6  # pixels, and latents
GAINS = {"slow": 1.0, "fast": -0.5}
TABLE = np.random.default_rng(0).normal(size=(694, 3)).astype(np.float32)  # [vocabulary, channels]
GUIDANCE = schema.Guidance(scale=3.0, negative_prompt="a blue star")
SCHEDULES = {
    "default": schema.Schedule(
        (
            schema.Step("slow", 999.0, (1.0, 0.75, -0.5)),
            schema.Step("slow", 700.0, (0.875, 0.9375, -0.25)),
            schema.Step("fast", 400.0, (0.75, 1.0625, -0.5)),
            schema.Step("fast", 20.0, (0.5, 0.875, 0.375)),
        ),
        initial_noise_scale=2.0,
    ),
    "short": schema.Schedule((schema.Step("fast", 500.0, (1.0, 0.5, 1.0)),)),
}

Floats = NDArray[np.float32]


def encode(ids: NDArray[np.int64]) -> Floats:
    """[B, LENGTH] to [B, LENGTH, 3]."""
    return TABLE[ids]


def denoise(
    phase: str,
    x: Floats,
    timestep: float,
    coefficients: tuple[float, ...],
    embeds: Floats,
    negative: Floats,
    scale: float,
) -> Floats:
    """One step of `phase`, with guidance: x [B, 3, H, W], embeds and negative [B, LENGTH, 3]; computed in float64."""
    c_in, a, b = coefficients

    def model(condition: Floats) -> NDArray[np.float64]:
        mean = condition.astype(np.float64).mean(axis=(1, 2)).reshape(-1, 1, 1, 1)
        return np.tanh(c_in * x.astype(np.float64)) * mean + GAINS[phase] * timestep / 1000

    without = model(negative)
    return (a * x + b * (without + scale * (model(embeds) - without))).astype(np.float32)


def decode(latents: Floats) -> NDArray[np.uint8]:
    """[B, 3, H, W] to [B, H, W, 3]."""
    pixels = np.clip(np.rint(latents.transpose(0, 2, 3, 1) * np.float32(64) + np.float32(128)), 0, 255)
    return pixels.astype(np.uint8)


_EMBEDS = ("batch", LENGTH, 3)
_LATENTS = ("batch", 3, HEIGHT, WIDTH)
_DTYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}

TEXT_ENCODER = schema.Graph(
    inputs=(schema.Port("input_ids", "int64", ("batch", LENGTH), "tokens.tokenizer"),),
    outputs=(schema.Port("prompt_embeds", "float32", _EMBEDS),),
    files={"float32": "text_encoder.onnx"},
)
_DECODER = schema.Graph(
    inputs=(schema.Port("latents", "float32", _LATENTS, "latents"),),
    outputs=(schema.Port("images", "uint8", ("batch", HEIGHT, WIDTH, 3)),),
    files={"float32": "decoder.onnx"},
)


def _denoiser(phase: str, guidance: schema.GuidanceMode) -> schema.Graph:
    inputs = [
        schema.Port("latents", "float32", _LATENTS, "latents"),
        schema.Port("timestep", "float32", (), "table.timestep"),
        schema.Port("coefficients", "float32", (3,), "table.coefficients"),
        schema.Port("prompt_embeds", "float32", _EMBEDS, "condition.prompt_embeds"),
    ]
    if guidance != "none":
        inputs.append(schema.Port("guidance_scale", "float32", (), "guidance_scale"))
    if guidance == "cfg":
        inputs.append(schema.Port("negative_prompt_embeds", "float32", _EMBEDS, "negative.prompt_embeds"))
    outputs = (schema.Port("latents_out", "float32", _LATENTS),)
    return schema.Graph(tuple(inputs), outputs, {"float32": f"denoiser.{phase}.onnx"}, guidance=guidance)


def text_encoder_model() -> onnx.ModelProto:
    return onnx_model(
        TEXT_ENCODER, [helper.make_node("Gather", ["table", "input_ids"], ["prompt_embeds"])], {"table": TABLE}
    )


def decoder_model() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Transpose", ["latents"], ["nhwc"], perm=[0, 2, 3, 1]),
        helper.make_node("Mul", ["nhwc", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "middle"], ["shifted"]),
        helper.make_node("Round", ["shifted"], ["rounded"]),
        helper.make_node("Clip", ["rounded", "low", "high"], ["clipped"]),
        helper.make_node("Cast", ["clipped"], ["images"], to=TensorProto.UINT8),
    ]
    numbers = {"scale": 64, "middle": 128, "low": 0, "high": 255}
    return onnx_model(_DECODER, nodes, {name: np.float32(value) for name, value in numbers.items()})


def denoiser_model(phase: str, guidance: schema.GuidanceMode = "cfg") -> onnx.ModelProto:
    """With ``embedded`` guidance, the scale multiplies what the model makes of the condition."""
    nodes = [
        helper.make_node("Split", ["coefficients"], ["c_in", "a", "b"], num_outputs=3),
        helper.make_node("Mul", ["latents", "c_in"], ["scaled"]),
        helper.make_node("Tanh", ["scaled"], ["tanh"]),
        helper.make_node("Mul", ["timestep", "gain"], ["drift"]),
    ]

    def model(embeds: str, result: str) -> None:
        nodes.append(helper.make_node("ReduceMean", [embeds, "axes"], [f"{result}.mean"], keepdims=1))
        nodes.append(helper.make_node("Unsqueeze", [f"{result}.mean", "last"], [f"{result}.factor"]))
        nodes.append(helper.make_node("Mul", ["tanh", f"{result}.factor"], [f"{result}.product"]))
        nodes.append(helper.make_node("Add", [f"{result}.product", "drift"], [result]))

    model("prompt_embeds", "with")
    output = "with"
    if guidance == "cfg":
        model("negative_prompt_embeds", "without")
        nodes.append(helper.make_node("Sub", ["with", "without"], ["difference"]))
        nodes.append(helper.make_node("Mul", ["difference", "guidance_scale"], ["guided"]))
        nodes.append(helper.make_node("Add", ["without", "guided"], ["output"]))
        output = "output"
    elif guidance == "embedded":
        nodes.append(helper.make_node("Mul", ["with", "guidance_scale"], ["output"]))
        output = "output"
    nodes += [
        helper.make_node("Mul", ["latents", "a"], ["kept"]),
        helper.make_node("Mul", [output, "b"], ["added"]),
        helper.make_node("Add", ["kept", "added"], ["latents_out"]),
    ]
    constants = {
        "gain": np.float32(GAINS[phase] / 1000),
        "axes": np.array([1, 2], np.int64),
        "last": np.array([3], np.int64),
    }
    return onnx_model(_denoiser(phase, guidance), nodes, constants)


def make_bundle(
    folder: Path, *, guidance: schema.GuidanceMode = "cfg", extra: Mapping[str, bytes] | None = None, **changes: Any
) -> Path:
    """Write a bundle with the engines of target ``cpu``. `extra` files are listed; `changes` are to the manifest."""
    models = {"text_encoder": text_encoder_model(), "decoder": decoder_model()}
    graphs = {"text_encoder": TEXT_ENCODER, "decoder": _DECODER}
    for phase in GAINS:
        models[f"denoiser.{phase}"] = denoiser_model(phase, guidance)
        graphs[f"denoiser.{phase}"] = _denoiser(phase, guidance)
    fields = {"name": "tiny", "guidance": GUIDANCE, "schedules": SCHEDULES, "graphs": graphs}
    fields["image"] = schema.Image(HEIGHT, WIDTH, latent_channels=3, latent_scale=1)
    fields["tokenizers"] = {"tokenizer": schema.Tokenizer("tokenizer.json", LENGTH, pad_token_id=1)}
    return write_bundle(folder, models, fields | changes, extra or {})


def write_bundle(
    folder: Path, models: Mapping[str, onnx.ModelProto], parts: Mapping[str, Any], extra: Mapping[str, bytes]
) -> Path:
    """Write models, a tokenizer and a manifest of these parts, with the models as engines of target ``cpu``."""
    folder.mkdir(parents=True)
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    for name, model in models.items():
        onnx.save(model, folder / f"{name}.onnx")
    for name, content in extra.items():
        (folder / name).write_bytes(content)
    fields: dict[str, Any] = {
        "format": manifest.FORMAT,
        "family": "tiny",
        "provenance": schema.Provenance("tiny-model", (schema.LoraSource("slow", "slow.safetensors", "0" * 64, 4.0),)),
        "engines": {
            "cpu": schema.EngineSet(
                "onnxruntime",
                "float32",
                {name: schema.Engine(f"{name}.onnx") for name in models},
                runner.requirements(),
            )
        },
        "files": {
            file.name: schema.FileEntry(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
            for file in sorted(folder.iterdir())
        },
    }
    text = manifest.dump(manifest.Manifest(**fields | parts))
    (folder / manifest.MANIFEST).write_text(text, encoding="utf-8")
    return folder


def onnx_model(graph: schema.Graph, nodes: list[onnx.NodeProto], constants: Mapping[str, Any]) -> onnx.ModelProto:
    """A model with the inputs and outputs that the manifest describes, marked as built for this machine."""

    def values(ports: tuple[schema.Port, ...]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(port.name, _DTYPES[port.dtype], port.shape) for port in ports]

    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    body = helper.make_graph(nodes, "tiny", values(graph.inputs), values(graph.outputs), initializers)
    model = helper.make_model(body, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    helper.set_model_props(model, runner.requirements())
    return model

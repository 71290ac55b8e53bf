"""The door to the engine backends: what each is told of shapes, what it needs, and what this machine cannot build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glance_trt.bundle import Engine, Graph, Image, Port
from glance_trt.engines import backends
from glance_trt.engines.targets import Profile, Target
from glance_trt.errors import RecipeError

IMAGE = Image(height=512, width=768, latent_channels=4, latent_scale=8)
STEP = Graph(
    (
        Port("latents", "float32", ("batch", 4, "8*h", "8*w"), "latents"),
        Port("timestep", "float32", (), "table.timestep"),
        Port("prompt_embeds", "float32", ("batch", 77, 768), "condition.prompt_embeds"),
    ),
    (Port("latents_out", "float32", ("batch", 4, "8*h", "8*w")),),
    {"float16": "denoiser.slow.float16.onnx", "float32": "denoiser.slow.float32.onnx"},
    ("denoiser.base.safetensors", "denoiser.slow.safetensors"),
)
ENCODER = Graph(
    (Port("input_ids", "int64", ("batch", 77), "tokens.tokenizer"),),
    (Port("prompt_embeds", "float32", ("batch", 77, 768)),),
    {"float16": "text_encoder.float16.onnx"},
)


def rtx(*profiles: Profile) -> Target:
    return Target("rtx", "tensorrt-rtx", "float16", ("8.9",), profiles)


def test_a_compiled_engine_takes_one_to_four_images_of_the_recipe_s_size() -> None:
    assert backends.ranges(STEP, rtx(), IMAGE) == [
        {
            "latents": ((1, 4, 64, 96), (1, 4, 64, 96), (4, 4, 64, 96)),
            "prompt_embeds": ((1, 77, 768), (1, 77, 768), (4, 77, 768)),
        }
    ]


def test_profiles_give_sizes_of_images_in_pixels() -> None:
    wide = Profile((1, 2, 4), width=(512, 768, 1024))
    assert backends.ranges(STEP, rtx(wide, Profile((8, 8, 8), (64, 64, 128), (64, 64, 64))), IMAGE) == [
        {
            "latents": ((1, 4, 64, 64), (2, 4, 64, 96), (4, 4, 64, 128)),
            "prompt_embeds": ((1, 77, 768), (2, 77, 768), (4, 77, 768)),
        },
        {
            "latents": ((8, 4, 8, 8), (8, 4, 8, 8), (8, 4, 16, 8)),
            "prompt_embeds": ((8, 77, 768), (8, 77, 768), (8, 77, 768)),
        },
    ]


def test_profiles_that_are_one_to_a_graph_are_one() -> None:
    sizes = rtx(Profile(height=(512, 512, 512)), Profile(height=(1024, 1024, 1024)))
    assert len(backends.ranges(STEP, sizes, IMAGE)) == 2
    assert backends.ranges(ENCODER, sizes, IMAGE) == [{"input_ids": ((1, 77), (1, 77), (4, 77))}]


def test_a_size_that_the_model_cannot_have_is_refused_with_its_multiple() -> None:
    target = rtx(Profile(), Profile(width=(512, 768, 800)))
    text = r"^target rtx: profiles\[1\]\.width: expected multiples of 64 pixels for this model, got 800$"
    with pytest.raises(RecipeError, match=text):
        backends.ranges(STEP, target, IMAGE)
    with pytest.raises(RecipeError, match=text):  # the same, before there is a graph
        backends.check_profiles(target, 64)
    backends.check_profiles(rtx(Profile(), Profile(width=(512, 768, 1024))), 64)


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-gpu"])
def test_an_onnxruntime_engine_takes_every_size(backend: Any) -> None:
    assert backends.ranges(STEP, Target("t", backend), IMAGE) == []


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = Target("cpu", "onnxruntime"), Target("cuda", "onnxruntime-gpu", "float16")
    assert backends.unavailable(cpu) is None
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else name)
    assert backends.unavailable(cpu) == "onnxruntime is not installed; pip install onnxruntime"
    assert backends.unavailable(cuda) is None, "building it runs nothing"
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.unavailable(cuda) == "onnx is not installed; pip install onnx"


@pytest.mark.parametrize(
    ("provider", "name"),
    [
        ("cuda", "CUDAExecutionProvider"),
        ("tensorrt", "TensorrtExecutionProvider"),
        ("nv_tensorrt_rtx", "NvTensorRTRTXExecutionProvider"),
    ],
)
def test_engines_of_onnxruntime_on_a_gpu_are_the_portable_graphs(provider: Any, name: str, tmp_path: Path) -> None:
    target = Target("cuda", "onnxruntime-gpu", "float16", provider=provider)
    assert backends.requires(target) == backends.needs(target) == {"provider": name}
    weights = ("denoiser.base.safetensors", "denoiser.slow.safetensors")
    graphs = {"text_encoder": ENCODER, "denoiser.slow": STEP}
    assert backends.portable(target, graphs, {"text_encoder": "float16", "denoiser.slow": "float32"}) == {
        "text_encoder": Engine("text_encoder.float16.onnx"),
        "denoiser.slow": Engine("denoiser.slow.float32.onnx", weights, "float32"),
    }
    files = {"text_encoder": tmp_path / "text_encoder.float16.onnx"}
    assert backends.build(target, files, {}, group="text_encoder", directory=tmp_path) == {}
    assert not list(tmp_path.iterdir())


def test_other_engines_are_built() -> None:
    assert backends.portable(Target("cpu", "onnxruntime"), {"denoiser.slow": STEP}, {}) is None
    assert backends.portable(rtx(), {"denoiser.slow": STEP}, {}) is None


def test_what_plans_need_is_known_before_they_are_built() -> None:
    assert backends.needs(rtx()) == {"compute_capability": "8.9"}
    assert backends.needs(Target("trt", "tensorrt")) == {}
    ampere = Target("trt", "tensorrt", hardware_compatibility="ampere_plus")
    assert backends.needs(ampere) == {"compute_capability": "8.0+"}

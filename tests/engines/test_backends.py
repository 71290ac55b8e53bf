"""The door to the engine backends: what each is told about shapes, and what this machine cannot build."""

from __future__ import annotations

import pytest

from glance_trt.bundle import Graph, Image, Port
from glance_trt.engines import backends
from glance_trt.engines.targets import Target

IMAGE = Image(height=512, width=768, latent_channels=4, latent_scale=8)
STEP = Graph(
    (
        Port("latents", "float32", ("batch", 4, "8*h", "8*w"), "latents"),
        Port("timestep", "float32", (), "table.timestep"),
        Port("prompt_embeds", "float32", ("batch", 77, 768), "condition.prompt_embeds"),
    ),
    (Port("latents_out", "float32", ("batch", 4, "8*h", "8*w")),),
    {"float16": "denoiser.slow.float16.onnx"},
)


def test_a_compiled_engine_takes_the_recipes_size_and_the_targets_batches() -> None:
    target = Target("rtx", "tensorrt-rtx", "float16", ("8.9",), min_batch=1, opt_batch=2, max_batch=4)
    assert backends.ranges(STEP, target, IMAGE) == {
        "latents": ((1, 4, 64, 96), (2, 4, 64, 96), (4, 4, 64, 96)),
        "prompt_embeds": ((1, 77, 768), (2, 77, 768), (4, 77, 768)),
    }


def test_an_onnxruntime_engine_takes_every_size() -> None:
    assert backends.ranges(STEP, Target("cpu", "onnxruntime"), IMAGE) == {}


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("cpu", "onnxruntime")
    assert backends.unavailable(target) is None
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.unavailable(target) == "onnxruntime is not installed; pip install 'glance-trt[cpu]'"

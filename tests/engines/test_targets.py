"""Targets: what their fields may be together, and what the shipped ones are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glance_trt import strict
from glance_trt.engines import targets
from glance_trt.engines.targets import Profile, Target

ENGINES = Path(__file__).parents[2] / "engines"


def target(**fields: Any) -> Target:
    return strict.read(Target, {"name": "t", **fields})


RTX: dict[str, Any] = {"backend": "tensorrt-rtx", "dtype": "float16", "compute_capabilities": ["8.9"]}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"backend": "tensort"}, "backend: expected one of onnxruntime, onnxruntime-gpu, tensorrt, tensorrt-rtx; got "),
        ({"name": "a/b", "backend": "onnxruntime"}, "name: 'a/b' is no valid name"),
        (
            {"backend": "onnxruntime", "profiles": [{}]},
            "profiles: onnxruntime has none; it is for tensorrt and tensorrt-rtx",
        ),
        (
            {"backend": "onnxruntime-gpu", "compute_capabilities": ["8.9"]},
            "compute_capabilities: onnxruntime-gpu has none",
        ),
        ({"backend": "onnxruntime-gpu", "workspace": 64}, "workspace: onnxruntime-gpu has none"),
        ({"backend": "tensorrt", "provider": "tensorrt"}, "provider: tensorrt has none; it is for onnxruntime-gpu"),
        (RTX | {"timing_cache": True}, "timing_cache: tensorrt-rtx has none; it is for tensorrt"),
        (RTX | {"optimization_level": 3}, "optimization_level: tensorrt-rtx has none"),
        (RTX | {"version_compatible": True}, "version_compatible: tensorrt-rtx has none"),
        (RTX | {"hardware_compatibility": "ampere_plus"}, "hardware_compatibility: tensorrt-rtx has none"),
        (
            {"backend": "tensorrt", "optimization_level": 6},
            "optimization_level: expected a whole number from 0 to 5, got 6",
        ),
        ({"backend": "tensorrt", "workspace": 0}, "workspace: expected a whole number from 1 to"),
        ({"backend": "tensorrt", "weight_streaming_budget": 9}, "weight_streaming_budget: is for engines that were"),
        (
            {"backend": "tensorrt", "weight_streaming": True, "weight_streaming_budget": -1},
            "weight_streaming_budget: expected a whole number from 0 to",
        ),
        (RTX | {"compute_capabilities": []}, "compute_capabilities: missing; a TensorRT-RTX plan needs at least one"),
        (RTX | {"compute_capabilities": ["89"]}, """compute_capabilities[0]: expected one such as "8.9", got '89'"""),
        (RTX | {"compute_capabilities": ["8.9", "8.9"]}, "compute_capabilities: '8.9' stands twice"),
        (
            RTX | {"compute_capabilities": ["7.5", "8.9"], "dtype": "float32"},
            "dtype: TensorRT-RTX multiplies matrices on compute capability 7.5 in float16, not in float32",
        ),
        (
            {"backend": "tensorrt", "hardware_compatibility": "ampere_plus", "compute_capabilities": ["7.5", "8.0"]},
            "compute_capabilities: hardware_compatibility: ampere_plus begins at 8.0; got 7.5",
        ),
        (
            RTX | {"profiles": [{}, {"batch": [2, 1, 4]}]},
            "profiles[1].batch: expected [smallest, usual, largest], rising, from 1 to 2147483647; got [2, 1, 4]",
        ),
        (RTX | {"profiles": [{"batch": []}]}, "profiles[0].batch: expected [smallest, usual, largest]"),
        (RTX | {"profiles": [{"height": [64, 64]}]}, "profiles[0].height: expected [smallest, usual, largest]"),
        (
            RTX | {"profiles": [{"width": [64, 64, 8193]}]},
            "profiles[0].width: expected [smallest, usual, largest], rising, from 1 to 8192",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(strict.Mismatch) as refused:
        target(**fields)
    assert str(refused.value).startswith(text)


def test_everything_that_tensorrt_has_may_be_asked_for_at_once() -> None:
    wanted = target(
        backend="tensorrt",
        dtype="bfloat16",
        compute_capabilities=["8.9"],
        profiles=[{"batch": [1, 2, 4], "height": [512, 768, 1024], "width": [512, 768, 1024]}, {"batch": [8, 8, 8]}],
        workspace=2048,
        weight_streaming=True,
        weight_streaming_budget=0,
        hardware_compatibility="same_compute_capability",
        version_compatible=True,
        optimization_level=5,
        timing_cache=True,
    )
    assert wanted.profiles[0] == Profile((1, 2, 4), (512, 768, 1024), (512, 768, 1024))
    assert wanted.profiles[1] == Profile((8, 8, 8))


def test_every_shipped_target_can_be_read_and_goes_by_its_file_s_name() -> None:
    files = sorted(ENGINES.glob("*.yaml"))
    assert {file.stem for file in files} == {
        "cpu",
        "cuda",
        "rtx",
        "rtx-bfloat16",
        "rtx-turing",
        "tensorrt",
        "tensorrt-ampere-plus",
        "tensorrt-bfloat16",
    }
    for file in files:
        assert targets.load(file.stem).name == file.stem


def test_rtx_plans_are_for_the_capabilities_that_nvidia_gives_as_its_default_and_turing() -> None:
    # docs.nvidia.com/deeplearning/tensorrt-rtx, "CPU-Only AOT and TensorRT-RTX Engines"
    assert targets.load("rtx").compute_capabilities == ("8.0", "8.6", "8.9", "12.0")
    assert targets.load("rtx-bfloat16").compute_capabilities == targets.load("rtx").compute_capabilities
    assert targets.load("rtx-turing").compute_capabilities == ("7.5",)


def test_every_field_is_explained_in_the_documentation() -> None:
    text = (ENGINES.parent / "docs" / "recipes.md").read_text(encoding="utf-8").partition("## Target")[2]
    for field in (*Target.__dataclass_fields__, *Profile.__dataclass_fields__):
        assert f"`{field}`" in text, field

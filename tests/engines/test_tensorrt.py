"""Plans for TensorRT-RTX are compiled here without a GPU.

Tests that compile need the ``rtx`` extra, whose native libraries are not made for every platform; without it those
tests, and only those, are skipped. No plan is loaded: the RTX runtime reads not even a plan's header without a driver.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper

from glance_trt.bundle import Engine
from glance_trt.engines import targets, tensorrt
from glance_trt.errors import OutputError, TargetError

SHAPES = {"latents": ((1, 4, 16, 16), (1, 4, 16, 16), (4, 4, 16, 16))}
HEADER = struct.Struct("<4s12xQ")
"""Of a plan: its magic number, and the length of the whole in bytes."""


def write_graph(path: Path, dtype: type[np.floating[Any]], operator: str = "Relu") -> dict[str, np.ndarray]:
    """A decoder-like graph: a convolution, a matrix product, [B, H, W, C] uint8 out; its weights in safetensors."""
    draw = np.random.default_rng(0)
    weights = {
        "conv.weight": draw.normal(size=(8, 4, 3, 3)).astype(dtype),
        "fc.weight": draw.normal(size=(16, 16)).astype(dtype),
    }
    file = path.with_suffix(".safetensors")
    safetensors.numpy.save_file(weights, file)
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    initializers = []
    for name, array in weights.items():
        begin, end = header[name]["data_offsets"]
        tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in {"location": file.name, "offset": 8 + size + begin, "length": end - begin}.items():
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
    nodes = [
        helper.make_node("Cast", ["latents"], ["x"], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
        helper.make_node("Conv", ["x", "conv.weight"], ["hidden"], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["hidden", "fc.weight"], ["mixed"], name="product"),
        helper.make_node(operator, ["mixed"], ["positive"]),
        helper.make_node("Transpose", ["positive"], ["pixels"], perm=[0, 2, 3, 1]),
        helper.make_node("Cast", ["pixels"], ["images"], to=TensorProto.UINT8),
    ]
    latents = helper.make_tensor_value_info("latents", TensorProto.FLOAT, ["batch", 4, 16, 16])
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 16, 16, 8])
    graph = helper.make_graph(nodes, "decoder", [latents], [images], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return weights


def rtx(*capabilities: str) -> targets.Target:
    return targets.Target("rtx", "tensorrt-rtx", "float16", capabilities)


def build(source: Path, directory: Path, target: targets.Target | None = None, **changes: Any) -> dict[str, Engine]:
    arguments = {"prefix": "rtx", "target": target or rtx("8.9"), "shapes": {"decoder": SHAPES}} | changes
    return tensorrt.build({"decoder": source}, directory=directory, **arguments)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="pip install glance-trt[rtx]")
    pytest.importorskip("polygraphy", reason="pip install glance-trt[rtx]")
    folder = tmp_path_factory.mktemp("graphs")
    write_graph(folder / "decoder.onnx", np.float16)
    write_graph(folder / "decoder.float32.onnx", np.float32)
    write_graph(folder / "odd.onnx", np.float16, operator="NoSuchOperator")
    (folder / "garbage.onnx").write_bytes(b"not a graph")
    return folder


def test_one_plan_holds_every_capability_of_the_shipped_target(
    graphs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    environment, imported, calls = dict(os.environ), "polygraphy" in sys.modules, []
    target = targets.load("rtx")
    engines = build(graphs / "decoder.onnx", tmp_path, target, progress=lambda *call: calls.append(call))

    assert engines == {"decoder": Engine("rtx.decoder.plan")}
    assert os.listdir(tmp_path) == ["rtx.decoder.plan"]
    plan = (tmp_path / "rtx.decoder.plan").read_bytes()
    assert HEADER.unpack_from(plan) == (b"vtrt", len(plan))
    for capability in target.compute_capabilities:
        assert b"sm" + capability.replace(".", "").encode() in plan
    assert b"sm75" not in plan
    weight = safetensors.numpy.load_file(graphs / "decoder.safetensors")["fc.weight"]
    assert weight.tobytes() in plan, "the weights of the safetensors file"

    assert {stage for stage, _, _ in calls} == {"compile rtx.decoder"}
    shares = [done / total for _, done, total in calls]
    assert (shares[0], shares[-1]) == (0, 1)
    assert shares == sorted(shares)
    assert len(shares) > 10
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == environment
    assert ("polygraphy" in sys.modules) == imported, "its import here would settle the module for the whole process"


def test_requires_names_the_version_that_is_installed_and_the_capabilities(graphs: Path) -> None:
    from importlib.metadata import version

    needed = tensorrt.requires(targets.load("rtx"))
    assert needed == {"tensorrt_rtx": version("tensorrt-rtx-cu13"), "compute_capability": "8.0 8.6 8.9 12.0"}


def test_a_capability_that_the_module_cannot_compile_for_is_named_with_those_it_can(
    graphs: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        TargetError,
        match=r"target rtx: compute_capabilities: TensorRT-RTX [\d.]+ cannot compile for 9\.0, 6\.1; "
        r"it can for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1",
    ):
        build(graphs / "decoder.onnx", tmp_path, rtx("8.9", "9.0", "6.1"))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("garbage", "Failed to parse the ONNX model"),
        ("odd", "operator: NoSuchOperator .*Plugin not found"),
        ("absent", "Input file cannot be found"),
    ],
)
def test_a_graph_that_cannot_be_parsed_is_an_error_with_the_parsers_reason(
    graphs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    with pytest.raises(TargetError, match=rf"^decoder: TensorRT-RTX could not compile .*{name}\.onnx:\n[^$]*{text}"):
        build(graphs / f"{name}.onnx", tmp_path)
    assert not os.listdir(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_builders_last_error_is_told_and_plans_before_it_are_withdrawn(graphs: Path, tmp_path: Path) -> None:
    sources = {"first": graphs / "decoder.onnx", "second": graphs / "decoder.float32.onnx"}
    with pytest.raises(TargetError, match=r"^second: [^$]*'product' for Turing \(SM75\): FP32 GEMM is not supported"):
        tensorrt.build(
            sources, directory=tmp_path, prefix="rtx", target=rtx("7.5"), shapes=dict.fromkeys(sources, SHAPES)
        )
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("ranges", "text"),
    [
        ({}, r"input latents \(-1, 4, 16, 16\) is dynamic, but has no range of shapes"),
        (SHAPES | {"latent": SHAPES["latents"]}, r"Invalid inputs were provided.*latent"),
    ],
    ids=["missing", "unknown"],
)
def test_ranges_that_do_not_fit_the_inputs_are_errors(graphs: Path, tmp_path: Path, ranges: Any, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        build(graphs / "decoder.onnx", tmp_path, shapes={"decoder": ranges})


def test_an_interrupted_build_ends_its_process_and_leaves_the_folder_as_it_was(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            children.append(self)

    def interrupt(stage: str, done: float, total: float) -> None:
        if done:
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    (tmp_path / "rtx.decoder.plan").write_text("of an earlier build")
    with pytest.raises(KeyboardInterrupt):
        build(graphs / "decoder.onnx", tmp_path, progress=interrupt)
    assert len(children) == 1
    assert children[0].returncode is not None
    assert os.listdir(tmp_path) == ["rtx.decoder.plan"]
    assert (tmp_path / "rtx.decoder.plan").read_text() == "of an earlier build"


def test_the_builder_ends_with_its_parent(graphs: Path, tmp_path: Path) -> None:
    request = {
        "module": "tensorrt_rtx",
        "compute_capabilities": ["8.9"],
        "source": str(graphs / "decoder.onnx"),
        "plan": str(tmp_path / "plan"),
        "shapes": SHAPES,
    }
    command = [sys.executable, "-m", "glance_trt.engines.tensorrt"]
    ended = subprocess.run(command, input=json.dumps(request) + "\n", text=True, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_builder_that_is_killed_becomes_an_error(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "polygraphy").mkdir()
    (tmp_path / "polygraphy" / "__init__.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TargetError, match="its process was ended by SIGKILL; that is usually for want of memory"):
        build(graphs / "decoder.onnx", tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_plan_that_cannot_be_written_is_an_output_error(graphs: Path, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OutputError, match=r"rtx\.decoder\.plan cannot be written: File too large"):
            build(graphs / "decoder.onnx", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not os.listdir(tmp_path)


def test_a_folder_that_does_not_exist_is_an_output_error(graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"absent: the plans cannot be written: No such file or directory"):
        build(graphs / "decoder.onnx", tmp_path / "absent")


BLOCKED = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from glance_trt.engines import targets, tensorrt
print(tensorrt.unavailable(targets.Target("t", sys.argv[2], compute_capabilities=("8.9",))))
"""


def reason_without(package: str, backend: str) -> str:
    command = [sys.executable, "-c", BLOCKED, package, backend]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()


def test_a_missing_package_is_told_with_the_command_that_installs_it() -> None:
    assert (
        reason_without("tensorrt_rtx", "tensorrt-rtx")
        == "TensorRT-RTX is not installed (no module tensorrt_rtx); pip install glance-trt[rtx]"
    )
    assert (
        reason_without("tensorrt", "tensorrt")
        == "TensorRT is not installed (no module tensorrt); pip install glance-trt[tensorrt]"
    )


def test_missing_polygraphy_is_told_too(graphs: Path) -> None:
    assert (
        reason_without("polygraphy", "tensorrt-rtx")
        == "TensorRT-RTX needs Polygraphy to build, which is not installed; pip install glance-trt[rtx]"
    )


def test_a_module_that_cannot_be_loaded_is_told_with_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    reason = tensorrt.unavailable(targets.Target("trt", "tensorrt"))
    assert reason == (
        "TensorRT cannot be loaded (OSError: libnvinfer.so.11: cannot open shared object file); "
        "reinstall it: pip install glance-trt[tensorrt] --force-reinstall"
    )


class Driver:
    """Stands in for libcuda: a machine with one GPU of compute capability 9.0."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TensorRT that is installed; only its version is looked at."""
    fake = types.ModuleType("tensorrt")
    fake.__version__ = "11.1.0.106"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(tensorrt, "_is_installed", lambda name: True)


@pytest.mark.usefixtures("module")
def test_tensorrt_without_a_gpu_is_told_that_rtx_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    with pytest.raises(TargetError, match=r"no NVIDIA GPU or no driver; build on .* or for a tensorrt-rtx target"):
        tensorrt.requires(targets.Target("trt", "tensorrt"))


@pytest.mark.usefixtures("module")
def test_tensorrt_builds_for_the_gpu_that_is_present_and_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    expected = {"tensorrt": "11.1.0.106", "compute_capability": "9.0"}
    assert tensorrt.requires(targets.Target("trt", "tensorrt")) == expected
    assert tensorrt.requires(targets.Target("trt", "tensorrt", compute_capabilities=("8.9", "9.0"))) == expected
    with pytest.raises(TargetError, match=r"compiles for the GPU of the machine it runs on, which is 9\.0, not 8\.9"):
        tensorrt.requires(targets.Target("trt", "tensorrt", compute_capabilities=("8.9",)))

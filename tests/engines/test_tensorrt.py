"""Plans for TensorRT-RTX are compiled here without a GPU.

Tests that compile need the ``rtx`` extra, whose native libraries are not made for every platform; without it those
tests, and only those, are skipped. No plan is loaded: the RTX runtime reads not even a plan's header without a driver.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper

from glance_trt import gpu
from glance_trt.engines import precision, targets, tensorrt
from glance_trt.engines.targets import Ranges, Target
from glance_trt.errors import OutputError, TargetError
from glance_trt.requirements import this_platform
from glance_trt.worker import Worker

from ..models import driver

REPOSITORY = Path(__file__).parents[2]
SHAPES: Ranges = {"latents": ((1, 4, 16, 16), (1, 4, 16, 16), (4, 4, 16, 16))}
SUM = """<ir_version: 10, opset_import: ["" : 18]>
    sum (float16[4] x, float16[4] y) => (float16[4] z) { z = Add(x, y) }"""
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
        helper.make_node("Conv", ["x", "conv.weight"], ["hidden"], name="conv", pads=[1, 1, 1, 1]),
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


def rtx(*capabilities: str, **options: Any) -> Target:
    return Target("rtx", "tensorrt-rtx", "float16", capabilities, **options)


def build(source: Path, directory: Path, target: Target | None = None, **changes: Any) -> dict[str, precision.Counts]:
    arguments = {"target": target or rtx("8.9"), "ranges": {"decoder": [SHAPES]}} | changes
    return tensorrt.build({"decoder": source}, directory=directory, **arguments)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="pip install glance-trt[rtx]")
    pytest.importorskip("polygraphy", reason="pip install glance-trt[rtx]")
    folder = tmp_path_factory.mktemp("graphs")
    write_graph(folder / "decoder.float16.onnx", np.float16)
    write_graph(folder / "decoder.float32.onnx", np.float32)
    write_graph(folder / "decoder.bfloat16.onnx", ml_dtypes.bfloat16)
    write_graph(folder / "odd.onnx", np.float16, operator="NoSuchOperator")
    onnx.save(onnx.parser.parse_model(SUM), folder / "sum.onnx")
    (folder / "garbage.onnx").write_bytes(b"not a graph")
    return folder


@pytest.mark.parametrize(
    ("name", "dtype", "held"),
    [
        ("rtx", "float16", ("80", "86", "89", "120")),
        ("rtx", "float32", ("80", "86", "89", "120")),
        ("rtx-bfloat16", "bfloat16", ("80", "86", "89", "120")),
        ("rtx-turing", "float16", ("75",)),
    ],
)
def test_one_plan_holds_every_capability_of_the_shipped_target(
    graphs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, dtype: Any, held: tuple[str, ...]
) -> None:
    environment, imported, calls = dict(os.environ), "polygraphy" in sys.modules, []
    target = dataclasses.replace(targets.load(name), dtype=dtype)
    source = graphs / f"decoder.{dtype}.onnx"
    counts = build(source, tmp_path, target, progress=lambda *call: calls.append(call))

    assert os.listdir(tmp_path) == [f"{name}.decoder.plan"]
    plan = (tmp_path / f"{name}.decoder.plan").read_bytes()
    assert HEADER.unpack_from(plan) == (b"vtrt", len(plan))
    for capability in ("75", "80", "86", "89", "120"):
        assert (b"sm" + capability.encode() in plan) == (capability in held)
    weight = safetensors.numpy.load_file(source.with_suffix(".safetensors"))["fc.weight"]
    assert weight.tobytes() in plan, "the weights of the safetensors file"
    assert counts["decoder"]["convolution"] == counts["decoder"]["matrix_multiply"] == {dtype: 1}

    assert {stage for stage, _, _ in calls} == {f"compile {name}.decoder"}
    shares = [done / total for _, done, total in calls]
    assert (shares[0], shares[-1]) == (0, 1)
    assert shares == sorted(shares)
    assert len(shares) > 2
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == environment
    assert ("polygraphy" in sys.modules) == imported, "its import here would settle the module for the whole process"


def test_a_plan_may_stream_its_weights_and_have_several_profiles(graphs: Path, tmp_path: Path) -> None:
    source, more = graphs / "decoder.float16.onnx", {"latents": ((8, 4, 16, 16),) * 3}
    for folder in ("plain", "streaming", "profiles"):
        (tmp_path / folder).mkdir()
    build(source, tmp_path / "plain")
    build(source, tmp_path / "streaming", rtx("8.9", weight_streaming=True))
    build(source, tmp_path / "profiles", ranges={"decoder": [SHAPES, more]})
    plain, streaming, profiles = (
        (tmp_path / folder / "rtx.decoder.plan").read_bytes() for folder in ("plain", "streaming", "profiles")
    )
    assert streaming != plain
    assert len(profiles) > 1.5 * len(plain), "code for each"


def test_a_graph_of_another_dtype_is_refused_before_it_is_built(graphs: Path, tmp_path: Path) -> None:
    source = graphs / "decoder.float32.onnx"
    text = r"^decoder: layer conv \(convolution\) computes in float32, asked for was float16, and 1 more do not"
    with pytest.raises(TargetError, match=text):
        build(source, tmp_path)
    assert not os.listdir(tmp_path)
    assert build(source, tmp_path, dtypes={"decoder": "float32"})["decoder"]["convolution"] == {"float32": 1}


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
        build(graphs / "decoder.float16.onnx", tmp_path, rtx("8.9", "9.0", "6.1"))
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
    sources = {"first": graphs / "sum.onnx", "second": graphs / "decoder.float16.onnx"}
    target, ranges = rtx("8.9", workspace=1), {"second": [SHAPES]}
    with pytest.raises(TargetError, match=r"^second: TensorRT-RTX could not [^$]*no tactics .* within workspace limit"):
        tensorrt.build(sources, directory=tmp_path, target=target, ranges=ranges)
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
        build(graphs / "decoder.float16.onnx", tmp_path, ranges={"decoder": [ranges] if ranges else []})


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
        build(graphs / "decoder.float16.onnx", tmp_path, progress=interrupt)
    assert len(children) == 1
    assert children[0].returncode is not None
    assert os.listdir(tmp_path) == ["rtx.decoder.plan"]
    assert (tmp_path / "rtx.decoder.plan").read_text() == "of an earlier build"


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_builder_that_is_killed_becomes_an_error(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "polygraphy").mkdir()
    (tmp_path / "polygraphy" / "__init__.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TargetError, match="its process was ended by SIGKILL; that is usually for want of memory"):
        build(graphs / "decoder.float16.onnx", tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_plan_that_cannot_be_written_is_an_output_error(graphs: Path, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OutputError, match=r"rtx\.decoder\.plan cannot be written: File too large"):
            build(graphs / "decoder.float16.onnx", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not os.listdir(tmp_path)


def test_a_folder_that_does_not_exist_is_an_output_error(graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"absent: the plans cannot be written: No such file or directory"):
        build(graphs / "decoder.float16.onnx", tmp_path / "absent")


def test_missing_polygraphy_is_told_with_the_command_that_installs_it(graphs: Path) -> None:
    code = (
        "import sys; sys.modules['polygraphy'] = None\n"
        "from glance_trt.engines import targets, tensorrt\n"
        "print(tensorrt.unavailable(targets.load('rtx')))"
    )
    told = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout
    text = "TensorRT-RTX needs Polygraphy to build, which is not installed; pip install 'glance-trt[rtx]'\n"
    assert told == text


# --- TensorRT, of which only the version is looked at here ---


def trt(**options: Any) -> Target:
    return Target("trt", "tensorrt", **options)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("tensorrt")
    fake.__version__ = "11.1.0.106"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(tensorrt, "is_installed", lambda name: True)


@pytest.mark.usefixtures("module")
def test_tensorrt_without_a_gpu_is_told_that_rtx_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    driver.remove(monkeypatch)
    with pytest.raises(
        TargetError, match=r"and there is no NVIDIA driver here .*; build on .* or for a tensorrt-rtx ta"
    ):
        tensorrt.requires(trt())


@pytest.mark.usefixtures("module")
def test_tensorrt_builds_for_the_gpu_that_is_present_and_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    driver.install(monkeypatch, "9.0")
    expected = {"tensorrt": "11.1.0.106", "compute_capability": "9.0", "platform": this_platform()}
    assert tensorrt.requires(trt()) == expected
    assert tensorrt.requires(trt(compute_capabilities=("8.9", "9.0"))) == expected
    assert tensorrt.requires(trt(hardware_compatibility="same_compute_capability")) == expected
    with pytest.raises(TargetError, match=r"compiles for the GPU of the machine it runs on, which is 9\.0, not 8\.9"):
        tensorrt.requires(trt(compute_capabilities=("8.9",)))


@pytest.mark.usefixtures("module")
def test_compatible_plans_need_less(monkeypatch: pytest.MonkeyPatch) -> None:
    driver.install(monkeypatch, "9.0")
    ampere = trt(hardware_compatibility="ampere_plus")
    assert tensorrt.requires(ampere)["compute_capability"] == "8.0+"
    assert tensorrt.requires(trt(version_compatible=True))["tensorrt"] == "11.1+"
    driver.install(monkeypatch, "7.5")
    with pytest.raises(TargetError, match=r"ampere_plus is built on compute capability 8\.0 or later, .* GPU has 7\.5"):
        tensorrt.requires(ampere)


# --- what the builder is told, and what it is asked afterwards, in the process that would compile ---


def told(target: Target) -> dict[str, Any]:
    """The configuration of a network without layers, as TensorRT-RTX's own object for it has it."""
    import tensorrt_rtx

    from glance_trt.engines import compiler

    builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger())
    config = compiler._config(builder, builder.create_network(), target, [{}], compiler._Monitor(print, ""))
    flags = tensorrt_rtx.BuilderFlag.__members__
    return {
        "flags": {name for name, flag in flags.items() if config.get_flag(flag)},
        "workspace": config.get_memory_pool_limit(tensorrt_rtx.MemoryPoolType.WORKSPACE),
        "level": config.builder_optimization_level,
        "detailed": config.profiling_verbosity == tensorrt_rtx.ProfilingVerbosity.DETAILED,
        "capabilities": [config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)],
    }


def kept(folder: str) -> list[tuple[str, bool]]:
    """The files that two timing caches leave, one after the other, and whether the second began with the first's."""
    import tensorrt_rtx

    from glance_trt.engines import compiler

    os.environ["XDG_CACHE_HOME"] = folder
    gpu.compute_capability = lambda ordinal=0: "8.9"  # type: ignore[assignment]

    class Cache:
        def serialize(self) -> bytes:
            return b"measured"

    class Config:
        def create_timing_cache(self, measured: bytes) -> Cache:
            self.measured = measured
            return Cache()

        def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
            return True

    found = []
    for _ in range(2):
        config: Any = Config()
        compiler._TimingCache(config).save()
        (file,) = (path for path in Path(folder, "glance-trt").iterdir())
        found.append((file.name.replace(tensorrt_rtx.__version__, "VERSION"), config.measured == b"measured"))
    return found


def inspected(dtype: str) -> precision.Counts:
    """What counts where a GPU is, and an engine that computes in float16; the GPU and the engine are stand-ins."""
    from glance_trt.engines import compiler

    gpu.compute_capability = lambda ordinal=0: "8.9"  # type: ignore[assignment]
    layer = {"Name": "fc", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Half"}]}

    class Engine:
        def create_engine_inspector(self) -> Engine:
            return self

        def get_engine_information(self, format: Any) -> str:
            return json.dumps({"Layers": [layer]})

    class Runtime:
        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            return Engine() if plan == b"plan" else None

    compiler.trt.Runtime = Runtime
    plan: Any = b"plan"
    assert compiler._inspected(plan[:1], dtype, "decoder") == {}, "not for this GPU"
    return compiler._inspected(plan, dtype, "decoder")


@pytest.fixture
def compiling(graphs: Path) -> Any:
    environment = {"POLYGRAPHY_USE_TENSORRT_RTX": "1", "PYTHONPATH": str(REPOSITORY)}
    with Worker("compiling", environment) as worker:
        yield worker


def test_every_option_reaches_the_builder(compiling: Worker) -> None:
    plain = compiling.call(told, rtx("7.5", "8.9"))
    assert plain["flags"] == {"REQUIRE_USER_ALLOCATION"}, "and no TF32"
    assert plain["capabilities"] == ["SM75", "SM89"]
    assert plain["detailed"]
    streaming = compiling.call(told, rtx("8.9", weight_streaming=True, workspace=64))
    assert streaming["flags"] == {"WEIGHT_STREAMING"}
    assert streaming["workspace"] == 64 * 2**20

    options = {"optimization_level": 5, "version_compatible": True, "weight_streaming": True, "workspace": 64}
    full = compiling.call(told, trt(**options))
    assert full["flags"] == {"WEIGHT_STREAMING", "VERSION_COMPATIBLE"}
    assert (full["level"], full["workspace"], full["detailed"]) == (5, 64 * 2**20, True)
    assert compiling.call(told, trt())["flags"] == set()


def test_what_was_measured_is_kept_for_the_next_build_on_this_gpu(compiling: Worker, tmp_path: Path) -> None:
    file = "timing-VERSION-8.9.cache"
    assert compiling.call(kept, str(tmp_path)) == [(file, False), (file, True)]


def test_what_the_finished_engine_says_counts_where_there_is_a_gpu(compiling: Worker) -> None:
    assert compiling.call(inspected, "float16") == {"gemm": {"float16": 1}}
    with pytest.raises(
        TargetError, match=r"^decoder: layer fc \(gemm\) of its engine computes in float16, asked for wa"
    ):
        compiling.call(inspected, "float32")

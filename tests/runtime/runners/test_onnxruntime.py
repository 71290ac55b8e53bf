from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from glance_trt.engines.onnxruntime import build
from glance_trt.errors import BundleError, InputError, TargetError
from glance_trt.runtime.runners import onnxruntime as runners
from glance_trt.runtime.runners.onnxruntime import OnnxRuntimeRunner, requirements

STEP = """<ir_version: 10, opset_import: ["" : 20]>
    step (float[batch,4,"8*h","8*w"] latents, float[] timestep, float[batch,7,64] prompt_embeds)
        => (float[batch,4,"8*h","8*w"] denoised, float[batch,64] pooled) <int64[1] axis = {1}> {
        projected = MatMul(prompt_embeds, weight)
        pooled = ReduceMean<keepdims = 0>(projected, axis)
        denoised = Mul(latents, timestep)
    }"""
FILE = "cpu.denoiser.slow.onnx"


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)


@pytest.fixture(scope="module")
def directory(weight: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    model = parser.parse_model(STEP)
    model.graph.initializer.append(numpy_helper.from_array(weight, "weight"))
    source = tmp_path_factory.mktemp("graphs") / "step.onnx"
    onnx.save(model, source)
    build({"denoiser.slow": source}, directory=folder, prefix="cpu")
    return folder


@pytest.fixture
def runner(directory: Path) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(directory, {"denoiser.slow": FILE})


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    """The engine's folder, to be damaged."""
    return shutil.copytree(directory, tmp_path / "copy")


def inputs(batch: int = 1, **changed: Any) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {
        "latents": draw.standard_normal((batch, 4, 16, 8), dtype=np.float32),
        "timestep": np.array(0.5, np.float32),
        "prompt_embeds": draw.standard_normal((batch, 7, 64), dtype=np.float32),
        **changed,
    }


def edit(path: Path, key: str, value: str) -> None:
    model = onnx.load(path, load_external_data=False)
    (item,) = (item for item in model.metadata_props if item.key == key)
    item.value = value
    path.write_bytes(model.SerializeToString())


# --- running --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_run_returns_every_output_by_name(batch: int, runner: OnnxRuntimeRunner, weight: np.ndarray) -> None:
    given = inputs(batch)
    outputs = runner.run("denoiser.slow", given)
    assert list(outputs) == ["denoised", "pooled"]
    np.testing.assert_array_equal(outputs["denoised"], given["latents"] * np.float32(0.5))
    np.testing.assert_allclose(outputs["pooled"], (given["prompt_embeds"] @ weight).mean(axis=1), atol=1e-5)


def test_outputs_belong_to_the_caller(runner: OnnxRuntimeRunner) -> None:
    first = runner.run("denoiser.slow", inputs())["denoised"]
    kept = first.copy()
    runner.run("denoiser.slow", inputs(timestep=np.array(9, np.float32)))
    runner.close()
    np.testing.assert_array_equal(first, kept)


def test_numpy_scalars_and_slices_are_taken_as_arrays(runner: OnnxRuntimeRunner) -> None:
    wide = inputs()["latents"].repeat(2, axis=3)
    outputs = runner.run("denoiser.slow", inputs(latents=wide[..., ::2], timestep=np.float32(0.5)))
    np.testing.assert_array_equal(outputs["denoised"], inputs()["latents"] * np.float32(0.5))


def test_threads_may_share_a_runner(runner: OnnxRuntimeRunner) -> None:
    start = threading.Barrier(4)

    def run(index: int) -> float:
        start.wait()
        latents = np.full((1, 4, 8, 8), index, np.float32)
        return float(runner.run("denoiser.slow", inputs(latents=latents))["denoised"].mean())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [0, 0.5, 1, 1.5]


def test_engines_are_opened_at_their_first_use(directory: Path) -> None:
    runner = OnnxRuntimeRunner(directory, {"denoiser.slow": FILE, "decoder": "cpu.decoder.onnx"})
    runner.run("denoiser.slow", inputs())
    with pytest.raises(BundleError, match=r"^cpu\.decoder\.onnx: missing in \S+; compile it anew on this machine: "):
        runner.run("decoder", {})


def test_phases_are_opened_side_by_side(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, open_ = threading.Barrier(2), OnnxRuntimeRunner._open

    def meet(self: OnnxRuntimeRunner, file: str) -> Any:
        both.wait(timeout=60)
        return open_(self, file)

    monkeypatch.setattr(OnnxRuntimeRunner, "_open", meet)
    runner = OnnxRuntimeRunner(directory, {"denoiser.slow": FILE, "decoder": "absent.onnx", "denoiser.fast": FILE})
    for phase in ("denoiser.slow", "denoiser.fast"):
        assert list(runner.run(phase, inputs())) == ["denoised", "pooled"]


def test_one_thread_opens_one_engine_at_a_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, open_ = threading.Lock(), OnnxRuntimeRunner._open

    def enter(self: OnnxRuntimeRunner, file: str) -> Any:
        assert alone.acquire(blocking=False)
        try:
            return open_(self, file)
        finally:
            alone.release()

    monkeypatch.setattr(OnnxRuntimeRunner, "_open", enter)
    runner = OnnxRuntimeRunner(directory, {"denoiser.slow": FILE, "denoiser.fast": FILE}, threads=1)
    for phase in ("denoiser.slow", "denoiser.fast"):
        runner.run(phase, inputs())


def test_a_phase_that_cannot_be_opened_fails_when_it_is_used(directory: Path) -> None:
    runner = OnnxRuntimeRunner(directory, {"denoiser.slow": FILE, "denoiser.fast": "cpu.denoiser.fast.onnx"})
    runner.run("denoiser.slow", inputs())
    with pytest.raises(
        BundleError, match=r"^cpu\.denoiser\.fast\.onnx: missing in \S+; compile it anew on this machine: "
    ):
        runner.run("denoiser.fast", inputs())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads with Linux's /proc/self/task")
def test_threads_is_the_number_that_computes_a_graph(directory: Path) -> None:
    code = """
import contextlib, sys
from pathlib import Path
from glance_trt.errors import InputError
from glance_trt.runtime.runners.onnxruntime import OnnxRuntimeRunner

runner = OnnxRuntimeRunner(Path(sys.argv[1]), {"a": sys.argv[2]}, threads=int(sys.argv[3]))
before = set(Path("/proc/self/task").iterdir())
with contextlib.suppress(InputError):
    runner.run("a", {})
print(len(set(Path("/proc/self/task").iterdir()) - before))
"""
    for threads in (1, 3):
        command = [sys.executable, "-c", code, directory, FILE, str(threads)]
        added = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert int(added) == threads - 1  # the caller's own thread computes as well


def test_importing_the_runner_does_not_load_onnxruntime() -> None:
    code = "import sys, glance_trt.runtime.runners.onnxruntime; print('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- inputs that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"latents": np.zeros((2, 4, 96, 97), np.float32)},
            r"got latents \(2,4,96,97\); this engine takes \(batch,4,8\*h,8\*w\)",
        ),
        (
            {"latents": np.zeros((1, 3, 8, 8), np.float32)},
            r"got latents \(1,3,8,8\); this engine takes \(batch,4,8\*h,8\*w\)",
        ),
        (
            {"latents": np.zeros((4, 8, 8), np.float32)},
            r"got latents \(4,8,8\); this engine takes \(batch,4,8\*h,8\*w\)",
        ),
        (
            {"latents": np.zeros((0, 4, 8, 8), np.float32)},
            r"got latents \(0,4,8,8\); this engine takes \(batch,4,8\*h,8\*w\)",
        ),
        ({"timestep": np.array([1], np.float32)}, r"got timestep \(1\); this engine takes \(\)"),
        ({"timestep": np.array(1.0)}, r"got timestep \(\) float64; this engine takes float32"),
        ({"timestep": "soon"}, r"got timestep \(\) <U4; this engine takes float32"),
        (
            {"prompt_embeds": np.zeros((2, 7, 64), np.float32)},
            r"got prompt_embeds \(2,7,64\) and latents \(1,4,16,8\); they differ in batch",
        ),
        ({"time": np.zeros(1)}, r"got 'time', which is no input; this engine takes latents, timestep, prompt_embeds"),
    ],
    ids=["multiple", "channels", "rank", "empty", "scalar", "dtype", "text", "batch", "name"],
)
def test_input_that_does_not_fit_is_named(changed: dict[str, Any], message: str, runner: OnnxRuntimeRunner) -> None:
    with pytest.raises(InputError, match=rf"^denoiser\.slow: {message}$"):
        runner.run("denoiser.slow", inputs(**changed))


def test_missing_input_is_named(runner: OnnxRuntimeRunner) -> None:
    given = inputs()
    del given["timestep"]
    with pytest.raises(
        InputError, match=r"input 'timestep' is missing; this engine takes latents, timestep, prompt_emb"
    ):
        runner.run("denoiser.slow", given)


# --- engines that cannot run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0.0, 0.5], ids=["empty", "half"])
def test_damaged_engine_is_named(cut: float, copy: Path) -> None:
    data = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(data[: int(len(data) * cut)])
    message = (
        r"^cpu\.denoiser\.slow\.onnx: ONNX Runtime \S+ cannot load it: .*damaged.*glance-trt verify, or compile it anew"
    )
    with pytest.raises(BundleError, match=message):
        OnnxRuntimeRunner(copy, {"denoiser.slow": FILE}).run("denoiser.slow", inputs())


@pytest.mark.parametrize("change", ["short", "absent"])
def test_engine_with_damaged_weights_is_named(change: str, copy: Path) -> None:
    weights = copy / "cpu.denoiser.slow.bin"
    if change == "short":
        weights.write_bytes(weights.read_bytes()[:8192])
    else:
        weights.unlink()
    with pytest.raises(BundleError, match=r"^cpu\.denoiser\.slow\.onnx: ONNX Runtime \S+ cannot load it: .*damaged"):
        OnnxRuntimeRunner(copy, {"denoiser.slow": FILE}).run("denoiser.slow", inputs())


@pytest.mark.parametrize(("key", "value"), [("onnxruntime", "1.2.3"), ("cpu", "x86_64-avx9000")])
def test_engine_for_another_machine_is_refused(key: str, value: str, copy: Path) -> None:
    edit(copy / FILE, key, value)
    here = requirements()[key]
    remedy = r"pip install onnxruntime==1\.2\.3, or compile it anew" if key == "onnxruntime" else "compile it anew"
    message = rf"^cpu\.denoiser\.slow\.onnx: built for {key} {value}, but this is {here}; {remedy} on this machine: "
    with pytest.raises(TargetError, match=message):
        OnnxRuntimeRunner(copy, {"denoiser.slow": FILE}).run("denoiser.slow", inputs())


def test_missing_onnxruntime_tells_what_to_install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TargetError, match=r"^ONNX Runtime is not installed \(.+\): pip install 'glance-trt\[cpu\]'$"):
        OnnxRuntimeRunner(directory, {"denoiser.slow": FILE})


def test_graph_without_an_engine_is_named(runner: OnnxRuntimeRunner) -> None:
    with pytest.raises(TargetError, match=r"^decoder: no such engine; this target has denoiser\.slow$"):
        runner.run("decoder", {})


def test_closed_runner_says_so(runner: OnnxRuntimeRunner) -> None:
    runner.run("denoiser.slow", inputs())
    runner.close()
    runner.close()
    with pytest.raises(TargetError, match=r"^denoiser\.slow: the pipeline is closed; open the bundle again$"):
        runner.run("denoiser.slow", inputs())


# --- what an engine depends on --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "features", "cpu"),
    [
        ("x86_64", ["X86_V3", "X86_V4", "AVX512_ICL"], "x86_64-avx512"),
        ("AMD64", ["AVX2", "FMA3", "AVX512F"], "x86_64-avx512"),
        ("x86_64", ["X86_V3"], "x86_64-avx2"),
        ("x86_64", ["AVX", "AVX2"], "x86_64-avx2"),
        ("x86_64", [], "x86_64"),
        ("arm64", ["ASIMDHP"], "aarch64"),
    ],
)
def test_cpu_is_named_by_the_vectors_that_weights_are_laid_out_for(
    machine: str, features: list[str], cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    simd = {"baseline": ["X86_V2"], "found": features, "not found": []}
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(runners.np, "show_config", lambda mode: {"SIMD Extensions": simd})
    assert requirements()["cpu"] == cpu


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="compares with Linux's /proc/cpuinfo")
def test_cpu_agrees_with_the_system() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    if "avx512f" in flags:
        assert requirements()["cpu"] == "x86_64-avx512"
    elif "avx2" in flags:
        assert requirements()["cpu"] == "x86_64-avx2"
    else:
        assert "avx" not in requirements()["cpu"]

"""What engines need, against machines that have it and machines that do not: TensorRT and the driver are stand-ins."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from glance_trt import requirements
from glance_trt.requirements import this_platform, unrunnable
from glance_trt.runtime.runners.onnxruntime import requirements as of_the_cpu

from .models import driver

PLAN = {"tensorrt": "11.1.0.106", "compute_capability": "8.9", "platform": this_platform()}


def install(monkeypatch: pytest.MonkeyPatch, module: str, version: str, **attributes: object) -> None:
    fake = types.ModuleType(module)
    vars(fake).update(attributes, __version__=version)
    monkeypatch.setitem(sys.modules, module, fake)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with TensorRT 11.1, cuda-core, and a GPU of compute capability 8.9."""
    install(monkeypatch, "tensorrt", "11.1.0.106")
    driver.install(monkeypatch, "8.9")
    monkeypatch.setattr(requirements, "is_installed", lambda module: True)


@pytest.mark.usefixtures("machine")
def test_a_plan_that_was_built_here_runs_here() -> None:
    assert unrunnable("tensorrt", PLAN) is None
    assert unrunnable("tensorrt", {}) is None, "an unknown need is none"


def test_the_engines_of_a_cpu_run_on_no_gpu() -> None:
    assert unrunnable("onnxruntime", of_the_cpu(), 0) is None
    assert unrunnable("onnxruntime", of_the_cpu(), 3) == "runs on the CPU; for GPU 3, take a target for one"


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("wanted", "runs"),
    [
        ("11.1.0.106", True),
        ("11.1.0.105", False),
        ("11.1+", True),
        ("11.0+", True),
        ("11.2+", False),
        ("10.13+", False),
    ],
)
def test_a_plan_wants_its_version_or_of_its_major_version_at_least_it(wanted: str, runs: bool) -> None:
    reason = unrunnable("tensorrt", PLAN | {"tensorrt": wanted})
    assert (reason is None) == runs
    if reason:
        assert reason.startswith(f"built for TensorRT {wanted}, and this is 11.1.0.106; pip install 'tensorrt")
        assert reason.endswith("or compile it anew on this machine: glance-trt compile BUNDLE --engine TARGET")


@pytest.mark.usefixtures("machine")
def test_the_version_that_is_wanted_is_told_as_pip_takes_it() -> None:
    from packaging.requirements import Requirement

    for wanted, fits in (("10.13.0.35", "10.13.0.35"), ("11.2+", "11.4.0")):
        reason = unrunnable("tensorrt", {"tensorrt": wanted})
        assert reason
        assert Requirement(reason.split("'")[1]).specifier.contains(fits)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("held", "runs"),
    [("8.9", True), ("8.0 8.6 8.9 12.0", True), ("8.0 8.6", False), ("8.0+", True), ("12.0+", False), ("18.9", False)],
)
def test_a_plan_runs_on_the_compute_capabilities_that_it_holds(held: str, runs: bool) -> None:
    reason = unrunnable("tensorrt", PLAN | {"compute_capability": held})
    assert (reason is None) == runs
    if reason:
        shown = held.replace(" ", ", ")
        assert reason.startswith(f"built for GPUs of compute capability {shown}, and this one has 8.9; build it for")


def test_ten_is_more_than_nine(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.install(monkeypatch, "10.0")
    assert unrunnable("tensorrt", {"compute_capability": "9.0+"}) is None


@pytest.mark.usefixtures("machine")
def test_another_platform_is_refused_by_tensorrt_and_nothing_to_rtx() -> None:
    reason = unrunnable("tensorrt", PLAN | {"platform": "windows-x86_64"})
    assert reason
    assert reason.startswith(f"built for windows-x86_64, and this is {this_platform()}; compile it anew")


def test_another_gpu_of_the_machine_may_fit(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.install(monkeypatch, "8.9", "12.0")
    assert "this one has 8.9" in str(unrunnable("tensorrt", {"compute_capability": "12.0"}))
    assert unrunnable("tensorrt", {"compute_capability": "12.0"}, device=1) is None


def test_what_is_missing_is_told_with_what_to_do(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "is_installed", lambda module: module != "cuda.core")
    assert "cuda-core, which runs engines on a GPU, is not installed; pip install" in str(unrunnable("tensorrt", PLAN))
    driver.remove(monkeypatch)
    assert str(unrunnable("tensorrt", PLAN)).endswith(
        "run a target for the CPU, or go to a machine with an NVIDIA GPU and its driver"
    )
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "TensorRT is not installed" in str(unrunnable("tensorrt", PLAN))


def test_engines_for_the_cpu_want_onnxruntime_s_version_and_the_cpu_s_family() -> None:
    assert unrunnable("onnxruntime", of_the_cpu()) is None
    assert str(unrunnable("onnxruntime", {"onnxruntime": "1.2.3"})).startswith("built for onnxruntime 1.2.3, but")


@pytest.mark.parametrize(
    ("provider", "wheel"),
    [
        ("CUDAExecutionProvider", "glance-trt[gpu]"),
        ("TensorrtExecutionProvider", "glance-trt[gpu]"),
        ("NvTensorRTRTXExecutionProvider", "onnxruntime-trt-rtx"),
    ],
)
def test_portable_graphs_want_onnxruntime_s_provider_and_a_gpu(
    machine: None, monkeypatch: pytest.MonkeyPatch, provider: str, wheel: str
) -> None:
    present = ["CPUExecutionProvider"]
    install(monkeypatch, "onnxruntime", "1.31.1", get_available_providers=lambda: present)
    reason = str(unrunnable("onnxruntime-gpu", {"provider": provider}))
    assert reason.startswith(f"this ONNX Runtime has no {provider}, but CPUExecutionProvider; install one that has it")
    assert reason.endswith(f"pip uninstall onnxruntime; pip install '{wheel}'")
    present.insert(0, provider)
    assert unrunnable("onnxruntime-gpu", {"provider": provider}) is None
    driver.remove(monkeypatch)
    assert "there is no NVIDIA driver here" in str(unrunnable("onnxruntime-gpu", {"provider": provider}))


BLOCKED = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from glance_trt.requirements import unrunnable
print(unrunnable(sys.argv[2], {}))
"""


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("tensorrt-rtx", "TensorRT-RTX is not installed (no module tensorrt_rtx); pip install 'glance-trt[rtx]'"),
        ("tensorrt", "TensorRT is not installed (no module tensorrt); pip install 'glance-trt[tensorrt]'"),
        ("onnxruntime-gpu", "ONNX Runtime is not installed (No module named 'onnxruntime'); pip install"),
        ("onnxruntime", "ONNX Runtime is not installed (No module named 'onnxruntime'): pip install 'glance-trt[cpu]'"),
    ],
)
def test_a_missing_package_is_told_with_the_command_that_installs_it(backend: str, expected: str) -> None:
    module = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}.get(backend, "onnxruntime")
    command = [sys.executable, "-c", BLOCKED, module, backend]
    assert subprocess.run(command, text=True, capture_output=True, check=True).stdout.startswith(expected)


def test_a_module_that_cannot_be_loaded_is_told_with_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert unrunnable("tensorrt", {}) == (
        "TensorRT cannot be loaded (OSError: libnvinfer.so.11: cannot open shared object file); "
        "reinstall it: pip install --force-reinstall tensorrt"
    )


def test_asking_imports_neither_pytorch_nor_polygraphy() -> None:
    code = (
        "import sys; from glance_trt.requirements import unrunnable\n"
        "for backend in ('onnxruntime', 'onnxruntime-gpu', 'tensorrt', 'tensorrt-rtx'): unrunnable(backend, {})\n"
        "print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout.split()
    assert "glance_trt.requirements" in loaded
    assert not {"torch", "polygraphy", "onnx", "cuda.core"} & set(loaded)

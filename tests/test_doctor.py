"""The doctor examines every shipped target and says why one cannot be built, and what else is wrong here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from glance_trt import __version__, doctor, recipe
from glance_trt.doctor import Finding, examine

from .models import driver


def finding(what: str) -> Finding:
    (found,) = (item for item in examine() if item.what == what)
    return found


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Distributions whose version is to be another, or none."""
    known: Callable[[str], str] = metadata.version

    def version(name: str) -> str:
        wanted = versions.get(name.replace("-", "_"), known(name) if name.replace("-", "_") not in versions else None)
        if wanted is None:
            raise metadata.PackageNotFoundError(name)
        return wanted

    monkeypatch.setattr(metadata, "version", version)


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Modules that are not to be found."""
    find_spec = importlib.util.find_spec
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else find_spec(name))


def test_everything_that_this_test_environment_has_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, onnxruntime_gpu=None)
    found = {item.what: item for item in examine()}
    assert found["glance-trt"].detail.startswith(f"{__version__}, Python 3.")
    assert found["extra export"] == Finding("extra export", True, "installed")
    assert found["extra distill"] == Finding("extra distill", True, "installed")
    assert found["ONNX Runtime"].ok
    assert found["ONNX Runtime"].detail.startswith(f"onnxruntime {metadata.version('onnxruntime')}: ")
    assert "CPUExecutionProvider" in found["ONNX Runtime"].detail
    assert found["build for cpu"] == Finding("build for cpu", True, "yes")
    assert found["run cpu"].ok
    assert found["run cpu"].detail.startswith(f"engines that need onnxruntime {metadata.version('onnxruntime')}, cpu ")
    assert found["build for cuda"] == Finding("build for cuda", True, "yes")


def test_every_shipped_target_is_examined() -> None:
    shipped = sorted(file.stem for file in (Path(__file__).parents[1] / "engines").glob("*.yaml"))
    assert shipped == sorted(recipe.shipped_files("target"))
    whats = [item.what for item in examine()]
    assert [what for what in whats if what.startswith("build for ")] == [f"build for {target}" for target in shipped]
    assert [what for what in whats if what.startswith("run ")] == [f"run {target}" for target in shipped]


def test_a_machine_without_the_driver_runs_no_plans_and_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install glance-trt[rtx]")
    driver.remove(monkeypatch)
    assert finding("GPU").detail.startswith("there is no NVIDIA driver here (")
    assert finding("build for rtx").ok
    text = "; run a target for the CPU, or go to a machine with an NVIDIA GPU and its driver"
    assert finding("run rtx").detail.endswith(text)


def test_a_gpu_runs_the_targets_that_hold_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install glance-trt[rtx]")
    monkeypatch.setattr("glance_trt.requirements.is_installed", lambda module: True)
    driver.install(monkeypatch, "7.5")
    assert finding("GPU") == Finding("GPU", True, "compute capability 7.5")
    found = finding("run rtx-turing")
    assert found.ok
    version = metadata.version("tensorrt-rtx-cu13")
    assert found.detail == f"engines that need tensorrt_rtx {version}, compute_capability 7.5"
    assert "built for GPUs of compute capability 8.0, 8.6, 8.9, 12.0, and this one has 7.5" in finding("run rtx").detail


def test_it_imports_nothing_that_takes_seconds() -> None:
    code = "import sys; from glance_trt.doctor import examine; examine(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout.split()
    assert "glance_trt.doctor" in loaded
    assert not {"torch", "diffusers", "onnx", "polygraphy", "cuda.core"} & set(loaded)


def test_target_that_cannot_be_built_has_a_reason_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxruntime", "tensorrt_rtx")
    for target, text in (
        ("cpu", "onnxruntime is not installed; pip install onnxruntime"),
        ("rtx", "TensorRT-RTX is not installed (no module tensorrt_rtx); pip install 'glance-trt[rtx]'"),
    ):
        found = finding(f"build for {target}")
        assert (found.ok, found.detail) == (False, text)
    assert finding("run cpu").detail.startswith("ONNX Runtime is not installed")


def test_lean_installation_is_told_which_extras_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch", "onnx", "peft")
    text = "missing: torch, onnx; pip install 'glance-trt[export]'"
    assert finding("extra export") == Finding("extra export", False, text)
    text = "missing: torch, peft; pip install 'glance-trt[distill]'"
    assert finding("extra distill") == Finding("extra distill", False, text)


def test_two_onnxruntimes_that_overwrite_each_other_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, onnxruntime="1.31.1", onnxruntime_gpu="1.31.1")
    found = finding("ONNX Runtime")
    assert not found.ok
    assert found.detail.startswith("onnxruntime and onnxruntime-gpu overwrite each other's files; uninstall them, then")


def test_missing_onnxruntime_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, onnxruntime=None, onnxruntime_gpu=None)
    assert finding("ONNX Runtime") == Finding("ONNX Runtime", False, "missing; pip install onnxruntime")


def test_onnxruntime_that_cannot_be_loaded_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, onnxruntime="1.31.1", onnxruntime_gpu=None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = doctor._onnxruntime()
    assert not found.ok
    assert found.detail.startswith("onnxruntime 1.31.1 cannot be loaded (")
    assert found.detail.endswith("; reinstall onnxruntime")

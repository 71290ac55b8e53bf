"""The native library, built with CMake into build/native, or the reason why that cannot be."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from .abi import Library

REPOSITORY = Path(__file__).parents[2]
BUILD = REPOSITORY / "build" / "native"
_MISSING = ("could not be had", "Could NOT find", "Could not find a package", "No CMAKE_CXX_COMPILER could be found")
"""What CMake says where the machine lacks something, rather than the project being wrong."""


@pytest.fixture(scope="session")
def build() -> Path:
    """The folder of the library's build."""
    if shutil.which("cmake") is None:
        pytest.skip("the native library needs cmake to be built")
    configured = _run("cmake", "-S", REPOSITORY / "native", "-B", BUILD, "-DGLANCE_WERROR=ON")
    lacking = [line.strip() for line in configured.stderr.splitlines() if any(text in line for text in _MISSING)]
    if configured.returncode and lacking:
        pytest.skip(f"the native library cannot be built: {lacking[0]}")
    assert configured.returncode == 0, configured.stderr
    built = _run("cmake", "--build", BUILD, "--parallel", "2")
    assert built.returncode == 0, built.stdout + built.stderr
    return BUILD


@pytest.fixture(scope="session")
def onnxruntime_library() -> Path:
    """The shared library of the package onnxruntime."""
    package = importlib.util.find_spec("onnxruntime")
    assert package is not None
    assert package.origin is not None
    (found,) = (Path(package.origin).parent / "capi").glob("libonnxruntime.so.*")
    return found


@pytest.fixture(scope="session")
def native(build: Path, onnxruntime_library: Path) -> Library:
    return Library(build / "libglance.so.1", onnxruntime_library)


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(item) for item in command], capture_output=True, text=True, check=False)

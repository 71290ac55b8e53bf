"""The native library, built with CMake into build/native, or the reason why that cannot be."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from .abi import Library
from .making import make

REPOSITORY = Path(__file__).parents[2]
BUILD = REPOSITORY / "build" / "native"


@pytest.fixture(scope="session")
def build() -> Path:
    """The folder of the library's build."""
    make(REPOSITORY / "native", BUILD, "-DGLANCE_WERROR=ON")
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

"""A stand-in for libcuda, NVIDIA's driver."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest

NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE."""
INVALID_DEVICE = 101


class Driver:
    """Of a machine with GPUs of these compute capabilities, in CUDA's order."""

    def __init__(self, capabilities: Sequence[str]) -> None:
        self._capabilities = capabilities

    def cuInit(self, flags: int) -> int:
        return 0 if self._capabilities else NO_DEVICE

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0 if ordinal < len(self._capabilities) else INVALID_DEVICE

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        # cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75, ..._MINOR = 76
        value._obj.value = int(self._capabilities[device.value].split(".")[attribute - 75])
        return 0


def install(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    """Let this be a machine with the driver, and GPUs of these compute capabilities."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(capabilities))


def remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this be a machine without the driver."""

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)

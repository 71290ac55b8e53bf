from __future__ import annotations

import pytest

from glance_trt import gpu
from glance_trt.errors import TargetError

from .models import driver


def test_the_compute_capability_is_the_driver_s(monkeypatch: pytest.MonkeyPatch) -> None:
    driver.install(monkeypatch, "8.9", "12.0")
    assert gpu.compute_capability() == "8.9"
    assert gpu.compute_capability(1) == "12.0"


def test_a_gpu_that_is_not_there_is_named_with_cuda_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    driver.install(monkeypatch, "8.9")
    with pytest.raises(
        TargetError, match=r"^the NVIDIA driver here finds no GPU 1 that it can use \(CUDA error 101\)$"
    ):
        gpu.compute_capability(1)
    driver.install(monkeypatch)
    with pytest.raises(TargetError, match=r"finds no GPU 0 .* \(CUDA error 100\)$"):
        gpu.compute_capability()


def test_a_missing_driver_is_named_with_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    driver.remove(monkeypatch)
    with pytest.raises(
        TargetError, match=r"^there is no NVIDIA driver here \((libcuda\.so\.1|nvcuda\.dll) is not found"
    ):
        gpu.compute_capability()

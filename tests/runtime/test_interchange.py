"""Memory of other code in the process is used in place, and refused where it cannot be an array."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from glance_trt.errors import InputError
from glance_trt.runtime.interchange import OnGpu, on_host
from glance_trt.runtime.pipeline import Pipeline


def test_memory_of_the_host_is_an_array_without_a_copy() -> None:
    owned = (ctypes.c_float * 6)(*range(6))
    array = on_host(ctypes.addressof(owned), (2, 3))
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
    owned[4] = 99
    assert array[1, 1] == 99
    array[0, 0] = 7
    assert owned[0] == 7
    assert on_host(ctypes.addressof(owned), [24], np.uint8).tobytes() == bytes(owned)


def test_an_image_starts_from_latents_at_an_address(rich_pipeline: Pipeline) -> None:
    image = rich_pipeline.bundle.manifest.image
    noise = np.random.default_rng(0).normal(size=(1, *image.latent_shape)).astype(np.float32)
    lent = on_host(noise.ctypes.data, noise.shape)
    assert lent.ctypes.data == noise.ctypes.data
    expected = rich_pipeline.pixels("a star", latents=noise)
    assert np.array_equal(rich_pipeline.pixels("a star", latents=lent), expected)


def test_memory_of_a_gpu_is_told_as_the_cuda_array_interface_has_it() -> None:
    """https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3"""
    assert OnGpu(4096, (2, 3), "uint8", stream=7).__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "|u1",
        "data": (4096, False),
        "strides": None,
        "stream": 7,
        "version": 3,
    }


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"shape": ()}, r"shape: expected sizes of at least 1, got \[\]"),
        ({"shape": (2, 0)}, r"shape: expected sizes of at least 1, got \[2, 0\]"),
        ({"address": 0}, "address: expected one that is a multiple of 4, got 0x0"),
        ({"address": 4098}, "address: expected one that is a multiple of 4, got 0x1002"),
    ],
)
@pytest.mark.parametrize("make", [on_host, OnGpu])
def test_what_is_no_array_is_refused(make: Any, given: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=f"^{text}$"):
        make(**{"address": 4096, "shape": (2,)} | given)


def test_a_stream_that_could_be_two_is_refused() -> None:
    with pytest.raises(InputError, match=r"^stream: 0 could be two streams; give 1 for the legacy default stream"):
        OnGpu(4096, (2,), stream=0)

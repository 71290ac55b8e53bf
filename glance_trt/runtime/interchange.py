"""Arrays over memory that other code of the process owns, such as a C++ service that embeds this runtime.

`Pipeline.run`, `Pipeline.steps` and `Pipeline.pixels` take them, and what these return goes the other way: arrays of
NumPy where engines run on the CPU (``array.ctypes.data`` is the address), and on a GPU arrays with DLPack and
``__cuda_array_interface__``, which has address and stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from glance_trt.errors import InputError


def on_host(address: int, shape: Sequence[int], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Contiguous memory of the host as an array, without a copy; it has to live as long as the array. Raises
    `InputError`."""
    kind = _checked(address, shape, dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    memory = memoryview((ctypes.c_uint8 * size).from_address(address))
    return np.frombuffer(memory, kind).reshape(tuple(shape))


@dataclass(frozen=True)
class OnGpu:
    """Contiguous memory of a GPU as an array, for whatever takes ``__cuda_array_interface__``; it has to live until the
    work that reads it is done. stream: the handle of the CUDA stream that writes it, for a consumer to wait for; by
    default it is written already. Raises `InputError`."""

    address: int
    shape: tuple[int, ...]
    dtype: DTypeLike = np.float32
    stream: int | None = None

    def __post_init__(self) -> None:
        _checked(self.address, self.shape, self.dtype)
        if self.stream == 0:  # which the protocol forbids: it could be either default stream
            raise InputError("stream: 0 could be two streams; give 1 for the legacy default stream, 2 for the thread's")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": tuple(self.shape),
            "typestr": np.dtype(self.dtype).str,
            "data": (self.address, False),
            "strides": None,
            "stream": self.stream,
            "version": 3,
        }


def _checked(address: int, shape: Sequence[int], dtype: DTypeLike) -> np.dtype[Any]:
    kind = np.dtype(dtype)
    if not shape or any(size < 1 for size in shape):
        raise InputError(f"shape: expected sizes of at least 1, got {list(shape)}")
    if address <= 0 or address % kind.alignment:
        raise InputError(f"address: expected one that is a multiple of {kind.alignment}, got {address:#x}")
    return kind

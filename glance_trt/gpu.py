"""This machine's NVIDIA GPUs, as the driver tells of them: without any CUDA package, and without opening a context."""

from __future__ import annotations

import ctypes
import sys

from glance_trt.errors import TargetError

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76
"""CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and ..._MINOR."""


def compute_capability(ordinal: int = 0) -> str:
    """Of one of the GPUs that CUDA sees, such as ``"8.9"``. Raises `TargetError` where there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        raise TargetError(f"there is no NVIDIA driver here ({_LIBRARY} is not found)") from None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    code = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    if code:
        raise TargetError(f"the NVIDIA driver here finds no GPU {ordinal} that it can use (CUDA error {code})")
    return f"{major.value}.{minor.value}"

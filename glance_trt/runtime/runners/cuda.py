"""A CUDA device for `glance_trt.runtime.runners.on_device`, through cuda-core: no PyTorch, no CuPy, no compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glance_trt.errors import InputError, TargetError
from glance_trt.runtime.runners.on_device import DeviceArray, Event, Memory, NotCaptured, Spec

try:
    import nvtx
except ImportError:  # only profilers miss it
    nvtx = None

INSTALL = "pip install 'glance-trt[cuda]'"


class CudaMemory:
    """See `Memory`; over a buffer of cuda-core."""

    def __init__(self, buffer: Any) -> None:
        self.buffer, self.address = buffer, int(buffer.handle)

    @property
    def array(self) -> NDArray[np.uint8]:
        """The bytes of memory that the host can reach."""
        return np.frombuffer((ctypes.c_uint8 * self.buffer.size).from_address(self.address), np.uint8)

    def close(self) -> None:
        """Free it, in the order of the stream that it was allocated in."""
        self.buffer.close()


class CudaArray:
    """See `DeviceArray`. view: a ``StridedMemoryView`` of cuda-core, which keeps the memory alive."""

    def __init__(self, view: Any, owner: object) -> None:
        self._view, self._owner = view, owner
        self.address, self.spec = int(view.ptr), Spec(tuple(view.shape), np.dtype(view.dtype))

    def __dlpack__(self, **options: Any) -> object:
        return self._view.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._view.__dlpack_device__()  # type: ignore[no-any-return]


class CudaEvent:
    """See `Event`."""

    def __init__(self, device: Cuda) -> None:
        self._device = device
        self._handle = device.call("cuEventCreate", 0)

    def record(self, *, capturing: bool = False) -> None:
        """See `Event.record`."""
        flags = self._device.driver.CUevent_record_flags
        # In a capture a plain record is a dependency between streams; only an external one becomes a node with a time.
        flag = flags.CU_EVENT_RECORD_EXTERNAL if capturing else flags.CU_EVENT_RECORD_DEFAULT
        self._device.call("cuEventRecordWithFlags", self._handle, self._device.stream, int(flag))

    def wait(self) -> None:
        """See `Event.wait`. One that was never recorded counts as passed."""
        self._device.call("cuEventSynchronize", self._handle)

    def milliseconds_since(self, earlier: CudaEvent) -> float:
        """See `Event.milliseconds_since`."""
        return float(self._device.call("cuEventElapsedTime", earlier._handle, self._handle))

    def close(self) -> None:
        """See `Event.close`."""
        self._device.call("cuEventDestroy", self._handle)


class Cuda:
    """See `Device`.

    ordinal: of the GPU, as CUDA counts those that it sees. stream: whose work this follows, any object with
    ``__cuda_stream__``; by default one of its own. Raises `TargetError` where there is no such GPU, or no driver.
    """

    def __init__(self, ordinal: int = 0, stream: object | None = None) -> None:
        try:
            from cuda.bindings import driver
            from cuda.core import Device, LegacyPinnedMemoryResource
        except ImportError as error:
            raise TargetError(
                f"running on a GPU needs cuda-core, which is not installed ({error}): {INSTALL}"
            ) from None
        self.driver = driver
        try:
            self._device = Device(ordinal)
            self._device.set_current()
            self._stream = self._device.create_stream(stream)
        except Exception as error:  # cuda-core raises RuntimeErrors, ValueErrors and CUDAErrors of its own
            raise TargetError(f"GPU {ordinal} cannot be used: {error}") from None
        self._pinned = LegacyPinnedMemoryResource()
        self.stream = int(self._stream.handle)
        self.ordinal = ordinal

    def activate(self) -> None:
        """See `Device.activate`."""
        self._device.set_current()

    def allocate(self, nbytes: int) -> Memory:
        """See `Device.allocate`."""
        return CudaMemory(self._device.allocate(nbytes, stream=self._stream))

    def pinned(self, nbytes: int) -> Memory:
        """See `Device.pinned`."""
        return CudaMemory(self._pinned.allocate(nbytes))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """See `Device.copy`; addresses say themselves whose they are (unified addressing)."""
        self.call("cuMemcpyAsync", target, source, nbytes, self.stream)

    def event(self) -> Event:
        """See `Device.event`."""
        return CudaEvent(self)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """See `Device.capture`."""
        builder = self._stream.create_graph_builder()
        try:
            builder.begin_building("relaxed")
            try:
                enqueue()
            finally:
                builder.end_building()
            graph = builder.complete()
        except Exception as error:  # of whatever took part
            raise NotCaptured(str(error)) from None
        finally:
            builder.close()
        graph.upload(self._stream)
        return lambda: graph.launch(self._stream)

    def named(self, name: str) -> AbstractContextManager[object]:
        """See `Device.named`: an NVTX range."""
        return nvtx.annotate(name, domain="glance-trt") if nvtx else nullcontext()

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        self._stream.sync()

    def share(self, memory: Memory, spec: Spec) -> DeviceArray:
        """See `Device.share`."""
        from cuda.core.utils import StridedMemoryView

        assert isinstance(memory, CudaMemory)
        view = StridedMemoryView.from_buffer(memory.buffer, spec.shape, dtype=spec.dtype)
        return CudaArray(view, memory)

    def take(self, array: Any) -> DeviceArray:
        """See `Device.take`. Raises `InputError` for what is not contiguous, not on this GPU, or no array."""
        from cuda.core.utils import StridedMemoryView

        if isinstance(array, CudaArray):
            return array
        if not hasattr(array, "__dlpack__"):
            raise InputError(f"expected an array, of NumPy or with DLPack; got {type(array).__name__}")
        try:
            view = StridedMemoryView.from_dlpack(array, self.stream)
        except Exception as error:  # whatever the other library raises
            raise InputError(f"an array of {type(array).__name__} cannot be taken through DLPack: {error}") from None
        if not view.is_device_accessible or view.device_id != self.ordinal:
            raise InputError(f"an array on device {view.device_id}; this pipeline runs on GPU {self.ordinal}")
        if view.strides is not None and view.strides != _contiguous(view.shape):
            raise InputError(f"an array of strides {view.strides}; make it contiguous first")
        return CudaArray(view, array)

    def close(self) -> None:
        """See `Device.close`."""
        self._stream.close()

    def call(self, function: str, *arguments: Any) -> Any:
        """Call the CUDA driver; its result, if it has one. Raises `TargetError`."""
        code, *results = getattr(self.driver, function)(*arguments)
        if code:
            _, name = self.driver.cuGetErrorName(code)
            raise TargetError(f"GPU {self.ordinal}: {function}: {name.decode() if name else code}")
        return results[0] if results else None


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))

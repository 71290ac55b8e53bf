"""A CUDA device for `glance_trt.runtime.runners.on_device`, through cuda-core: no PyTorch, no CuPy, no compiler."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glance_trt.errors import InputError, TargetError
from glance_trt.requirements import pip_install
from glance_trt.runtime.interchange import OnGpu
from glance_trt.runtime.runners.device import DeviceArray, Event, Memory, NotCaptured, Spec

try:
    import nvtx
except ImportError:  # only profilers miss it
    nvtx = None

_LEGACY = 1
"""CU_STREAM_LEGACY."""
_RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED: other threads may do as they like meanwhile."""


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
    """See `DeviceArray`. view: a ``StridedMemoryView`` of cuda-core. owner: keeps the memory alive. ready: of what this
    pipeline made; cuda-core's view does not synchronize."""

    def __init__(self, device: Cuda, view: Any, owner: object, ready: CudaEvent | None = None) -> None:
        self.device, self._view, self._owner, self._ready = device, view, owner, ready
        self.address, self.spec = int(view.ptr), Spec(tuple(view.shape), np.dtype(view.dtype))

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> object:
        """stream: the consumer's, as DLPack has it for CUDA: None and 1 are the legacy default stream, 2 the one per
        thread, -1 asks not to wait."""
        if self._ready and stream != -1:
            self.device.call("cuStreamWaitEvent", stream or _LEGACY, self._ready.handle, 0)
        return self._view.__dlpack__(stream=-1, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._view.__dlpack_device__()  # type: ignore[no-any-return]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return OnGpu(self.address, self.spec.shape, self.spec.dtype, self.device.stream).__cuda_array_interface__


class CudaEvent:
    """See `Event`."""

    def __init__(self, device: Cuda) -> None:
        self._device = device
        self.handle = device.call("cuEventCreate", 0)

    def record(self, *, capturing: bool = False) -> None:
        """See `Event.record`."""
        flags = self._device.driver.CUevent_record_flags
        # In a capture a plain record is a dependency between streams; only an external one becomes a node with a time.
        flag = flags.CU_EVENT_RECORD_EXTERNAL if capturing else flags.CU_EVENT_RECORD_DEFAULT
        self._device.call("cuEventRecordWithFlags", self.handle, self._device.stream, int(flag))

    def wait(self) -> None:
        """See `Event.wait`. One that was never recorded counts as passed."""
        self._device.call("cuEventSynchronize", self.handle)

    def milliseconds_since(self, earlier: CudaEvent) -> float:
        """See `Event.milliseconds_since`."""
        return float(self._device.call("cuEventElapsedTime", earlier.handle, self.handle))

    def close(self) -> None:
        """See `Event.close`."""
        self._device.call("cuEventDestroy", self.handle)


class Cuda:
    """See `Device`. While a pipeline works, its GPU is the calling thread's current one, and stays so.

    ordinal: of the GPU, as CUDA counts those that it sees. stream: whose work this follows, any object with
    ``__cuda_stream__``; by default one of its own. Raises `TargetError` where there is no such GPU, or no driver.
    """

    def __init__(self, ordinal: int = 0, stream: object | None = None) -> None:
        try:
            from cuda.bindings import driver
            from cuda.core import Device, LegacyPinnedMemoryResource
        except ImportError as error:
            raise TargetError(
                f"running on a GPU needs cuda-core, which is not installed ({error}): {pip_install('cuda')}"
            ) from None
        self.driver = driver
        try:
            self._device = Device(ordinal)
            self._device.set_current()
            self._stream = self._device.create_stream(stream)
            self._capturing = self._device.create_stream()
        except Exception as error:  # cuda-core raises RuntimeErrors, ValueErrors and CUDAErrors of its own
            raise TargetError(f"GPU {ordinal} cannot be used: {error}") from None
        self.is_host = False
        self._pinned = LegacyPinnedMemoryResource()
        self.stream = int(self._stream.handle)
        self.ordinal = ordinal
        if not self.stream:
            raise InputError("stream: the default stream of CUDA cannot be captured; give one that was created")

    def activate(self) -> None:
        """See `Device.activate`."""
        self._device.set_current()

    def allocate(self, nbytes: int) -> Memory:
        """See `Device.allocate`."""
        with _errors(self.ordinal):
            return CudaMemory(self._device.allocate(nbytes, stream=self._stream))

    def pinned(self, nbytes: int) -> Memory:
        """See `Device.pinned`."""
        with _errors(self.ordinal):
            return CudaMemory(self._pinned.allocate(nbytes))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """See `Device.copy`; addresses say themselves whose they are (unified addressing)."""
        self.call("cuMemcpyAsync", target, source, nbytes, self.stream)

    def event(self) -> Event:
        """See `Device.event`."""
        return CudaEvent(self)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """See `Device.capture`. It is done in a stream of its own: what others put into the working one meanwhile would
        become part of the graph. Through the driver, since cuda-core 1.2 cannot end a capture that CUDA has given up.
        """
        working, self.stream = self.stream, int(self._capturing.handle)
        try:
            self.call("cuStreamBeginCapture", self.stream, self.driver.CUstreamCaptureMode(_RELAXED))
            try:
                enqueue()
            finally:
                graph = self.call("cuStreamEndCapture", self.stream)
            executable = self.call("cuGraphInstantiate", graph, 0)
            self.call("cuGraphDestroy", graph)
        except Exception as error:  # of whatever took part
            raise NotCaptured(str(error)) from None
        finally:
            self.stream = working
        return CudaGraph(self, executable)

    def named(self, name: str) -> AbstractContextManager[object]:
        """See `Device.named`: an NVTX range."""
        return nvtx.annotate(name, domain="glance-trt") if nvtx else nullcontext()

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        self.call("cuStreamSynchronize", self.stream)

    def share(self, memory: Memory, spec: Spec) -> DeviceArray:
        """See `Device.share`."""
        from cuda.core.utils import StridedMemoryView

        assert isinstance(memory, CudaMemory)
        view = StridedMemoryView.from_buffer(memory.buffer, spec.shape, dtype=spec.dtype)
        ready = CudaEvent(self)
        ready.record()
        return CudaArray(self, view, memory, ready)

    def take(self, array: Any) -> DeviceArray:
        """See `Device.take`. Raises `InputError` for what is not contiguous, not on this GPU, or no array."""
        from cuda.core.utils import StridedMemoryView

        if isinstance(array, CudaArray) and array.device is self:
            return array
        try:
            view = StridedMemoryView.from_any_interface(array, self.stream)
        except Exception as error:  # whatever the other library raises
            raise InputError(f"an array of {type(array).__name__} cannot be taken: {error}") from None
        if not view.is_device_accessible or view.device_id != self.ordinal:
            raise InputError(f"an array on device {view.device_id}; this pipeline runs on GPU {self.ordinal}")
        if view.strides is not None and not _is_contiguous(view.shape, view.strides):
            raise InputError(f"an array of shape {view.shape} and strides {view.strides}; make it contiguous first")
        return CudaArray(self, view, array)

    def close(self) -> None:
        """See `Device.close`."""
        self._capturing.close()
        self._stream.close()

    def call(self, function: str, *arguments: Any) -> Any:
        """Call the CUDA driver; its result, if it has one. Raises `TargetError`."""
        code, *results = getattr(self.driver, function)(*arguments)
        if code:
            _, name = self.driver.cuGetErrorName(code)
            raise TargetError(f"GPU {self.ordinal}: {function}: {name.decode() if name else code}")
        return results[0] if results else None


class CudaGraph:
    """A captured graph; calling it puts it into the device's stream."""

    def __init__(self, device: Cuda, handle: Any) -> None:
        self._device, self._handle = device, handle

    def __call__(self) -> None:
        self._device.call("cuGraphLaunch", self._handle, self._device.stream)

    def __del__(self) -> None:
        with contextlib.suppress(TargetError):  # of a driver that is shutting down
            self._device.call("cuGraphExecDestroy", self._handle)


@contextlib.contextmanager
def _errors(ordinal: int) -> Iterator[None]:
    """Make a `TargetError` of what cuda-core raises."""
    try:
        yield
    except Exception as error:
        raise TargetError(f"GPU {ordinal}: {error}") from None


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie in order without gaps; strides of dimensions of one element mean nothing."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True

"""A device in the host's own memory, for what runs chains on a device; engines over it are ONNX Runtime's on the CPU.

Its stream is as lazy as a stream may be: nothing in it is done before someone waits for it, so that memory which is
freed or overwritten too early shows. It counts what a real device would be asked for.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from glance_trt.runtime.runners.device import DeviceArray, Event, Memory, Spec


class HostMemory:
    """See `Memory`. What is freed is overwritten, so that a late reader gets nonsense: the device's own memory in the
    order of the stream, the host's at once."""

    def __init__(self, device: HostDevice, nbytes: int, *, pinned: bool) -> None:
        self.array = np.full(nbytes, 0xAB, np.uint8)
        self.address, self._device, self._pinned = self.array.ctypes.data, device, pinned
        device.counts["blocks"] += 1
        device.blocks[self.address] = self.array

    def close(self) -> None:
        self._device.counts["blocks"] -= 1
        if self._pinned:
            self._overwrite()
        else:
            self._device.later(self._overwrite)

    def _overwrite(self) -> None:
        self.array[:] = 0xCD


class HostArray:
    """See `DeviceArray`. Whoever takes it waits for what makes it."""

    def __init__(self, device: HostDevice, array: np.ndarray) -> None:
        self.array, self.address, self.spec = array, array.ctypes.data, Spec(array.shape, array.dtype)
        self._device = device

    def __dlpack__(self, **options: Any) -> object:
        self._device.synchronize()
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class HostEvent:
    """See `Event`."""

    def __init__(self, device: HostDevice) -> None:
        self._device, self._time, self._waited_for = device, 0.0, False
        device.counts["events"] += 1

    def record(self, *, capturing: bool = False) -> None:
        assert capturing == self._device.capturing
        self._waited_for = True
        self._device.later(self._pass)

    def _pass(self) -> None:
        self._time, self._waited_for = time.perf_counter(), False

    def wait(self) -> None:
        while self._waited_for:
            self._device.step()

    def milliseconds_since(self, earlier: HostEvent) -> float:
        return (self._time - earlier._time) * 1e3

    def close(self) -> None:
        self._device.counts["events"] -= 1


class HostDevice:
    """See `Device`. `counts`: blocks and events in use, copies, captures and launches."""

    stream = 0
    is_host = True

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.blocks: dict[int, np.ndarray] = {}
        self._stream: deque[Callable[[], None]] = deque()
        self._graph: list[Callable[[], None]] | None = None

    @property
    def capturing(self) -> bool:
        return self._graph is not None

    def later(self, work: Callable[[], None]) -> None:
        """Put work into the stream, or into the graph that is being captured."""
        (self._stream if self._graph is None else self._graph).append(work)

    def step(self) -> None:
        self._stream.popleft()()

    def activate(self) -> None:
        self.counts["activations"] += 1

    def allocate(self, nbytes: int) -> Memory:
        return HostMemory(self, nbytes, pinned=False)

    def pinned(self, nbytes: int) -> Memory:
        return HostMemory(self, nbytes, pinned=True)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.counts["copies"] += not self.capturing

        def copy() -> None:
            self.bytes_at(target, nbytes)[:] = self.bytes_at(source, nbytes)

        self.later(copy)

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray:
        """What lies at an address: inside a block of this device, or anywhere else."""
        for start, array in self.blocks.items():
            if start <= address < start + len(array):
                assert address + nbytes <= start + len(array), "beyond the end of a block"
                return array[address - start : address - start + nbytes]
        return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)

    def event(self) -> Event:
        return HostEvent(self)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.counts["captures"] += 1
        self._graph = graph = []
        try:
            enqueue()
        finally:
            self._graph = None

        def launch() -> None:
            self.counts["launches"] += 1
            self._stream.extend(graph)

        return launch

    def named(self, name: str) -> AbstractContextManager[object]:
        self.counts[f"named {name}"] += 1
        return nullcontext()

    def synchronize(self) -> None:
        while self._stream:
            self.step()

    def share(self, memory: Memory, spec: Spec) -> DeviceArray:
        return HostArray(self, memory.array.view(spec.dtype).reshape(spec.shape))

    def take(self, array: Any) -> DeviceArray:
        return HostArray(self, np.from_dlpack(array))

    def close(self) -> None:
        self.synchronize()
        self.counts["closed"] += 1

"""A device in the host's own memory, for what runs chains on a device; engines over it are ONNX Runtime's on the CPU.

Nothing in it is asynchronous, and a captured graph is the Python function again. It counts what a real device would be
asked for.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from glance_trt.runtime.runners.on_device import DeviceArray, Memory, Spec


class HostMemory:
    """See `Memory`. What is freed is overwritten, so that a late reader gets nonsense."""

    def __init__(self, nbytes: int, counts: Counter[str]) -> None:
        self.array = np.full(nbytes, 0xAB, np.uint8)
        self.address, self._counts = self.array.ctypes.data, counts
        counts["blocks"] += 1

    def close(self) -> None:
        self.array[:] = 0xCD
        self._counts["blocks"] -= 1


class HostArray:
    """See `DeviceArray`."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.address, self.spec = array, array.ctypes.data, Spec(array.shape, array.dtype)

    def __dlpack__(self, **options: Any) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class HostDevice:
    """See `Device`. `counts`: blocks in use, copies, captures and launches."""

    stream = 0

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.blocks: dict[int, np.ndarray] = {}
        self._marks: dict[int, float] = {}

    def activate(self) -> None:
        self.counts["activations"] += 1

    def allocate(self, nbytes: int) -> Memory:
        return self._block(nbytes)

    def pinned(self, nbytes: int) -> Memory:
        return self._block(nbytes)

    def _block(self, nbytes: int) -> HostMemory:
        memory = HostMemory(nbytes, self.counts)
        self.blocks[memory.address] = memory.array
        return memory

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.counts["copies"] += 1
        self.bytes_at(target, nbytes)[:] = self.bytes_at(source, nbytes)

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray:
        """What lies at an address: inside a block of this device, or anywhere else."""
        for start, array in self.blocks.items():
            if start <= address < start + len(array):
                assert address + nbytes <= start + len(array), "beyond the end of a block"
                return array[address - start : address - start + nbytes]
        return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)

    def mark(self, index: int, *, capturing: bool) -> None:
        self._marks[index] = time.perf_counter()

    def milliseconds(self, first: int, last: int) -> float:
        return (self._marks[last] - self._marks[first]) * 1e3

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.counts["captures"] += 1

        def launch() -> None:
            before = self.counts["copies"]
            enqueue()
            self.counts["copies"] = before
            self.counts["launches"] += 1

        return launch

    def named(self, name: str) -> AbstractContextManager[object]:
        self.counts[f"named {name}"] += 1
        return nullcontext()

    def synchronize(self) -> None:
        self.counts["synchronizations"] += 1

    def share(self, memory: Memory, spec: Spec) -> DeviceArray:
        return HostArray(memory.array.view(spec.dtype).reshape(spec.shape))

    def take(self, array: Any) -> DeviceArray:
        return HostArray(np.from_dlpack(array))

    def close(self) -> None:
        self.counts["closed"] += 1

"""What a device is, and an engine on it: protocols, so that what runs chains on a GPU runs in tests on the host too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class NotCaptured(Exception):
    """Work that was to be captured cannot be."""


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a value."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Its size, bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Memory(Protocol):
    """A block of memory, freed by `close`."""

    address: int

    @property
    def array(self) -> NDArray[np.uint8]:
        """Its bytes, where the host can reach them."""

    def close(self) -> None: ...


class Event(Protocol):
    """A point in a device's stream."""

    def record(self, *, capturing: bool = False) -> None:
        """Put it behind what is in the stream now. capturing: make it a part of the graph that is being captured."""

    def wait(self) -> None:
        """Wait until the stream has come there."""

    def milliseconds_since(self, earlier: Any) -> float:
        """The device's time between two events that it has passed."""

    def close(self) -> None: ...


class Device(Protocol):
    """A device and one stream on it. Copies, events and launches are put into the stream and return at once.

    stream: its handle, another one while a graph is captured. is_host: whether its memory is the host's.
    """

    stream: int
    is_host: bool

    def activate(self) -> None:
        """Make it the calling thread's device."""

    def allocate(self, nbytes: int) -> Memory:
        """Memory of the device."""

    def pinned(self, nbytes: int) -> Memory:
        """Memory of the host that copies can run from."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy bytes between any two addresses."""

    def event(self) -> Event:
        """An event, not recorded yet."""

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """What `enqueue` puts into the stream, as something that can be launched again and again. Raises
        `NotCaptured`; the stream is as before then."""

    def named(self, name: str) -> AbstractContextManager[object]:
        """A name for profilers, for what is enqueued meanwhile."""

    def synchronize(self) -> None:
        """Wait for the stream."""

    def share(self, memory: Memory, spec: Spec) -> DeviceArray:
        """An array over memory of the device, which it closes when it goes."""

    def take(self, array: Any) -> DeviceArray:
        """Another library's array on this device, through DLPack or ``__cuda_array_interface__``; the stream waits for
        what made it."""

    def close(self) -> None:
        """Release the device's own resources."""


class DeviceArray(Protocol):
    """An array in a device's memory, contiguous, for other libraries through DLPack."""

    @property
    def address(self) -> int: ...

    @property
    def spec(self) -> Spec: ...

    def __dlpack__(self, **options: Any) -> object: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


class Binding(Protocol):
    """An engine made ready for inputs of certain shapes."""

    @property
    def outputs(self) -> Mapping[str, Spec]: ...

    @property
    def scratch(self) -> int:
        """Bytes of memory that it needs while it runs."""

    def capturable(self) -> bool:
        """Whether what `enqueue` does may be captured."""

    def enqueue(self, addresses: Mapping[str, int], scratch: int) -> None:
        """Put one run into the stream, with the addresses of inputs, outputs and scratch memory."""

    def close(self) -> None: ...


class Engine(Protocol):
    """An engine, opened."""

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]: ...

    @property
    def outputs(self) -> tuple[str, ...]: ...

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> Binding:
        """Raises `InputError` for shapes that it does not take."""

    def close(self) -> None: ...

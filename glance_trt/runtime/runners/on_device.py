"""Runs chains of engines on a device whose memory is not the host's.

What an image needs goes there in one copy and the result comes back in one; between them everything stays on the
device. The second time that the same chain runs over the same shapes it is captured, and from then on an image is that
copy and a single launch. All engines share one block of scratch memory, since they never run at once.

A backend gives engines, a device gives memory, copies and a stream; `device.py` has both as protocols.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glance_trt.errors import InputError, TargetError
from glance_trt.runtime.chain import Arrays, Call, Chained, needed
from glance_trt.runtime.runners import layout
from glance_trt.runtime.runners.device import Binding, Device, DeviceArray, Engine, Event, Memory, NotCaptured, Spec

_ON_HOST = 1
"""DLPack's kDLCPU."""
_KEPT = 8
"""Chains whose buffers and captured graphs are kept: one for each batch size and schedule in use."""


class DeviceRunner:
    """A `Runner` over engines of a device. Calls from several threads take turns.

    open_engine: opens the engine of a graph, at its first use. one_at_a_time: keep only the engines that the chain at
    hand uses, so that memory holds one phase at a time.
    """

    def __init__(
        self,
        device: Device,
        open_engine: Callable[[str], Engine],
        graphs: Iterable[str],
        *,
        one_at_a_time: bool = False,
    ) -> None:
        self._device, self._open, self._graphs = device, open_engine, tuple(graphs)
        self._one_at_a_time = one_at_a_time
        self._engines: dict[str, Engine] = {}
        self._programs: OrderedDict[object, _Program] = OrderedDict()
        self._scratch: Memory | None = None
        self._scratch_size = 0
        self._lock = threading.Lock()
        self._closed = False

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Runner.run`."""
        values = {f"in.{port}": np.asarray(value) for port, value in inputs.items()}
        with self._turn({graph}):
            outputs = {port: f"out.{port}" for port in self._engine(graph).outputs}
            call = Call(graph, tuple((port, f"in.{port}") for port in inputs), tuple(outputs.items()))
            found = self._run((call,), values, tuple(outputs.values()), on_device=False).values
        return {port: found[name] for port, name in outputs.items()}

    def chain(
        self, calls: Sequence[Call], values: Mapping[str, Any], wanted: Sequence[str], *, on_device: bool = False
    ) -> Chained:
        """See `Runner.chain`.

        Values may be arrays of the host, or of the device, in any form that speaks DLPack. on_device: leave the results
        there, as `DeviceArray`s that are ready when the stream comes to what is enqueued next; without times.
        """
        with self._turn({call.graph for call in calls}):
            return self._run(tuple(calls), values, tuple(wanted), on_device)

    def close(self) -> None:
        """See `Runner.close`."""
        with self._lock:
            self._closed = True
            self._device.activate()
            self._drop_all_but(set())
            if self._scratch:
                self._scratch.close()
                self._scratch = None
            self._device.close()

    def scratch(self, nbytes: int) -> int:
        """The address of the memory that engines share, of at least `nbytes`."""
        if nbytes > self._scratch_size:
            self._device.synchronize()
            for program in self._programs.values():
                program.forget()  # it holds the old address
            if self._scratch:
                self._scratch.close()
            self._scratch, self._scratch_size = self._device.allocate(nbytes), nbytes
        return self._scratch.address if self._scratch else 0

    @contextlib.contextmanager
    def _turn(self, graphs: set[str]) -> Iterator[None]:
        """The only one to use the device meanwhile, for these graphs."""
        with self._lock:
            self._device.activate()
            if self._one_at_a_time:
                self._drop_all_but(graphs)
            yield

    def _run(
        self, calls: tuple[Call, ...], values: Mapping[str, Any], wanted: tuple[str, ...], on_device: bool
    ) -> Chained:
        inputs = {name: self._input(values[name]) for name in needed(calls)}
        return self._program(calls, inputs, wanted, on_device).execute(inputs)

    def _input(self, value: Any) -> NDArray[Any] | DeviceArray:
        if isinstance(value, (np.ndarray, np.generic)):
            return np.asarray(value, order="C")
        if not hasattr(value, "__dlpack__"):
            if hasattr(value, "__cuda_array_interface__"):
                return self._device.take(value)
            raise InputError(f"expected an array, of NumPy or with DLPack; got {type(value).__name__}")
        on_host = value.__dlpack_device__()[0] == _ON_HOST and not self._device.is_host
        return np.asarray(np.from_dlpack(value), order="C") if on_host else self._device.take(value)

    def _engine(self, graph: str) -> Engine:
        if self._closed:
            raise TargetError(f"{graph}: the pipeline is closed; open the bundle again")
        if graph not in self._graphs:
            raise TargetError(f"{graph}: no such engine; this target has {', '.join(self._graphs) or 'none'}")
        if graph not in self._engines:
            self._engines[graph] = self._open(graph)
        return self._engines[graph]

    def _program(
        self, calls: tuple[Call, ...], inputs: Mapping[str, Any], wanted: tuple[str, ...], on_device: bool
    ) -> _Program:
        specs = {name: _spec(value) for name, value in inputs.items()}
        given = frozenset(name for name, value in inputs.items() if not isinstance(value, np.ndarray))
        key = (calls, tuple(specs.items()), given, wanted, on_device)
        if key not in self._programs:
            engines = {call.graph: self._engine(call.graph) for call in calls}
            for call in calls:
                _check(call, engines[call.graph], specs)
            self._programs[key] = _Program(self, self._device, engines, calls, specs, given, wanted, on_device)
            if len(self._programs) > _KEPT:
                self._device.synchronize()
                self._programs.popitem(last=False)[1].close()
        self._programs.move_to_end(key)
        return self._programs[key]

    def _drop_all_but(self, graphs: set[str]) -> None:
        if self._engines.keys() <= graphs:
            return
        self._device.synchronize()
        for key, program in list(self._programs.items()):
            if not program.graphs <= graphs:
                self._programs.pop(key).close()
        for graph in self._engines.keys() - graphs:
            self._engines.pop(graph).close()


@dataclass
class _Upload:
    """Memory of the host that a copy starts from, when it is done, and what may not be freed before that."""

    block: Memory
    sent: Event
    held: Sequence[object] = ()


class _Program:
    """A chain over inputs of certain shapes: its buffers, where everything lies in them, and its captured graph."""

    def __init__(
        self,
        runner: DeviceRunner,
        device: Device,
        engines: Mapping[str, Engine],
        calls: tuple[Call, ...],
        specs: Mapping[str, Spec],
        given: frozenset[str],
        wanted: tuple[str, ...],
        on_device: bool,
    ) -> None:
        self._runner, self._device, self._calls, self._wanted = runner, device, calls, wanted
        self._on_device, self._given = on_device, given
        self.graphs = {call.graph for call in calls}
        self.launch: Callable[[], None] | None = None
        self._runs = 0
        self._specs = dict(specs)
        self._bindings: dict[tuple[object, ...], Binding] = {}
        self._bound = [self._bind(engines[call.graph], call) for call in calls]
        self._scratch = max(binding.scratch for binding in self._bindings.values())
        self._capturable = all(binding.capturable() for binding in self._bindings.values())

        hosted = {name: spec.nbytes for name, spec in specs.items() if name not in given}
        _, self._uploaded = layout.in_line(hosted)
        self._places, end = layout.in_line(hosted | {name: specs[name].nbytes for name in given})
        made, size = layout.shared(self._lives())
        self._places |= {name: end + offset for name, offset in made.items()}
        self._returned, self._returned_size = layout.in_line({name: self._specs[name].nbytes for name in wanted})

        self._memory = device.allocate(end + size)
        # Two, in turns: with `on_device` the caller may be back before the last upload has run.
        self._uploads = deque(_Upload(device.pinned(max(self._uploaded, 1)), device.event()) for _ in range(2))
        self._download = device.pinned(1 if on_device else self._returned_size)
        self._changes = [i for i, call in enumerate(calls) if not i or calls[i - 1].graph != call.graph]
        self._events = [device.event() for _ in (*self._changes, "end")]
        self._addresses = [
            {port: self._memory.address + self._places[value] for port, value in (*call.inputs, *call.outputs)}
            for call in calls
        ]

    def execute(self, inputs: Mapping[str, Any]) -> Chained:
        self._fill(inputs)
        self._runner.scratch(self._scratch)
        # The first run is not captured: engines settle their state for new shapes in it.
        if self.launch is None and self._runs and self._capturable:
            self._capture()
        if self.launch:
            with self._device.named("image"):
                self.launch()
        else:
            self._enqueue(capturing=False)
        self._runs += 1
        if self._on_device:
            return Chained({name: self._shared(name) for name in self._wanted}, {})
        self._device.synchronize()
        return Chained({name: self._read(name) for name in self._wanted}, self._milliseconds())

    def _fill(self, inputs: Mapping[str, Any]) -> None:
        """Send what the chain starts from: all that is on the host in one copy."""
        upload = self._uploads[0]
        self._uploads.rotate()
        upload.sent.wait()
        upload.held = [*inputs.values()]
        for name, value in inputs.items():
            place, nbytes = self._places[name], self._specs[name].nbytes
            if name in self._given:
                self._device.copy(self._memory.address + place, value.address, nbytes)
            else:
                upload.block.array[place : place + nbytes] = value.reshape(-1).view(np.uint8)
        if self._uploaded:
            self._device.copy(self._memory.address, upload.block.address, self._uploaded)
        upload.sent.record()

    def forget(self) -> None:
        """Begin anew: what was captured is not valid any more."""
        self.launch, self._runs = None, 0

    def close(self) -> None:
        self.launch = None
        for binding in self._bindings.values():
            binding.close()
        for event in (*self._events, *(upload.sent for upload in self._uploads)):
            event.close()
        for memory in (self._memory, self._download, *(upload.block for upload in self._uploads)):
            memory.close()

    def _capture(self) -> None:
        try:
            self.launch = self._device.capture(lambda: self._enqueue(capturing=True))
        except NotCaptured as error:
            self._capturable = False
            warnings.warn(f"not captured as one graph, which costs time between steps: {error}", stacklevel=2)

    def _bind(self, engine: Engine, call: Call) -> Binding:
        shapes = {port: self._specs[value].shape for port, value in call.inputs}
        key = (call.graph, *sorted(shapes.items()))
        if key not in self._bindings:
            self._bindings[key] = engine.bind(shapes)
        binding = self._bindings[key]
        self._specs |= {value: binding.outputs[port] for port, value in call.outputs}
        return binding

    def _lives(self) -> dict[str, layout.Life]:
        first = {value: i for i, call in enumerate(self._calls) for _, value in call.outputs}
        last = first | {value: i for i, call in enumerate(self._calls) for _, value in call.inputs if value in first}
        last |= dict.fromkeys(self._wanted, len(self._calls))
        return {name: layout.Life(self._specs[name].nbytes, first[name], last[name]) for name in first}

    def _enqueue(self, *, capturing: bool) -> None:
        device, scratch = self._device, self._runner.scratch(self._scratch)
        for i, binding in enumerate(self._bound):
            if i in self._changes:
                self._events[self._changes.index(i)].record(capturing=capturing)
            with device.named(self._calls[i].graph):
                binding.enqueue(self._addresses[i], scratch)
        self._events[-1].record(capturing=capturing)
        if not self._on_device:
            for name, place in self._returned.items():
                source = self._memory.address + self._places[name]
                device.copy(self._download.address + place, source, self._specs[name].nbytes)

    def _milliseconds(self) -> dict[str, float]:
        found = dict.fromkeys((call.graph for call in self._calls), 0.0)
        for i, start, end in zip(self._changes, self._events, self._events[1:], strict=False):
            found[self._calls[i].graph] += end.milliseconds_since(start)
        return found

    def _read(self, name: str) -> NDArray[Any]:
        spec, place = self._specs[name], self._returned[name]
        return self._download.array[place : place + spec.nbytes].copy().view(spec.dtype).reshape(spec.shape)

    def _shared(self, name: str) -> DeviceArray:
        spec = self._specs[name]
        memory = self._device.allocate(spec.nbytes)
        self._device.copy(memory.address, self._memory.address + self._places[name], spec.nbytes)
        return self._device.share(memory, spec)


def _spec(value: Any) -> Spec:
    return Spec(value.shape, value.dtype) if isinstance(value, np.ndarray) else value.spec


def _check(call: Call, engine: Engine, specs: Mapping[str, Spec]) -> None:
    """Raise `InputError` unless a call gives the inputs that its engine takes; shapes are checked when it is bound."""
    given, takes = dict(call.inputs), ", ".join(engine.inputs)
    for port in engine.inputs:
        if port not in given:
            raise InputError(f"{call.graph}: input {port!r} is missing; this engine takes {takes}")
    for port, value in given.items():
        if port not in engine.inputs:
            raise InputError(f"{call.graph}: got {port!r}, which is no input; this engine takes {takes}")
        if value in specs and specs[value].dtype != engine.inputs[port]:
            raise InputError(f"{call.graph}: got {port} {specs[value].dtype}; this engine takes {engine.inputs[port]}")

"""What is asked of cuda-core and the CUDA driver exists there; nothing is run, for want of a GPU."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glance_trt.errors import TargetError
from glance_trt.runtime.runners import cuda
from glance_trt.runtime.runners.cuda import Cuda, CudaMemory
from glance_trt.runtime.runners.device import NotCaptured

pytest.importorskip("cuda.core", reason="pip install glance-trt[cuda]")


def test_without_a_driver_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        Cuda()
    except TargetError as error:
        assert str(error).startswith("GPU 0 cannot be used: ")  # noqa: PT017 (there may be a GPU)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(
        TargetError, match=r"needs cuda-core, which is not installed .*pip install 'glance-trt\[cuda\]'"
    ):
        Cuda()


def calls(name: str) -> list[ast.Call]:
    """The calls of a method by its name, in the module."""
    tree = ast.parse(Path(inspect.getfile(cuda)).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [node for node in found if node.func.attr == name]  # type: ignore[attr-defined]


def test_every_driver_function_exists_and_takes_that_many_arguments() -> None:
    from cuda.bindings import driver

    asked = {node.args[0].value: len(node.args) - 1 for node in calls("call")}  # type: ignore[attr-defined]
    assert {"cuMemcpyAsync", "cuEventRecordWithFlags", "cuEventElapsedTime"} <= asked.keys()
    for name, count in asked.items():
        signature = str(getattr(driver, name).__doc__).splitlines()[0]
        assert signature.count(",") + 1 == count, signature
    assert driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL == 1


def test_every_method_of_cuda_core_exists() -> None:
    from cuda.core import Device, LegacyPinnedMemoryResource, Stream
    from cuda.core.utils import StridedMemoryView

    for owner, names in {
        Device: ("set_current", "create_stream", "allocate"),
        Stream: ("close", "handle"),
        LegacyPinnedMemoryResource: ("allocate",),
        StridedMemoryView: ("from_buffer", "from_any_interface", "__dlpack__", "__dlpack_device__"),
    }.items():
        for name in names:
            assert hasattr(owner, name), (owner, name)
            assert name.startswith("__") or name == "handle" or calls(name), f"{name} is not used: this list is old"


def test_memory_of_the_host_is_seen_as_bytes() -> None:
    """cuda-core wraps any address; this one needs no driver."""
    from cuda.core import Buffer

    array = np.arange(16, dtype=np.uint8)
    memory = CudaMemory(Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array))
    memory.array[3] = 99
    assert array[3] == 99


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((), (), True),
        ((5,), (1,), True),
        ((2, 3, 4), (12, 4, 1), True),
        ((1, 4, 8), (999, 8, 1), True),  # the stride of a single element means nothing
        ((2, 3), (1, 2), False),
        ((4, 8), (16, 1), False),
    ],
)
def test_contiguous_is_what_numpy_calls_so(shape: tuple[int, ...], strides: tuple[int, ...], expected: bool) -> None:
    array: Any = np.lib.stride_tricks.as_strided(np.zeros(4096, np.uint8), shape, strides)
    assert cuda._is_contiguous(shape, strides) is expected is bool(array.flags.c_contiguous)


def test_what_is_exported_makes_the_consumer_s_stream_wait() -> None:
    """A consumer names its stream as DLPack has it; cuda-core's own view would not wait."""
    waits: list[Any] = []
    device: Any = SimpleNamespace(call=lambda *asked: waits.append(asked))
    view = SimpleNamespace(ptr=0, shape=(2,), dtype="uint8", __dlpack__=lambda stream: f"capsule {stream}")
    made = cuda.CudaArray(device, view, None, ready=SimpleNamespace(handle="event"))  # type: ignore[arg-type]
    for stream in (None, 1, 2, 77, -1):
        assert made.__dlpack__(stream=stream) == "capsule -1"
    assert waits == [("cuStreamWaitEvent", stream, "event", 0) for stream in (1, 1, 2, 77)]


def test_what_is_exported_tells_its_address_and_stream() -> None:
    device: Any = SimpleNamespace(stream=77)
    view = SimpleNamespace(ptr=4096, shape=(2, 3), dtype="float32")
    assert cuda.CudaArray(device, view, None).__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<f4",
        "data": (4096, False),
        "strides": None,
        "stream": 77,
        "version": 3,
    }


def test_an_operation_that_cannot_be_captured_leaves_the_stream_as_it_was() -> None:
    device = object.__new__(Cuda)
    asked: list[str] = []

    def call(function: str, *_: object) -> object:
        asked.append(function)
        return None

    device.call = call  # type: ignore[method-assign]
    device.stream, device.driver = 5, SimpleNamespace(CUstreamCaptureMode=int)
    device._capturing = SimpleNamespace(handle=6)

    def enqueue() -> None:
        assert device.stream == 6, "a stream of its own"
        raise TargetError("no")

    with pytest.raises(NotCaptured, match=r"^no$"):
        device.capture(enqueue)
    assert (device.stream, asked) == (5, ["cuStreamBeginCapture", "cuStreamEndCapture"])

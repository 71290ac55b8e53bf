"""What is asked of cuda-core and the CUDA driver exists there; nothing is run, for want of a GPU."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glance_trt.errors import TargetError
from glance_trt.runtime.runners import cuda
from glance_trt.runtime.runners.cuda import Cuda, CudaMemory

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
    from cuda.core.graph import Graph, GraphBuilder
    from cuda.core.utils import StridedMemoryView

    for owner, names in {
        Device: ("set_current", "create_stream", "allocate"),
        Stream: ("create_graph_builder", "sync", "close", "handle"),
        GraphBuilder: ("begin_building", "end_building", "complete", "close"),
        Graph: ("upload", "launch"),
        LegacyPinnedMemoryResource: ("allocate",),
        StridedMemoryView: ("from_buffer", "from_dlpack", "__dlpack__", "__dlpack_device__"),
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


@pytest.mark.parametrize(("shape", "strides"), [((), ()), ((5,), (1,)), ((2, 3, 4), (12, 4, 1))])
def test_contiguous_strides_are_numpy_s(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    array: Any = np.empty(shape, np.uint8)
    assert cuda._contiguous(shape) == strides == array.strides

"""One file per engine backend, each a `Runner`: the runtime knows no more of a backend than this protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from glance_trt import trust as plans
from glance_trt.bundle import Bundle, EngineSet
from glance_trt.errors import TargetError
from glance_trt.runtime.chain import Call, Chained

_PLAIN = "CUDAExecutionProvider"
"""ONNX Runtime's provider that compiles nothing and loads no code from a graph."""


class Runner(Protocol):
    """Runs the graphs of one bundle on one target."""

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the engine of `graph`. Inputs and outputs are by name, as the manifest has them; the caller owns the
        outputs. Raises `InputError` where an input does not fit."""

    def close(self) -> None:
        """Release the engines. The runner cannot be used afterwards."""


class ChainRunner(Runner, Protocol):
    """One that runs whole images."""

    def chain(
        self, calls: Sequence[Call], values: Mapping[str, Any], wanted: Sequence[str], *, on_device: bool = False
    ) -> Chained:
        """Run calls one after the other, from the given values to the wanted ones, whatever is between them staying
        where the engines run. on_device: leave the wanted ones there too; arrays of the host where engines run on it.
        """


def open_runner(
    bundle: Bundle,
    target: str,
    *,
    threads: int | None = None,
    device: int = 0,
    stream: object | None = None,
    trust: bool = False,
    one_at_a_time: bool = False,
) -> ChainRunner:
    """A runner for one of the bundle's targets, which runs here, and whose files have been checked; arguments as in
    `Pipeline.open`.

    Raises `TargetError`.
    """
    engines, files = bundle.manifest.engines[target], bundle.manifest.files
    if engines.backend == "onnxruntime-gpu" and engines.requires.get("provider") != _PLAIN and not trust:
        raise TargetError(
            f"{target}: its graphs go to TensorRT through ONNX Runtime, and a graph can hold a plan, which is native "
            "code. If you trust where it comes from, give --trust"
        )

    def read(file: str) -> bytes:
        return plans.read(bundle.path(file), files[file].sha256, trusted=trust)

    return open_engines(
        engines, bundle.directory, read, threads=threads, device=device, stream=stream, one_at_a_time=one_at_a_time
    )


def open_engines(
    engines: EngineSet,
    folder: Path,
    read: Callable[[str], bytes],
    *,
    threads: int | None = None,
    device: int = 0,
    stream: object | None = None,
    one_at_a_time: bool = False,
) -> ChainRunner:
    """A runner for engines in a folder. read: gives a plan that may be trusted, by its file's name."""
    files = {graph: engine.file for graph, engine in engines.graphs.items()}
    if engines.backend == "onnxruntime":
        from glance_trt.runtime.runners.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(folder, files, threads=threads, one_at_a_time=one_at_a_time)

    from glance_trt.runtime.runners.cuda import Cuda
    from glance_trt.runtime.runners.device import Engine
    from glance_trt.runtime.runners.on_device import DeviceRunner

    gpu = Cuda(device, stream)

    def open_engine(graph: str) -> Engine:
        if engines.backend == "onnxruntime-gpu":
            from glance_trt.runtime.runners.onnxruntime_device import OnnxRuntimeEngine

            provider = engines.requires["provider"]
            return OnnxRuntimeEngine(
                folder / files[graph], name=graph, provider=provider, ordinal=device, stream=gpu.stream
            )
        from glance_trt.runtime.runners.tensorrt import TensorRTEngine

        return TensorRTEngine(engines, read(files[graph]), name=graph, device=gpu)

    return DeviceRunner(gpu, open_engine, files, one_at_a_time=one_at_a_time)

"""One file per engine backend, each a `Runner`: the runtime knows no more of a backend than this protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from glance_trt.bundle import Bundle
from glance_trt.errors import TargetError


class Runner(Protocol):
    """Runs the graphs of one bundle on one target."""

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the engine of `graph`. Inputs and outputs are by name, as the manifest has them; the caller owns the
        outputs. Raises `InputError` where an input does not fit."""

    def close(self) -> None:
        """Release the engines. The runner cannot be used afterwards."""


def open_runner(bundle: Bundle, target: str, *, threads: int | None = None) -> Runner:
    """A runner for one of the bundle's targets, whose files have been checked. Raises `TargetError`."""
    engines = bundle.manifest.engines[target]
    files = {graph: engine.file for graph, engine in engines.graphs.items()}
    if engines.backend == "onnxruntime":
        from glance_trt.runtime.runners.onnxruntime import OnnxRuntimeRunner, check_requirements

        check_requirements(target, engines.requires)
        return OnnxRuntimeRunner(bundle.directory, files, threads=threads)
    raise TargetError(
        f"target {target!r}: its {engines.backend} engines can be built and opened with {engines.backend}'s own tools, "
        "but this version runs ONNX Runtime engines only"
    )

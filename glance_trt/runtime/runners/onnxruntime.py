"""Engines that ONNX Runtime runs on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from glance_trt.errors import InputError, TargetError


class OnnxRuntimeRunner:
    """A `Runner` over files that were optimised at build. Sessions open at first use; `run` is thread-safe."""

    def __init__(self, directory: Path, engines: Mapping[str, str], *, threads: int | None = None) -> None:
        self._directory, self._engines, self._threads = directory, dict(engines), threads
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Runner.run`."""
        session = self._sessions.get(graph) or self._open(graph)
        try:
            outputs = session.run(None, inputs)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise InputError(_explain(graph, session, inputs, error)) from None
        return dict(zip((output.name for output in session.get_outputs()), outputs, strict=True))

    def close(self) -> None:
        """See `Runner.close`."""
        with self._lock:
            self._sessions.clear()

    def _open(self, graph: str) -> Any:
        with self._lock:
            if graph not in self._sessions:
                self._sessions[graph] = _session(self._directory / self._engines[graph], self._threads)
            return self._sessions[graph]


def _session(path: Path, threads: int | None) -> Any:
    try:
        import onnxruntime as ort
    except ImportError:
        raise TargetError("onnxruntime is not installed; pip install glance-trt[cpu]") from None
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # done at build
    if threads:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise TargetError(
            f"{path}: onnxruntime {ort.__version__} cannot open it ({error}); build the bundle's engines again here"
        ) from None


def _explain(graph: str, session: Any, inputs: Mapping[str, NDArray[Any]], error: Exception) -> str:
    for wanted in session.get_inputs():
        if wanted.name not in inputs:
            return f"{graph}: input {wanted.name} is missing"
        found = inputs[wanted.name].shape
        fixed = [isinstance(dim, int) and dim != have for dim, have in zip(wanted.shape, found, strict=False)]
        if len(found) != len(wanted.shape) or any(fixed):
            takes = ", ".join(map(str, wanted.shape))
            return f"{graph}: got {wanted.name} ({', '.join(map(str, found))}); this engine takes ({takes})"
    return f"{graph}: {error}"

"""Runs the engines that `glance_trt.engines.onnxruntime` builds, on the CPU.

Such an engine is a graph that ONNX Runtime has optimised and whose weights it has packed. Opening one maps the weights
files and computes nothing: their pages are read when a step first needs them, belong to the system's page cache, and
are shared by all sessions and processes over the same file.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from glance_trt.errors import BundleError, InputError, TargetError
from glance_trt.requirements import architecture, pip_install
from glance_trt.runtime.chain import Call, Chained, in_turn

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_AGAIN = "compile it anew on this machine: glance-trt compile BUNDLE --engine TARGET"
_MULTIPLE = re.compile(r"(\d+)\*(\w+)")


def requirements() -> dict[str, str]:
    """What an engine built here needs to run: the version of ONNX Runtime, and the CPU's family of vector instructions.

    Optimised graphs are no stable format, and both the block size of their convolutions' weights and the packing of the
    other weights follow the CPU: on another one, the same file gives wrong numbers without an error. Raises
    `TargetError` if ONNX Runtime is not installed.
    """
    return {"onnxruntime": str(import_onnxruntime().__version__), "cpu": _cpu()}


def unmet(built_for: Mapping[str, str]) -> str | None:
    """Why engines that were built for this cannot run here; None if they can. Raises `TargetError` as above."""
    for key, here in requirements().items():
        if (there := built_for.get(key, here)) != here:
            pin = f"pip install {key}=={there}, or " if key == "onnxruntime" else ""
            return f"built for {key} {there}, but this is {here}; {pin}{_AGAIN}"
    return None


class OnnxRuntimeRunner:
    """Runs the graphs of one target; `run` may be called from several threads.

    Sessions are opened at their first use, and with that of a denoiser's phase those of the other phases.

    directory: where the engines and their weights lie. engines: graph name -> file name. threads: that compute one
    graph, by default as many as there are cores. one_at_a_time: keep only the session that runs.
    """

    def __init__(
        self, directory: Path, engines: Mapping[str, str], *, threads: int | None = None, one_at_a_time: bool = False
    ) -> None:
        self._directory, self._engines, self._threads = directory, dict(engines), threads
        self._one_at_a_time = one_at_a_time
        self._options = import_onnxruntime().RunOptions()
        # Each session has its own arena. Shrinking it after every run keeps the peak of a whole image at that of its
        # largest graph, instead of the sum over all, for 1 to 3 % of a step's time.
        self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._sessions: dict[str, Any] = {}
        self._opening = threading.Lock()
        self._closed = False

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run `graph`. Inputs and outputs are by name; the caller owns the outputs.

        Raises `InputError` where an input does not fit, `BundleError` for a damaged engine, and `TargetError` for one
        that this machine cannot run.
        """
        session = self._session(graph)
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        _check(graph, session.get_inputs(), arrays)
        try:
            results = session.run(None, arrays, self._options)
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise TargetError(f"{graph}: ONNX Runtime could not run {self._engines[graph]}: {_first(error)}") from None
        return {output.name: result for output, result in zip(session.get_outputs(), results, strict=True)}

    def chain(
        self, calls: Sequence[Call], values: Mapping[str, Any], wanted: Sequence[str], *, on_device: bool = False
    ) -> Chained:
        """See `Runner.chain`."""
        return in_turn(self.run, calls, {name: _array(value) for name, value in values.items()}, wanted)

    def close(self) -> None:
        """Release the engines. The runner cannot be used afterwards."""
        with self._opening:
            self._closed = True
            self._sessions.clear()

    def _session(self, graph: str) -> Any:
        with self._opening:
            if self._closed:
                raise TargetError(f"{graph}: the pipeline is closed; open the bundle again")
            if graph not in self._engines:
                raise TargetError(f"{graph}: no such engine; this target has {', '.join(self._engines) or 'none'}")
            if graph not in self._sessions:
                if self._one_at_a_time:
                    self._sessions.clear()
                self._open_phases(graph)
            return self._sessions[graph]

    def _open_phases(self, graph: str) -> None:
        """Open `graph` and, side by side with it, the other phases of a denoiser: an image needs them all.

        Most of opening is packing the linear weights, which ONNX Runtime 1.31 does once more before it takes the packed
        ones from the file, in one thread per session and without holding the GIL.
        """
        kind = graph.partition(".")[0]
        names = [name for name in self._engines if name.partition(".")[0] == kind and name not in self._sessions]
        if len(names) == 1 or self._threads == 1 or self._one_at_a_time:
            self._sessions[graph] = self._open(self._engines[graph])
            return
        with ThreadPoolExecutor(self._threads) as pool:
            opened = {name: pool.submit(self._open, self._engines[name]) for name in names}
        self._sessions |= {name: future.result() for name, future in opened.items() if not future.exception()}
        opened[graph].result()  # raises what is wrong with it; what is wrong with another is raised when that is used

    def _open(self, file: str) -> Any:
        ort, path = import_onnxruntime(), self._directory / file
        if not path.is_file():
            raise BundleError(f"{file}: missing in {self._directory}; {_AGAIN}")
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only; ONNX Runtime writes its log to stderr
        options.intra_op_num_threads = self._threads or 0
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # ONNX Runtime 1.31 plans the reuse of buffers by comparing symbolic shapes as text, which is 85 % of the time
        # it takes to open a step of 2000 nodes, and saves no memory that the arena does not save. Allocating by the
        # pattern of an earlier run has added up to a gigabyte to the peak.
        options.enable_mem_reuse = False
        options.enable_mem_pattern = False
        # By default the threads of the session that ran last go on spinning for milliseconds and take the cores from
        # the one that runs next. A tenth of one bridges the gaps between a graph's nodes (ONNX Runtime 1.31).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # as above
            raise BundleError(
                f"{file}: ONNX Runtime {ort.__version__} cannot load it: {_first(error)}. It is damaged, or was built "
                f"for another version: check it with glance-trt verify, or {_AGAIN}"
            ) from None
        built_for = dict.fromkeys(requirements(), "unknown") | session.get_modelmeta().custom_metadata_map
        if reason := unmet(built_for):
            raise TargetError(f"{file}: {reason}")
        return session


def import_onnxruntime() -> Any:
    """The module. Raises `TargetError` where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise TargetError(f"ONNX Runtime is not installed ({error}): {pip_install('cpu')}") from None
    return onnxruntime


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)
    try:
        return np.from_dlpack(value)
    except (AttributeError, TypeError, BufferError, RuntimeError) as error:
        raise InputError(f"an array of {type(value).__name__} cannot be taken through DLPack: {error}") from None


def _cpu() -> str:
    """Such as ``x86_64-avx512``."""
    machine = architecture()
    if machine != "x86_64":
        return machine
    simd = cast(dict[str, Any], np.show_config(mode="dicts"))["SIMD Extensions"]
    known = {*simd["baseline"], *simd["found"]}  # NumPy's names changed in 2.4, from features to levels
    if known & {"AVX512F", "AVX512_SKX", "X86_V4"}:
        return "x86_64-avx512"
    return "x86_64-avx2" if known & {"AVX2", "X86_V3"} else "x86_64"


def _check(graph: str, ports: list[Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise `InputError` unless `arrays` are the inputs that an engine takes."""
    names = [port.name for port in ports]
    for name in names:
        if name not in arrays:
            raise InputError(f"{graph}: input {name!r} is missing; this engine takes {', '.join(names)}")
    for name in arrays:
        if name not in names:
            raise InputError(f"{graph}: got {name!r}, which is no input; this engine takes {', '.join(names)}")
    sizes: dict[str, tuple[int, str]] = {}
    for port in ports:
        array = arrays[port.name]
        got, dtype = f"got {port.name} {shown(array.shape)}", DTYPES.get(port.type, port.type)
        if array.dtype != dtype:
            raise InputError(f"{graph}: {got} {array.dtype}; this engine takes {dtype}")
        if not fits(port.shape, array.shape):
            raise InputError(f"{graph}: {got}; this engine takes {shown(port.shape)}")
        for dim, size in zip(port.shape, array.shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, (size, port.name))[0] != size:
                other = sizes[dim][1]
                raise InputError(f"{graph}: {got} and {other} {shown(arrays[other].shape)}; they differ in {dim}")


def fits(shape: list[int | str | None], got: tuple[int, ...]) -> bool:
    """Whether a shape is one that a port of ONNX Runtime takes; ``8*h`` takes multiples of 8."""
    if len(shape) != len(got):
        return False
    for dim, size in zip(shape, got, strict=True):
        if isinstance(dim, int) and dim != size:
            return False
        if isinstance(dim, str) and (match := _MULTIPLE.fullmatch(dim)) and size % int(match[1]):
            return False
    return 0 not in got


def shown(shape: tuple[int, ...] | list[int | str | None]) -> str:
    """A shape as errors show it."""
    return "(" + ",".join("?" if dim is None else str(dim) for dim in shape) + ")"


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

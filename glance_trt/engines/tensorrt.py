"""TensorRT and TensorRT-RTX: compiles each portable graph into a plan.

The two are one Python API under two module names, so one implementation serves both, driven through Polygraphy. Each
plan is compiled in a Python process of its own, ``python -m glance_trt.engines.tensorrt``, for three reasons: at its
import, Polygraphy settles which of the two it drives; the builder spends nearly all its time in a stretch without
callbacks, where only ending its process stops it; and a builder that crashes, or runs out of memory, becomes an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from glance_trt.bundle import Engine
from glance_trt.engines.targets import Target
from glance_trt.errors import GlanceError, OutputError, TargetError
from glance_trt.progress import Progress, silent

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]
"""By input: the smallest shape, the one to optimise for, and the largest."""

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}


def build(
    graphs: Mapping[str, Path],
    *,
    directory: Path,
    prefix: str,
    target: Target,
    shapes: Mapping[str, Ranges],
    progress: Progress = silent,
) -> dict[str, Engine]:
    """Compile ``.onnx`` files, given by graph name, into ``<prefix>.<graph>.plan`` in `directory`.

    A plan is the builder's own output, which trtexec and Polygraphy open, weights included. `shapes` gives, by graph,
    the ranges of the inputs that have dynamic dimensions. The plans appear together once all are compiled; an error or
    an interruption leaves `directory` as it was. Each plan is a stage of `progress`: the share of its phases.

    Raises `TargetError`, with the builder's last errors, where this machine cannot build the target or the builder
    refuses a graph, and `OutputError` where a plan cannot be written.
    """
    if reason := unavailable(target):
        raise TargetError(reason)
    engines = {graph: Engine(f"{prefix}.{graph}.plan") for graph in graphs}
    with _writing(directory):
        folder = tempfile.TemporaryDirectory(prefix=".building-", dir=directory)
    with folder as drafts:
        for graph, source in graphs.items():
            request = {
                "module": _MODULES[target.backend],
                "compute_capabilities": target.compute_capabilities,
                "source": os.path.abspath(source),
                "plan": os.path.abspath(Path(drafts, engines[graph].file)),
                "shapes": dict(shapes.get(graph, {})),
            }
            stage = f"compile {prefix}.{graph}"
            progress(stage, 0, 1)
            _compile_apart(request, f"{graph}: {_TITLES[target.backend]}", stage, progress)
            progress(stage, 1, 1)
        with _writing(directory):
            for engine in engines.values():
                os.replace(Path(drafts, engine.file), directory / engine.file)
    return engines


def unavailable(target: Target) -> str | None:
    """Why this machine cannot build `target`, and what can be done; None if it can."""
    title, name = _TITLES[target.backend], _MODULES[target.backend]
    install = f"pip install glance-trt[{_EXTRAS[target.backend]}]"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"{title} is not installed (no module {error.name}); {install}"
    except Exception as error:  # its loader raises whatever a missing or unfit native library makes it raise
        return f"{title} cannot be loaded ({type(error).__name__}: {error}); reinstall it: {install} --force-reinstall"
    if not _is_installed("polygraphy"):
        return f"{title} needs Polygraphy to build, which is not installed; {install}"
    if target.backend == "tensorrt-rtx":
        known = _compilable(module)
        if unknown := [capability for capability in target.compute_capabilities if capability not in known]:
            return (
                f"target {target.name}: compute_capabilities: {title} {module.__version__} cannot compile for "
                f"{', '.join(unknown)}; it can for {', '.join(known)}"
            )
        return None
    present = _gpu_capability()
    if present is None:
        return (
            f"{title} compiles for the GPU of the machine it runs on, and this one has no NVIDIA GPU or no driver; "
            "build on the machine that will run the engines, or for a tensorrt-rtx target, which needs no GPU"
        )
    if target.compute_capabilities and present not in target.compute_capabilities:
        return (
            f"target {target.name}: compute_capabilities: {title} compiles for the GPU of the machine it runs on, "
            f"which is {present}, not {', '.join(target.compute_capabilities)}; build on such a machine"
        )
    return None


def requires(target: Target) -> dict[str, str]:
    """What a plan built here needs where it runs: the module's version, and the compute capabilities that it holds.

    Raises `TargetError` where this machine cannot build `target`.
    """
    if reason := unavailable(target):
        raise TargetError(reason)
    name = _MODULES[target.backend]
    held = target.compute_capabilities if target.backend == "tensorrt-rtx" else (str(_gpu_capability()),)
    return {name: str(importlib.import_module(name).__version__), "compute_capability": " ".join(held)}


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{directory}: the plans cannot be written: {error.strerror}") from None


def _is_installed(name: str) -> bool:
    """Without importing it: Polygraphy must not be imported here, where the caller may want it for the other module."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _compilable(module: Any) -> list[str]:
    """The compute capabilities that the module compiles for, such as ``"8.9"``, from enumerators such as SM89."""
    names = [name[2:] for name in module.ComputeCapability.__members__ if name.startswith("SM")]
    return [f"{name[:-1]}.{name[-1]}" for name in sorted(names, key=int)]


def _gpu_capability() -> str | None:
    """The compute capability of the first visible GPU, from the CUDA driver; None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # ..._MINOR
    )
    return None if failed else f"{major.value}.{minor.value}"


def _compile_apart(request: dict[str, Any], what: str, stage: str, progress: Progress) -> None:
    """Run `_compile` in a process of its own, which ends with this call, however this call ends."""
    environment = {
        **os.environ,
        # The child imports what this process would import, wherever its packages were found.
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "PYTHONSAFEPATH": "1",
        "POLYGRAPHY_USE_TENSORRT_RTX": "1" if request["module"] == "tensorrt_rtx" else "0",
    }
    command = [sys.executable, "-m", "glance_trt.engines.tensorrt"]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=environment, text=True) as child:
            assert child.stdin and child.stdout
            try:
                with contextlib.suppress(BrokenPipeError):  # of a child that is dead already; its log says why
                    child.stdin.write(json.dumps(request) + "\n")
                    child.stdin.flush()
                for line in child.stdout:
                    progress(stage, float(line), 1)
                child.wait()
            except BaseException:
                child.kill()
                raise
        if child.returncode != 0:
            raise _error_of(child.returncode, log, f"{what} could not compile {request['source']}")


def _error_of(returncode: int, log: IO[bytes], what: str) -> GlanceError:
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = "; that is usually for want of memory" if name == "SIGKILL" else ""
        return TargetError(f"{what}: its process was ended by {name}{hint}")
    log.seek(0)
    errors = _last_errors(log.read().decode(errors="replace")) or [f"its process ended with code {returncode}"]
    return (OutputError if returncode == OutputError.exit_code else TargetError)("\n  ".join([f"{what}:", *errors]))


def _last_errors(log: str) -> list[str]:
    """The last three different errors that the builder logged; without any, Polygraphy's own, or the last lines."""
    lines = dict.fromkeys(line for line in log.splitlines() if line.strip() and not any(x in line for x in _NOISE))
    for mark in ("[E] ", "[!] ", ""):
        if errors := [line[len(mark) :].strip() for line in lines if line.startswith(mark)]:
            return errors[-3:]
    return []


# TensorRT-RTX 1.7.1 logs the first as an error in every build, good ones too; the others frame a dump of a node.
_NOISE = ("Thread context has not been set!", "--- Begin node ---", "--- End node ---")


def _compile(request: dict[str, Any], report: IO[str]) -> None:
    """Compile one plan, in the child process. Writes the share that is done to `report`, one number a line."""
    from polygraphy.backend.tensorrt_rtx import create_config_rtx
    from polygraphy.backend.trt import Profile, create_config, engine_bytes_from_network, network_from_onnx_path
    from polygraphy.logger import G_LOGGER

    trt = importlib.import_module(request["module"])
    G_LOGGER.module_severity = G_LOGGER.ERROR
    G_LOGGER.colors = False

    builder, network, parser = network_from_onnx_path(request["source"], strongly_typed=True)
    profile = Profile()
    for name, (smallest, usual, largest) in request["shapes"].items():
        profile.add(name, tuple(smallest), tuple(usual), tuple(largest))
    for tensor in map(network.get_input, range(network.num_inputs)):
        if -1 in tensor.shape and tensor.name not in profile:  # Polygraphy would make every such dimension 1
            G_LOGGER.critical(f"input {tensor.name} {tuple(tensor.shape)} is dynamic, but has no range of shapes")

    options = {"profiles": [profile], "progress_monitor": _monitor(trt, report)}
    if request["module"] == "tensorrt_rtx":
        capabilities = [tuple(map(int, capability.split("."))) for capability in request["compute_capabilities"]]
        config = create_config_rtx(builder, network, compute_capabilities=capabilities, **options)
        # Without it a context allocates as it runs, and cannot be captured in a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        # float32 means float32. TensorRT-RTX allows TF32 unless told otherwise, and Polygraphy tells only TensorRT.
        config.clear_flag(trt.BuilderFlag.TF32)
    else:
        config = create_config(builder, network, **options)
    plan = engine_bytes_from_network((builder, network, parser), config)
    try:
        Path(request["plan"]).write_bytes(plan)
    except OSError as error:
        print(f"[!] {Path(request['plan']).name} cannot be written: {error.strerror}")
        sys.exit(OutputError.exit_code)


def _monitor(trt: Any, report: IO[str]) -> Any:
    """An IProgressMonitor that turns the builder's nested phases into one growing share."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int]] = {}
            self.done: dict[str, int] = {}
            self.reported = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name], self.done[name] = (parent, max(steps, 1)), 0

        def step_complete(self, name: str, step: int) -> bool:
            self.done[name] = step + 1
            share, phase = 0.0, name
            while phase in self.phases:
                parent, steps = self.phases[phase]
                share = min((self.done[phase] + share) / steps, 1.0)
                phase = parent or ""
            if share >= self.reported + 0.01:
                self.reported = share
                print(share, file=report, flush=True)
            return True

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

    return Monitor()


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends this process
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(os.dup(1), "w") as report:
        os.dup2(2, 1)  # whatever a library prints goes to the log; the parent reads numbers
        _compile(request, report)


def _end_with_parent() -> None:
    sys.stdin.read()  # the parent writes nothing more: the end of the stream is its own end
    os._exit(1)


if __name__ == "__main__":
    _main()

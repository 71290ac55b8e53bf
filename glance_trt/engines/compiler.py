"""Compiles one plan; it runs in a process of its own, see `glance_trt.engines.tensorrt`.

Importing this settles which of TensorRT and TensorRT-RTX the process drives: POLYGRAPHY_USE_TENSORRT_RTX says so, to
Polygraphy and here.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt

from polygraphy import config as polygraphy_config
from polygraphy.backend.tensorrt_rtx import create_config_rtx
from polygraphy.backend.trt import Profile, create_config, get_trt_logger, network_from_onnx_path
from polygraphy.logger import G_LOGGER

from glance_trt import gpu, records
from glance_trt.engines import precision
from glance_trt.engines.targets import Ranges, Target
from glance_trt.errors import TargetError
from glance_trt.progress import Progress

if TYPE_CHECKING:
    import tensorrt as trt
    import tensorrt_rtx as rtx
else:
    trt = rtx = importlib.import_module("tensorrt_rtx" if polygraphy_config.USE_TENSORRT_RTX else "tensorrt")

_MIB = 1 << 20


def compile_plan(
    source: Path,
    plan: Path,
    *,
    graph: str,
    dtype: str,
    target: Target,
    profiles: Sequence[Ranges],
    stage: str,
    progress: Progress,
) -> precision.Counts:
    """Compile an ``.onnx`` file into a plan; arguments as in `glance_trt.engines.tensorrt.build`.

    Returns what its layers compute in: those of the finished engine where there is a GPU to load it, else those of the
    network. Raises `TargetError` where that is not `dtype`, `OSError`, and Polygraphy's own exception for what it or
    the builder refuses; the reason is in the log.
    """
    G_LOGGER.module_severity = G_LOGGER.ERROR
    G_LOGGER.colors = False

    builder: trt.Builder
    network: trt.INetworkDefinition
    builder, network, _parser = network_from_onnx_path(str(source), strongly_typed=True)  # the parser owns weights
    precision.check(network, dtype, graph)
    config = _config(builder, network, target, profiles, _Monitor(progress, stage))
    cache = _TimingCache(config) if target.timing_cache else None
    built = builder.build_serialized_network(network, config)
    if built is None:
        G_LOGGER.critical("the builder returned no plan")  # raises; an [E] line before it has the reason
    plan.write_bytes(built)
    if cache:
        cache.save()
    return _inspected(built, dtype, graph) or precision.count(network)


def _config(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    target: Target,
    profiles: Sequence[Ranges],
    monitor: trt.IProgressMonitor,
) -> trt.IBuilderConfig:
    options: dict[str, Any] = {
        "profiles": [_profile(network, ranges) for ranges in profiles],
        "progress_monitor": monitor,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # for the engine inspector
        "weight_streaming": target.weight_streaming,
    }
    if target.workspace is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: target.workspace * _MIB}
    config: trt.IBuilderConfig
    if target.backend == "tensorrt":
        config = create_config(
            builder,
            network,
            builder_optimization_level=target.optimization_level,
            hardware_compatibility_level=_HARDWARE[target.hardware_compatibility],
            version_compatible=target.version_compatible,
            **options,
        )
    else:
        capabilities = [tuple(map(int, capability.split("."))) for capability in target.compute_capabilities]
        config = _for_rtx(create_config_rtx(builder, network, compute_capabilities=capabilities, **options), target)
    return config


_HARDWARE = {
    "none": None,
    "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
}


def _for_rtx(config: rtx.IBuilderConfig, target: Target) -> Any:
    # Without it a context allocates as it runs, and cannot be captured in a CUDA graph. With it, weights cannot stream.
    if not target.weight_streaming:
        config.set_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)
    # float32 means float32. TensorRT-RTX allows TF32 unless told otherwise, and Polygraphy tells only TensorRT.
    config.clear_flag(rtx.BuilderFlag.TF32)
    return config


def _profile(network: trt.INetworkDefinition, ranges: Ranges) -> Profile:
    profile = Profile()
    for name, (smallest, usual, largest) in ranges.items():
        profile.add(name, smallest, usual, largest)
    for tensor in map(network.get_input, range(network.num_inputs)):
        if -1 in tuple(tensor.shape) and tensor.name not in profile:  # Polygraphy would make every such dimension 1
            G_LOGGER.critical(f"input {tensor.name} {tuple(tensor.shape)} is dynamic, but has no range of shapes")
    return profile


def _inspected(plan: trt.IHostMemory, dtype: str, graph: str) -> precision.Counts:
    """What the finished engine computes in; empty where it cannot be loaded: without a GPU, or one that it is not for.

    Raises `TargetError` where that is not `dtype`. Not tested: no GPU has run this yet.
    """
    try:
        gpu.compute_capability()
    except TargetError:
        return {}
    runtime = trt.Runtime(get_trt_logger())
    runtime.engine_host_code_allowed = True  # of a version compatible plan, made a moment ago
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return {}
    information = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    precision.check_engine(information, dtype, graph)
    return precision.count_engine(information)


class _TimingCache:
    """What TensorRT measured while it built, in the user's cache folder, for the next build on the same GPU."""

    def __init__(self, config: trt.IBuilderConfig) -> None:
        self._file = f"timing-{trt.__version__}-{gpu.compute_capability()}.cache"
        try:
            measured = (records.folder() / self._file).read_bytes()
        except OSError:
            measured = b""
        self._cache = config.create_timing_cache(measured)
        config.set_timing_cache(self._cache, ignore_mismatch=False)

    def save(self) -> None:
        with contextlib.suppress(OSError):  # it saves time, no more
            records.write(self._file, bytes(self._cache.serialize()))


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """Turns the builder's nested phases into one growing share. Numbers are SupportsInt, as in the base's stubs."""

    def __init__(self, progress: Progress, stage: str) -> None:
        trt.IProgressMonitor.__init__(self)
        self._progress, self._stage = progress, stage
        self._phases: dict[str, tuple[str | None, int]] = {}
        self._done: dict[str, int] = {}
        self._reported = 0.0

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
        self._phases[phase_name], self._done[phase_name] = (parent_phase, max(int(num_steps), 1)), 0

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        self._done[phase_name] = int(step) + 1
        share, phase = 0.0, phase_name
        while phase in self._phases:
            parent, steps = self._phases[phase]
            share = min((self._done[phase] + share) / steps, 1.0)
            phase = parent or ""
        if share >= self._reported + 0.01:
            self._reported = share
            self._progress(self._stage, share, 1)
        return True

    def phase_finish(self, phase_name: str) -> None:
        self._phases.pop(phase_name, None)

"""Opens plans of TensorRT and TensorRT-RTX for `glance_trt.runtime.runners.on_device`.

The two are one Python API under two module names, so one implementation serves both. Contexts bring no memory of their
own: all engines of a pipeline share one block, which is as large as the largest needs.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from glance_trt import records, requirements
from glance_trt.bundle import EngineSet
from glance_trt.errors import InputError, TargetError
from glance_trt.runtime.runners.device import Device, Spec

if TYPE_CHECKING:
    import tensorrt as trt
    import tensorrt_rtx as rtx

_CACHE_FOLDER = "runtime-cache"
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "UINT8": "uint8", "BOOL": "bool"}


class TensorRTEngine:
    """See `Engine`. Opening one runs native code: read the plan with `glance_trt.trust.read`.

    engines: the set that the plan is of. name: the graph's, for errors. device: whose stream it runs in.

    Raises `TargetError` for a plan that this machine cannot open, with what TensorRT says of it.
    """

    def __init__(self, engines: EngineSet, plan: bytes, *, name: str, device: Device) -> None:
        if TYPE_CHECKING:
            module = trt
        else:
            module = requirements.load(engines.backend)
        self._name, self._device = name, device
        self._log = _logger(module)
        self._runtime = module.Runtime(self._log)
        # A version compatible plan carries code of the host's, a runtime of its own version.
        self._runtime.engine_host_code_allowed = engines.requires.get("tensorrt", "").endswith("+")
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            title = requirements.PACKAGES[engines.backend].title
            raise TargetError(f"{name}: {title} {module.__version__} cannot open its plan: {self._log.last()}")
        self._engine: trt.ICudaEngine = engine
        if engine.streamable_weights_size:
            budget = engines.weight_streaming_budget
            automatic = engine.get_weight_streaming_automatic_budget()
            engine.weight_streaming_budget_v2 = automatic if budget is None else budget << 20
        self._config = engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache = _for_rtx(self._config, module, plan) if engines.backend == "tensorrt-rtx" else None
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        ports = {port: engine.get_tensor_mode(port) == module.TensorIOMode.INPUT for port in names}
        self.inputs = {port: self.dtype(port) for port, is_input in ports.items() if is_input}
        self.outputs = tuple(port for port, is_input in ports.items() if not is_input)

    def dtype(self, port: str) -> np.dtype[Any]:
        """The dtype of an input or output."""
        return np.dtype(_DTYPES[self._engine.get_tensor_dtype(port).name])

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> TensorRTBinding:
        """See `Engine.bind`."""
        profile = self._profile(shapes)
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise TargetError(f"{self._name}: no execution context: {self._log.last()}")
        if not context.set_optimization_profile_async(profile, self._device.stream):
            raise TargetError(f"{self._name}: optimization profile {profile} cannot be set: {self._log.last()}")
        for port, shape in shapes.items():
            if not context.set_input_shape(port, shape):
                raise InputError(f"{self._name}: {port} {_shown(shape)} is refused: {self._log.last()}")
        if unknown := context.infer_shapes():
            raise TargetError(f"{self._name}: no shape for {', '.join(unknown)}: {self._log.last()}")
        outputs = {port: Spec(tuple(context.get_tensor_shape(port)), self.dtype(port)) for port in self.outputs}
        return TensorRTBinding(self._name, context, outputs, self._device, self._log)

    def close(self) -> None:
        """See `Engine.close`."""
        if self._cache:
            self._cache.save()
        # In this order: each uses the one after it.
        del self._config, self._engine, self._runtime

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The first optimisation profile that takes these shapes. Raises `InputError`."""
        ranges = []
        for profile in range(self._engine.num_optimization_profiles):
            bounds = {port: self._engine.get_tensor_profile_shape(port, profile) for port in shapes}
            if all(_fits(shape, *bounds[port]) for port, shape in shapes.items()):
                return profile
            ranges.append(bounds)
        unfit = [port for port, shape in shapes.items() if not any(_fits(shape, *b[port]) for b in ranges)]
        if not unfit:
            raise InputError(
                f"{self._name}: none of its optimization profiles takes these shapes together. Build with the ranges "
                "that you need"
            )
        port = unfit[0]
        takes = " or ".join(dict.fromkeys(_range(*bounds[port]) for bounds in ranges))
        raise InputError(
            f"{self._name}: got {port} {_shown(shapes[port])}; this engine takes {takes}. Stay within, or build "
            "with the ranges that you need"
        )


class TensorRTBinding:
    """See `Binding`: an execution context with its shapes."""

    def __init__(
        self, name: str, context: trt.IExecutionContext, outputs: Mapping[str, Spec], device: Device, log: Any
    ) -> None:
        self._name, self._context, self._device, self._log = name, context, device, log
        self.outputs = outputs
        self.scratch = context.update_device_memory_size_for_shapes()

    def capturable(self) -> bool:
        """See `Binding.capturable`."""
        # TensorRT has no such question: there, every context that has run once can be captured.
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._device.stream))

    def enqueue(self, addresses: Mapping[str, int], scratch: int) -> None:
        """See `Binding.enqueue`."""
        placed = all(self._context.set_tensor_address(port, address) for port, address in addresses.items())
        self._context.set_device_memory(scratch, self.scratch)
        if not (placed and self._context.execute_async_v3(self._device.stream)):
            raise TargetError(f"{self._name}: could not run: {self._log.last()}")

    def close(self) -> None:
        """See `Binding.close`."""
        del self._context


def _for_rtx(config: Any, module: Any, plan: bytes) -> _RuntimeCache:
    """What TensorRT-RTX alone has: it goes on compiling on the GPU that opens a plan."""
    settings: rtx.IRuntimeConfig = config
    # By default a kernel for the shapes at hand is compiled in the background while a slower one runs, and a CUDA graph
    # that is captured meanwhile would keep the slower one.
    settings.dynamic_shapes_kernel_specialization_strategy = module.DynamicShapesKernelSpecializationStrategy.EAGER
    return _RuntimeCache(settings, plan)


class _RuntimeCache:
    """A file in the user's cache folder for the kernels that were compiled for one plan, for the next process."""

    def __init__(self, config: rtx.IRuntimeConfig, plan: bytes) -> None:
        self._file = f"{_CACHE_FOLDER}/{hashlib.sha256(plan).hexdigest()}.bin"
        self._cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):
            # What another version or another GPU wrote is refused by TensorRT-RTX itself, and made anew.
            self._cache.deserialize((records.folder() / self._file).read_bytes())
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        with contextlib.suppress(Exception):  # it only saves the next process its time
            records.write(self._file, bytes(self._cache.serialize()))


def _logger(module: Any) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]
        """Keeps the last error instead of printing."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._last = "it gives no reason"

        def log(self, severity: Any, text: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self._last = text.strip()

        def last(self) -> str:
            return self._last

    return Logger()


def _fits(shape: tuple[int, ...], smallest: Any, _usual: Any, largest: Any) -> bool:
    return len(shape) == len(tuple(smallest)) and all(
        low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
    )


def _range(smallest: Any, _usual: Any, largest: Any) -> str:
    pairs = zip(smallest, largest, strict=True)
    return "(" + ",".join(str(low) if low == high else f"{low}..{high}" for low, high in pairs) + ")"


def _shown(shape: tuple[int, ...]) -> str:
    return "(" + ",".join(map(str, shape)) + ")"

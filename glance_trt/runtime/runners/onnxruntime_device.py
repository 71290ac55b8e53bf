"""Opens portable graphs in ONNX Runtime for `glance_trt.runtime.runners.on_device`: on a GPU where no TensorRT is.

Inputs and outputs are bound to addresses (I/O binding), so that nothing goes through the host between steps. ONNX
Runtime keeps scratch memory of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glance_trt.errors import BundleError, InputError, TargetError
from glance_trt.runtime.runners.device import Spec
from glance_trt.runtime.runners.onnxruntime import DTYPES, fits, import_onnxruntime, shown

_EXACT = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""float32 means float32, as in plans."""
_FACTOR = re.compile(r"(?:(\d+)\*)?(\w+)")


class OnnxRuntimeEngine:
    """See `Engine`.

    path: an ``.onnx`` file, beside its weights. name: the graph's, for errors. provider: by ONNX Runtime's name.
    ordinal and stream: of the device, and the CUDA stream that it runs in. Raises `TargetError` where the provider does
    not start, and `BundleError` where ONNX Runtime cannot load the graph.
    """

    def __init__(self, path: Path, *, name: str, provider: str, ordinal: int = 0, stream: int = 0) -> None:
        ort = import_onnxruntime()
        self._name, self._file, self._device, self._ordinal = name, path.name, _device(provider), ordinal
        if self._device == "cuda" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN that pip has installed
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only; it logs to stderr
        settings: list[Any] = [provider]
        if self._device == "cuda":
            settings = [
                (provider, {"device_id": str(ordinal), "user_compute_stream": str(stream)} | _EXACT.get(provider, {}))
            ]
        try:
            self._session = ort.InferenceSession(str(path), options, providers=settings)
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise BundleError(f"{path.name}: ONNX Runtime {ort.__version__} cannot load it: {error}") from None
        if provider not in self._session.get_providers():  # it falls back to the CPU without an error
            raise TargetError(f"{name}: ONNX Runtime {ort.__version__} could not start its {provider}")
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.inputs = {port.name: np.dtype(DTYPES[port.type]) for port in self._session.get_inputs()}
        self.outputs = tuple(port.name for port in self._session.get_outputs())

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> OnnxRuntimeBinding:
        """See `Engine.bind`."""
        sizes: dict[str, int] = {}
        for port in self._session.get_inputs():
            shape = shapes[port.name]
            if not fits(port.shape, shape):
                raise InputError(f"{self._name}: got {port.name} {shown(shape)}; this engine takes {shown(port.shape)}")
            for dim, size in zip(port.shape, shape, strict=True):
                factor, symbol = _split(dim)
                if symbol and sizes.setdefault(symbol, size // factor) != size // factor:
                    raise InputError(f"{self._name}: got {port.name} {shown(shape)}, which differs in {symbol}")
        outputs = {}
        for port in self._session.get_outputs():
            dims = [_split(dim) for dim in port.shape]
            shape = tuple(factor * sizes[symbol] if symbol else factor for factor, symbol in dims)
            outputs[port.name] = Spec(shape, np.dtype(DTYPES[port.type]))
        specs = {port: Spec(shape, self.inputs[port]) for port, shape in shapes.items()}
        return OnnxRuntimeBinding(self, specs, outputs)

    def run(self, inputs: Mapping[str, Spec], outputs: Mapping[str, Spec], addresses: Mapping[str, int]) -> None:
        """Run over bound addresses. Raises `TargetError`."""
        binding = self._session.io_binding()
        for bind, specs in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for port, spec in specs.items():
                bind(port, self._device, self._ordinal, spec.dtype.type, spec.shape, addresses[port])
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:  # as above
            raise TargetError(f"{self._name}: ONNX Runtime could not run {self._file}: {error}") from None

    def close(self) -> None:
        """See `Engine.close`."""
        del self._session


class OnnxRuntimeBinding:
    """See `Binding`."""

    scratch = 0

    def __init__(self, engine: OnnxRuntimeEngine, inputs: Mapping[str, Spec], outputs: Mapping[str, Spec]) -> None:
        self._engine, self._inputs, self.outputs = engine, inputs, outputs

    def capturable(self) -> bool:
        """See `Binding.capturable`. ONNX Runtime allocates while it runs."""
        return False

    def enqueue(self, addresses: Mapping[str, int], scratch: int) -> None:
        """See `Binding.enqueue`."""
        self._engine.run(self._inputs, self.outputs, addresses)

    def close(self) -> None:
        """See `Binding.close`."""


def _device(provider: str) -> str:
    """ONNX Runtime's name of what a provider's addresses are of."""
    return "cpu" if provider == "CPUExecutionProvider" else "cuda"


def _split(dim: int | str) -> tuple[int, str]:
    """The number and the symbol of a dimension: ``8*h`` is (8, h), ``batch`` (1, batch), 77 (77, none)."""
    if isinstance(dim, int):
        return dim, ""
    match = _FACTOR.fullmatch(dim)
    return (int(match[1] or 1), match[2]) if match else (1, dim)

"""Whether this machine can run the engines of a target: what the manifest says that they need, against what is here."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from glance_trt import gpu
from glance_trt.errors import TargetError


@dataclass(frozen=True)
class Package:
    """What compiles and runs plans: its name for people, its module, what pip calls it, and our extra that has it."""

    title: str
    module: str
    distribution: str
    extra: str


PACKAGES = {
    "tensorrt": Package("TensorRT", "tensorrt", "tensorrt", "tensorrt"),
    "tensorrt-rtx": Package("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx-cu13", "rtx"),
}
"""By backend."""

PROVIDERS = {
    "CUDAExecutionProvider": "glance-trt[gpu]",
    "TensorrtExecutionProvider": "glance-trt[gpu]",
    "NvTensorRTRTXExecutionProvider": "onnxruntime-trt-rtx",
}
"""What has each of ONNX Runtime's providers for NVIDIA GPUs, for pip."""

_AGAIN = "compile it anew on this machine: glance-trt compile BUNDLE --engine TARGET"
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def pip_install(extra: str) -> str:
    """The command that installs what one of our extras has."""
    return f"pip install 'glance-trt[{extra}]'"


def unrunnable(backend: str, requires: Mapping[str, str], device: int = 0) -> str | None:
    """Why this machine cannot run engines of a backend, and what can be done; None if it can.

    requires: what the engines need, as the manifest has it (``docs/bundle-format.md``); what it does not name is not
    looked at. device: the GPU, as CUDA counts those that it sees. This imports what would run the engines, but neither
    PyTorch nor Polygraphy, and opens no CUDA context.
    """
    try:
        if backend == "onnxruntime":
            if device:
                return f"runs on the CPU; for GPU {device}, take a target for one"
            from glance_trt.runtime.runners.onnxruntime import unmet

            return unmet(requires)
        if backend == "onnxruntime-gpu":
            _check_provider(requires.get("provider", "none"))
        else:
            _check_package(backend, requires)
        _check_gpu(requires, device)
    except TargetError as error:
        return str(error)
    return None


def load(backend: str) -> ModuleType:
    """The module that compiles and runs a backend's plans. Raises `TargetError`, with the command that installs it."""
    package = PACKAGES[backend]
    try:
        return importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        raise TargetError(
            f"{package.title} is not installed (no module {error.name}); {pip_install(package.extra)}"
        ) from None
    except Exception as error:  # its loader raises whatever a missing or unfit native library makes it raise
        text = f"{package.title} cannot be loaded ({type(error).__name__}: {error})"
        raise TargetError(f"{text}; reinstall it: pip install --force-reinstall {package.distribution}") from None


def is_installed(module: str) -> bool:
    """Whether a module can be found; it is not imported, only what contains it is."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: a module that something has put in place without a spec
        return False


def this_platform() -> str:
    """Operating system and CPU architecture, such as ``linux-x86_64``."""
    return f"{platform.system().lower()}-{architecture()}"


def architecture() -> str:
    """The CPU's, by the name that Linux has for it, such as ``x86_64``."""
    machine = platform.machine().lower()
    return _MACHINES.get(machine, machine)


def _check_provider(provider: str) -> None:
    wheel = PROVIDERS.get(provider, "glance-trt[gpu]")
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        present = onnxruntime.get_available_providers()
    except (ImportError, AttributeError) as error:  # AttributeError: a folder of that name without the package in it
        raise TargetError(f"ONNX Runtime is not installed ({error}); pip install '{wheel}'") from None
    if provider not in present:
        raise TargetError(
            f"this ONNX Runtime has no {provider}, but {', '.join(present)}; install one that has it in its place: "
            f"pip uninstall onnxruntime; pip install '{wheel}'"
        )


def _check_package(backend: str, requires: Mapping[str, str]) -> None:
    package, system = PACKAGES[backend], this_platform()
    version = str(load(backend).__version__)
    if (there := requires.get("platform", system)) != system:
        raise TargetError(f"built for {there}, and this is {system}; {_AGAIN}")
    if not _is_version(version, wanted := requires.get(package.module, version)):
        pin = f"pip install '{package.distribution}{'>=' if wanted.endswith('+') else '=='}{wanted.rstrip('+')}'"
        raise TargetError(f"built for {package.title} {wanted}, and this is {version}; {pin}, or {_AGAIN}")


def _check_gpu(requires: Mapping[str, str], device: int) -> None:
    try:
        capability = gpu.compute_capability(device)
    except TargetError as error:
        elsewhere = "run a target for the CPU, or go to a machine with an NVIDIA GPU and its driver"
        raise TargetError(f"{error}; {elsewhere}") from None
    if not _holds(held := requires.get("compute_capability", capability), capability):
        raise TargetError(
            f"built for GPUs of compute capability {held.replace(' ', ', ')}, and this one has {capability}; build it "
            "for a target that names this one, or on this machine"
        )
    if not is_installed("cuda.core"):
        raise TargetError(f"cuda-core, which runs engines on a GPU, is not installed; {pip_install('cuda')}")


def _is_version(here: str, wanted: str) -> bool:
    """Whether a version is the wanted one; ``"10.13+"`` wants at least that, of the same major version."""
    if not wanted.endswith("+"):
        return here == wanted
    return _numbers(here)[0] == _numbers(wanted)[0] and _numbers(here) >= _numbers(wanted)


def _holds(capabilities: str, capability: str) -> bool:
    """Whether a plan for ``"8.6 8.9"``, or for ``"8.0+"``, which is all from there on, has code for a GPU."""
    if capabilities.endswith("+"):
        return _numbers(capability) >= _numbers(capabilities)
    return capability in capabilities.split()


def _numbers(version: str) -> list[int]:
    """Of a text that another's manifest holds, so of any: at least one."""
    return [int(part) for part in re.findall(r"\d+", version)] or [0]

"""What this machine can build and run, and why not."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from importlib import metadata

from glance_trt import __version__, gpu, recipe, requirements
from glance_trt.engines import backends, targets
from glance_trt.engines.targets import Target
from glance_trt.errors import TargetError


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, whether it is as it should be, and what to know or do."""

    what: str
    ok: bool
    detail: str


_EXTRAS = {
    "export": ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors"),
    "distill": ("torch", "diffusers", "transformers", "peft", "accelerate", "matplotlib"),
}


def examine() -> list[Finding]:
    """Look at Python, the extras, ONNX Runtime, the GPU, and what every shipped target needs to be built and run."""
    findings = [Finding("glance-trt", True, f"{__version__}, Python {platform.python_version()}, {platform.machine()}")]
    findings += [_extra(name, modules) for name, modules in _EXTRAS.items()]
    findings += [_onnxruntime(), _gpu()]
    for name in sorted(recipe.shipped_files("target")):
        target = targets.load(name)
        reason = backends.unavailable(target)
        findings += [Finding(f"build for {name}", reason is None, reason or "yes"), _running(target)]
    return findings


def _running(target: Target) -> Finding:
    what = f"run {target.name}"
    if reason := backends.unrunnable(target.backend, backends.needs(target)):
        return Finding(what, False, reason)
    try:
        built_for = backends.requires(target)
    except TargetError:  # it cannot be built here: engines that another machine built may need other versions
        built_for = backends.needs(target)
    return Finding(what, True, f"engines that need {', '.join(f'{key} {value}' for key, value in built_for.items())}")


def _gpu() -> Finding:
    try:
        return Finding("GPU", True, f"compute capability {gpu.compute_capability()}")
    except TargetError as error:
        return Finding("GPU", False, str(error))


def _extra(name: str, modules: tuple[str, ...]) -> Finding:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    detail = f"missing: {', '.join(missing)}; {requirements.pip_install(name)}" if missing else "installed"
    return Finding(f"extra {name}", not missing, detail)


def _onnxruntime() -> Finding:
    found = {name: _version(name) for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-trt-rtx")}
    installed = {name: version for name, version in found.items() if version}
    if len(installed) > 1:
        return Finding(
            "ONNX Runtime",
            False,
            f"{' and '.join(installed)} overwrite each other's files; uninstall them, then pip install one of "
            "them again",
        )
    if not installed:
        return Finding("ONNX Runtime", False, "missing; pip install onnxruntime")
    name, version = next(iter(installed.items()))
    try:
        import onnxruntime

        providers = ", ".join(onnxruntime.get_available_providers())
    except (ImportError, AttributeError) as error:  # AttributeError: a folder of that name without the package in it
        return Finding("ONNX Runtime", False, f"{name} {version} cannot be loaded ({error}); reinstall {name}")
    return Finding("ONNX Runtime", True, f"{name} {version}: {providers}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

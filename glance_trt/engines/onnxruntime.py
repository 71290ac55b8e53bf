"""ONNX Runtime: optimises each portable graph once, at build, so that opening it later costs next to nothing.

An optimised model has its weights in external files, in the layout that the kernels want. Sessions map these files, so
the weights that two phases have in common, kept in one file, are shared pages within a process and between processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from glance_trt.bundle import Engine
from glance_trt.engines.targets import Target
from glance_trt.errors import TargetError
from glance_trt.progress import Progress, silent

_ALIGNMENT = 4096
"""Bytes: tensors begin at page borders, which is what ONNX Runtime needs to map them instead of copying."""

_INLINE_BELOW = 1024
"""Bytes: smaller tensors stay in the model."""


def unavailable(target: Target) -> str | None:
    """Why this machine cannot build `target`; None if it can."""
    if target.dtype != "float32":
        return f"ONNX Runtime engines compute in float32 on a CPU, not {target.dtype}; change the target's dtype"
    for module, extra in (("onnxruntime", "cpu"), ("onnx_ir", "export")):
        if util.find_spec(module) is None:
            return f"{module} is not installed; pip install glance-trt[{extra}]"
    return None


def requires(target: Target) -> dict[str, str]:
    """What an engine built here needs where it runs."""
    return {"onnxruntime": _version(), "machine": platform.machine()}


def build(
    graphs: Mapping[str, Path],
    *,
    directory: Path,
    prefix: str,
    groups: Mapping[str, str],
    progress: Progress = silent,
) -> dict[str, Engine]:
    """Optimise ``.onnx`` files, given by graph name, into ``<prefix>.<graph>.onnx`` in `directory`.

    Graphs that `groups` puts into one group share the weights they have in common: ``<prefix>.<group>.bin`` holds
    those, ``<prefix>.<graph>.bin`` a graph's own. Raises `TargetError` where ONNX Runtime refuses a graph.
    """
    stage = f"optimise {prefix}"
    progress(stage, 0, len(graphs))
    with tempfile.TemporaryDirectory(prefix=".building-", dir=directory) as folder:
        for done, (name, source) in enumerate(graphs.items(), start=1):
            _optimise(source, Path(folder) / f"{name}.onnx", name)
            progress(stage, done, len(graphs))
        engines = {}
        for group in dict.fromkeys(groups.get(name, name) for name in graphs):
            members = [name for name in graphs if groups.get(name, name) == group]
            engines |= _share(Path(folder), members, group, prefix)
        for engine in engines.values():
            for file in (engine.file, *engine.weights):
                if (Path(folder) / file).exists():
                    os.replace(Path(folder) / file, directory / file)
    return engines


def _optimise(source: Path, result: Path, name: str) -> None:
    """In a process of its own, which returns its memory, and whose crash is an error."""
    command = [sys.executable, "-m", "glance_trt.engines.onnxruntime", str(source), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        raise TargetError(f"{name}: ONNX Runtime {_version()} cannot optimise the graph: {last}")


def _write_optimised(source: str, result: str) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Not ORT_ENABLE_ALL: its blocked convolution layout depends on the vector width of the machine that optimises.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = result
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{Path(result).stem}.all")
    entry = "session.optimized_model_external_initializers_min_size_in_bytes"
    options.add_session_config_entry(entry, str(_INLINE_BELOW))
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class _Blob(NamedTuple):
    digest: str
    value: Any


def _share(folder: Path, members: Sequence[str], group: str, prefix: str) -> dict[str, Engine]:
    """Move the weights of a group's optimised models into one common file and one per model."""
    import onnx_ir as ir

    models = {name: ir.load(folder / f"{name}.onnx") for name in members}
    blobs = {
        name: [
            _Blob(hashlib.sha256(_bytes(value.const_value)).hexdigest(), value)
            for value in model.graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        ]
        for name, model in models.items()
    }
    uses: dict[str, int] = {}
    for items in blobs.values():
        for digest in {blob.digest for blob in items}:
            uses[digest] = uses.get(digest, 0) + 1
    engines: dict[str, Engine] = {}
    files: dict[str, BinaryIO] = {}
    placed: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        for name, items in blobs.items():
            written = set()
            for blob in items:
                file = f"{prefix}.{group if uses[blob.digest] > 1 or len(members) == 1 else name}.bin"
                written.add(file)
                tensor = blob.value.const_value
                if blob.digest not in placed:
                    out = files.get(file) or stack.enter_context(open(folder / file, "wb"))
                    files[file] = out
                    out.write(b"\0" * (-out.tell() % _ALIGNMENT))
                    placed[blob.digest] = out.tell()
                    out.write(_bytes(tensor))
                blob.value.const_value = ir.ExternalTensor(
                    file, placed[blob.digest], tensor.nbytes, tensor.dtype, shape=tensor.shape, name=tensor.name,
                    base_dir=folder,
                )  # fmt: skip
            engines[name] = Engine(f"{prefix}.{name}.onnx", tuple(sorted(written)))
    for name, model in models.items():
        ir.save(model, folder / engines[name].file)
    return engines


def _bytes(tensor: Any) -> memoryview:
    """The tensor's bytes, mapped from its file."""
    with open(tensor.path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    offset = tensor.offset or 0
    return memoryview(mapped)[offset : offset + tensor.nbytes]


def _version() -> str:
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    raise TargetError("onnxruntime is not installed; pip install glance-trt[cpu]")


if __name__ == "__main__":
    _write_optimised(*sys.argv[1:])

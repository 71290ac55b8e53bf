"""Builds engines for the CPU: graphs that ONNX Runtime has optimised once and for all, over weights files that it maps.

A plain session over a portable graph converts, optimises and packs the weights each time it is opened, into memory of
its own. Here that is done at build and stored, so that opening an engine computes nothing and its weights are shared
pages of a mapped file (see `glance_trt.runtime.runners.onnxruntime`). Graphs of one group, such as the phases of a
denoiser, have most weights in common; what several of them contain is stored once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import onnx
from onnx import TensorProto, helper

from glance_trt.bundle import Engine
from glance_trt.engines import attention
from glance_trt.errors import ModelError, OutputError, TargetError
from glance_trt.progress import Progress, silent
from glance_trt.runtime.runners.onnxruntime import requirements

_INLINE = 4096
"""Initializers smaller than this stay in the graph, bytes."""
_ALIGNMENT = 4096
"""ONNX Runtime maps each tensor by itself; on pages of its own none is counted, or read, twice. Bytes."""
_CHUNK = 1 << 20


def build(
    graphs: Mapping[str, Path],
    *,
    directory: Path,
    prefix: str,
    groups: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, Engine]:
    """Make engines for this machine's CPU of float32 ``.onnx`` files, given by graph name.

    groups: graph name -> name of its group; a graph without an entry shares nothing. threads: for the optimisation, by
    default as many as there are cores. Writes into `directory`, for each graph, ``<prefix>.<graph>.onnx`` with the
    weights that only it has in ``<prefix>.<graph>.bin``, and for each group ``<prefix>.<group>.base.bin``. A weights
    file without content is not written. The files appear together once all are made; an error leaves `directory` as it
    was. What the engines need to run is `glance_trt.runtime.runners.onnxruntime.requirements`, and each holds it as
    metadata.

    Memory: up to twice the largest graph's weights in float32, which ONNX Runtime holds both as they are and packed.

    Raises `TargetError` if ONNX Runtime is missing or refuses a graph, `ModelError` for a file that is no graph, and
    `OutputError` where a file cannot be written.
    """
    groups = groups or {}
    members: dict[str, list[str]] = {}
    for graph in graphs:
        members.setdefault(groups.get(graph, graph), []).append(graph)
    engines: dict[str, Engine] = {}
    with _writing(directory):
        folder = tempfile.TemporaryDirectory(prefix=".building-", dir=directory)
    with folder as drafts:
        done = Path(drafts, "done")
        done.mkdir()
        for group, names in members.items():
            models = {}
            for graph in names:
                progress(f"optimise {prefix}.{graph}", 0, 1)
                models[graph] = _optimise(graphs[graph], Path(drafts, f"{prefix}.{graph}.onnx"), graph, threads)
                progress(f"optimise {prefix}.{graph}", 1, 1)
            with _writing(directory):
                weights = _share(models, Path(drafts), done, prefix, group, progress)
                for graph, model in models.items():
                    engines[graph] = Engine(f"{prefix}.{graph}.onnx", weights[graph])
                    _write(model, done / engines[graph].file)
        with _writing(directory):
            for file in done.iterdir():
                os.replace(file, directory / file.name)
    return engines


def _optimise(source: Path, draft: Path, graph: str, threads: int | None) -> onnx.ModelProto:
    """Write what ONNX Runtime makes of `source` to `draft` and, beside it, its weights; returns it without weights."""
    needed = requirements()
    import onnxruntime as ort

    try:
        model = onnx.load(source, load_external_data=False)
    except Exception as error:  # a missing file, or whatever protobuf raises for one that it cannot parse
        raise ModelError(f"{graph}: {source} cannot be read as an ONNX graph: {error}") from None
    attention.fuse(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only; it warns that the result is for this CPU, which is intended
    options.intra_op_num_threads = threads or 0
    # All: against the hardware-independent level, the blocked layout for convolutions makes a step 10 to 20 % faster.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(draft)
    entries = {
        "session.model_external_initializers_file_folder_path": str(source.parent.resolve()),
        "session.optimized_model_external_initializers_file_name": draft.with_suffix(".bin").name,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(_INLINE),
    }
    if platform.machine().lower() in ("x86_64", "amd64"):
        # Elsewhere the packing depends on CPU features that `requirements` does not tell apart.
        entries["session.save_external_prepacked_constant_initializers"] = "1"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        raise TargetError(f"{graph}: ONNX Runtime {ort.__version__} cannot optimise {source.name}: {error}") from None
    optimised = onnx.load(draft, load_external_data=False)
    optimised.producer_name, optimised.producer_version, optimised.doc_string = "glance-trt", "", ""
    optimised.graph.doc_string = ""
    del optimised.graph.value_info[:]
    for item in (optimised, optimised.graph, *optimised.graph.node, *optimised.graph.initializer):
        del item.metadata_props[:]
    for node in optimised.graph.node:
        node.doc_string, node.name = "", node.output[0]  # the names that the optimiser gives change from run to run
    # So does the order of the weights. In order of use, a first step reads the files from front to back.
    order = {
        name: position for position, name in enumerate(name for node in optimised.graph.node for name in node.input)
    }
    optimised.graph.initializer.sort(key=lambda tensor: order.get(tensor.name, -1))
    helper.set_model_props(optimised, needed)
    return optimised


def _share(
    models: Mapping[str, onnx.ModelProto], folder: Path, done: Path, prefix: str, group: str, progress: Progress
) -> dict[str, tuple[str, ...]]:
    """Move the weights of a group's graphs to their final files and point the graphs there, a megabyte at a time.

    Returns the names of each graph's weights files.
    """
    stage, base = f"share {prefix}.{group}", f"{prefix}.{group}.base.bin"
    weights = {graph: [_Weight(tensor) for tensor in _external(model.graph)] for graph, model in models.items()}
    total, done_bytes = 2 * sum(weight.length for items in weights.values() for weight in items), 0
    progress(stage, 0, total)
    owners: dict[bytes, set[str]] = {}
    positions: dict[tuple[str, bytes], list[int]] = {}
    with contextlib.ExitStack() as stack:
        paths = {graph: folder / f"{prefix}.{graph}.bin" for graph, items in weights.items() if items}
        drafts = {graph: stack.enter_context(open(path, "rb")) for graph, path in paths.items()}
        for graph, draft in drafts.items():
            for weight in weights[graph]:
                weight.hash(draft)
                owners.setdefault(weight.digest, set()).add(graph)
                progress(stage, done_bytes := done_bytes + weight.length, total)
        outputs: dict[str, IO[bytes]] = {}
        for graph, draft in drafts.items():
            for weight in weights[graph]:
                file = base if len(owners[weight.digest]) > 1 else f"{prefix}.{graph}.bin"
                if file not in outputs:
                    outputs[file] = stack.enter_context(open(done / file, "wb"))
                if (file, weight.digest) not in positions:
                    positions[file, weight.digest] = [_copy(draft, *part, outputs[file]) for part in weight.parts]
                weight.point_to(file, positions[file, weight.digest])
                progress(stage, done_bytes := done_bytes + weight.length, total)
        for output in outputs.values():
            _flush(output)
    for path in paths.values():
        path.unlink()
    return {graph: tuple(sorted({weight.file for weight in items})) for graph, items in weights.items()}


class _Weight:
    """An external initializer: its plain bytes and, where a kernel wants them packed, one or more packed copies.

    A packed copy is an entry ``prepacked_<i>`` = ``<key>|<offset>;<length>;<checksum>[;<offset>;...]`` of its external
    data, with the parts that the kernel of that key uses (ONNX Runtime, external_data_info.cc).
    """

    def __init__(self, tensor: TensorProto) -> None:
        self._tensor = tensor
        entries = {entry.key: entry.value for entry in tensor.external_data}
        self._packed = {key: value.rpartition("|") for key, value in entries.items() if key.startswith("prepacked_")}
        self.parts = [(int(entries.get("offset", 0)), int(entries["length"]))]
        for _, _, numbers in self._packed.values():
            fields = [int(number) for number in numbers.split(";")]
            self.parts += zip(fields[0::3], fields[1::3], strict=True)
        self.length = sum(length for _, length in self.parts)
        self.digest, self.file = b"", ""

    def hash(self, source: IO[bytes]) -> None:
        """Set `digest`: equal for weights whose bytes are equal, plain and packed."""
        result = hashlib.sha256(repr([length for _, length in self.parts]).encode())
        for part in self.parts:
            for chunk in _read(source, *part):
                result.update(chunk)
        self.digest = result.digest()

    def point_to(self, file: str, offsets: list[int]) -> None:
        """Refer to `file`, where the parts lie at `offsets`."""
        self.file = file
        entries = {"location": file, "offset": str(offsets[0]), "length": str(self.parts[0][1])}
        position = 1
        for key, (kernel, _, numbers) in self._packed.items():
            fields = numbers.split(";")
            count = len(fields) // 3
            fields[0::3] = [str(offset) for offset in offsets[position : position + count]]
            entries[key] = f"{kernel}|{';'.join(fields)}"
            position += count
        del self._tensor.external_data[:]
        for key, value in entries.items():
            self._tensor.external_data.add(key=key, value=value)


def _external(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """The external initializers of a graph and of those inside its nodes."""
    yield from (tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _external(inner)


def _read(source: IO[bytes], offset: int, length: int) -> Iterator[bytes]:
    source.seek(offset)
    while length > 0:
        chunk = source.read(min(length, _CHUNK))
        if not chunk:
            raise OSError(0, "the optimised weights end too early")
        length -= len(chunk)
        yield chunk


def _copy(source: IO[bytes], offset: int, length: int, output: IO[bytes]) -> int:
    """Append bytes of `source` to `output` at the next aligned position, and return that."""
    position = output.seek(-output.tell() % _ALIGNMENT, os.SEEK_CUR)
    for chunk in _read(source, offset, length):
        output.write(chunk)
    return position


def _write(model: onnx.ModelProto, path: Path) -> None:
    with open(path, "wb") as output:
        output.write(model.SerializeToString(deterministic=True))
        _flush(output)


def _flush(output: IO[bytes]) -> None:
    """To the disk: else a mapped page counts as this process's own until the system gets round to writing it."""
    output.flush()
    os.fsync(output.fileno())


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[Any]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{directory}: the engines cannot be written: {error.strerror}") from None

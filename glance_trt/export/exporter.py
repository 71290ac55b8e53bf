"""The portable part of a bundle: tokenizers, fused weights, and graphs that point into them, put into the workplace.

A build runs `export` in a process of its own. Nothing here is kept in memory but what is being written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glance_trt import hashing, strict
from glance_trt.bundle import Bundle, DType, Graph, GuidanceMode, GuideSource, Tokenizer
from glance_trt.export.inputs import Inputs
from glance_trt.progress import Progress, silent
from glance_trt.staging import Staging, key_of

if TYPE_CHECKING:
    from glance_trt.export.source import Source
    from glance_trt.export.weights import Fused, TensorRef


@dataclass(frozen=True)
class Exported:
    """What was put into the workplace, as the manifest has it. scales: the lowest and the highest guidance scale that
    the guides were trained for; empty where there are none, or they do not say."""

    tokenizers: dict[str, Tokenizer]
    graphs: dict[str, Graph]
    guides: tuple[GuideSource, ...]
    scales: tuple[float, ...]


def export(
    inputs: Inputs,
    output: Path,
    previous: Bundle | None,
    dtypes: Sequence[DType],
    comparable: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Fuse, trace, and put what is not there yet into the workplace of `output`.

    previous: a bundle whose files may be taken over. dtypes: what targets want to compute in. comparable: that each
    graph must be there in a dtype that a CPU can run, for the graphs themselves are compared with PyTorch. Raises
    `ModelError`, `LoraError`, `RecipeError` and `OSError`.
    """
    exporter = _Exporter(inputs, Staging(output, previous), dtypes, comparable, progress)
    tokenizers = exporter.write_tokenizers()
    graphs = {name: graph for kind in inputs.family.components for name, graph in exporter.export(kind).items()}
    guides = tuple(
        GuideSource(phase, item.file.name, hashing.sha256_of_file(item.file), item.config.kind)
        for phase, item in exporter.guides.items()
    )
    return Exported(tokenizers, graphs, guides, exporter.scales)


class _Exporter:
    def __init__(
        self, inputs: Inputs, staging: Staging, dtypes: Sequence[DType], comparable: bool, progress: Progress
    ) -> None:
        from glance_trt.export import phases

        self.inputs, self.family, self.staging = inputs, inputs.family, staging
        self.dtypes, self.comparable, self.progress = dtypes, comparable, progress
        self.guides = phases.guides(inputs.recipe, inputs.folder, self.family)
        self.scales = phases.scales(inputs.recipe, self.guides)
        self.sources = self.family.sources(self.guides)

    def write_tokenizers(self) -> dict[str, Tokenizer]:
        tokenizers = {}
        for name, item in self.family.tokenizers().items():
            file = f"{name}.json"

            def make(folder: Path, file: str = file, text: str = item.text) -> list[str]:
                (folder / file).write_text(text, encoding="utf-8")
                return [file]

            self.staging.stage(key_of("tokenizer", file, item.text), make)
            tokenizers[name] = Tokenizer(file, item.max_length, item.pad_token_id, item.template)
        return tokenizers

    def export(self, kind: str) -> dict[str, Graph]:
        """The weights of one component, and a graph for each dtype that it is to compute in (and each phase)."""
        from glance_trt.export import trace, weights
        from glance_trt.export.families import source_of

        files = self._write_weights(kind, trace.parameter_names(self.sources[kind]))
        tensors = {file: weights.read_header(self.staging.folder / file)[0] for file in files}
        traced: dict[Any, Any] = {}
        graphs = {}
        for name in self.inputs.graphs(kind):
            source = source_of(self.sources, name)
            own = [file for file in files if file in ("denoiser.base.safetensors", f"{name}.safetensors")]
            bound = {tensor: ref for file in own for tensor, ref in tensors[file].items()}  # a phase's own come last
            graph_files: dict[str, str] = {
                dtype: self._write_graph(name, source, dtype, bound, traced) for dtype in self._dtypes(kind)
            }
            guidance: GuidanceMode = "none"
            if kind == "denoiser":
                guided = name.partition(".")[2] in self.guides
                guidance = "embedded" if guided else self.inputs.recipe.guidance.mode
            graphs[name] = Graph(source.inputs, source.outputs, graph_files, tuple(own), guidance)
        return graphs

    def _dtypes(self, kind: str) -> list[DType]:
        """What the graphs of a component are made in."""
        found = {self.family.dtype(kind, wanted) for wanted in self.dtypes}
        if self.comparable and found == {"bfloat16"}:
            found.add("float32")
        return sorted(found)

    def _write_graph(
        self, name: str, source: Source, dtype: str, bound: Mapping[str, TensorRef], traced: dict[Any, Any]
    ) -> str:
        """A graph's file. traced: what was traced before, for phases mostly share one source."""
        from glance_trt.export import trace

        file = f"{name}.{dtype}.onnx"

        def make(folder: Path) -> list[str]:
            if (id(source), dtype) not in traced:
                self.progress(f"trace {name} {dtype}", 0, 1)
                traced[id(source), dtype] = trace.trace(source, dtype)
                self.progress(f"trace {name} {dtype}", 1, 1)
            trace.bind(traced[id(source), dtype], bound, folder / file)
            return [file]

        layout = {tensor: (ref.file.name, ref.dtype, ref.shape, ref.offset) for tensor, ref in bound.items()}
        self.staging.stage(key_of("graph", name, dtype, self._graph_key(name, source), layout), make)
        return file

    def _graph_key(self, graph: str, source: Source) -> str:
        """The key of what is traced, which is independent of the weights' values."""
        kind, _, phase = graph.partition(".")
        recipe = self.inputs.recipe
        config = self.family.model.config_file(self.family.components[kind])
        ports = [strict.write(port) for port in (*source.inputs, *source.outputs)]
        # Stable Diffusion 3 without T5 takes as many zeros, which no port shows.
        step = (recipe.guidance.mode, recipe.guidance.rescale, recipe.prompt_tokens) if kind == "denoiser" else None
        guide = strict.write(self.guides[phase].config) if phase in self.guides else None
        return key_of(self.family.name, hashing.sha256_of_file(config), ports, step, guide, self.inputs.tools)

    def _write_weights(self, kind: str, names: Sequence[str]) -> list[str]:
        from glance_trt.export import fuse, lora, weights
        from glance_trt.export.families import stored

        loras, base = self.inputs.loras, self.inputs.tensors[kind]
        pairs = self.inputs.encoders.get(kind, {})
        place = self.family.model.path(self.family.components[kind])
        contents: dict[str, dict[str, TensorRef | Fused]] = {}
        if kind == "denoiser":
            contents = fuse.plan(stored(self.family, names, base, place), loras, self.guides)
        else:
            changed = {name: lora.fused(base[name], pair) for name, pair in pairs.items()}
            contents[f"{kind}.safetensors"] = stored(self.family, names, {**base, **changed}, place)
        source_key = self.inputs.source_key(kind)
        phase_keys = {phase: self.inputs.phase_key(phase) for phase in loras}
        for file, tensors in contents.items():

            def make(folder: Path, file: str = file, tensors: Any = tensors) -> list[str]:
                weights.write(folder / file, tensors, self.progress, f"write {file.removesuffix('.safetensors')}")
                return [file]

            phase_key = phase_keys.get(file.split(".")[1])
            self.staging.stage(key_of("weights", file, source_key, phase_key, sorted(tensors)), make)
        return list(contents)

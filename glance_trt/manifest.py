"""The manifest of a bundle, ``bundle.json``: reading it, writing it, and what must hold between its parts.

``docs/bundle-format.md`` specifies the format. A manifest that was read holds what that page says MUST hold, so that
whoever uses it need not check again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from glance_trt import limits, strict
from glance_trt.errors import BundleError
from glance_trt.schema import EngineSet, FileEntry, Graph, Guidance, Image, Provenance, Schedule, Step, Tokenizer

FORMAT = 1
MANIFEST = "bundle.json"
TEXT_ENCODER = re.compile(r"text_encoder(_\d)?")
"""What the graph of a text encoder is called."""

T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """The content of ``bundle.json``."""

    format: int
    name: str
    family: str
    provenance: Provenance
    image: Image
    tokenizers: dict[str, Tokenizer]
    guidance: Guidance
    schedules: dict[str, Schedule]
    graphs: dict[str, Graph]
    engines: dict[str, EngineSet]
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        limits.check_name("name", self.name)
        limits.check_file_names("files", self.files, reserved=MANIFEST)
        for key in ("tokenizers", "schedules", "graphs", "engines"):
            for name in getattr(self, key):
                limits.check_name(key, name)
        for name, graph in self.graphs.items():
            self._check_sources(name, graph)
        for name in ("text_encoder", "decoder"):
            if name not in self.graphs:
                raise strict.Mismatch(f"graphs.{name}: missing")
        limits.check_distinct("graphs: outputs of text encoders", self.conditions())
        if not self.schedules:
            raise strict.Mismatch("schedules: empty")
        for name, schedule in self.schedules.items():
            for i, step in enumerate(schedule.steps):
                self._check_step(f"schedules.{name}.steps[{i}]", step)
        self._check_sizes()
        for target, engines in self.engines.items():
            for graph_name in sorted(self.graphs.keys() ^ engines.graphs.keys()):
                fault = "missing" if graph_name in self.graphs else "no such graph"
                path = f"engines.{target}.graphs.{strict.shown_key(graph_name)}"
                raise strict.Mismatch(f"{path}: {fault}; a target has one engine for every graph")
        for path, file in self._references():
            if file not in self.files:
                raise strict.Mismatch(f"{path}: {strict.shown(file)} is not listed under files")

    def _check_sources(self, name: str, graph: Graph) -> None:
        """Everything that the graph is fed exists by the time it runs."""
        if TEXT_ENCODER.fullmatch(name):
            known = [f"{kind}.{tokenizer}" for tokenizer in self.tokenizers for kind in ("tokens", "mask")]
        elif name == "decoder":
            known = ["latents"]
        elif name == "encoder":
            known = ["image", "noise"]
        elif name.startswith("denoiser."):
            known = ["latents", "table.timestep", "table.coefficients", "guidance_scale"]
            known += [f"{kind}.{output}" for output in self.conditions() for kind in ("condition", "negative")]
        else:
            raise strict.Mismatch(
                f"graphs.{name}: expected text_encoder, text_encoder_<number>, encoder, decoder or denoiser.<phase>"
            )
        for i, port in enumerate(graph.inputs):
            if port.source not in known:
                raise strict.Mismatch(
                    f"graphs.{name}.inputs[{i}].source: got {strict.shown(port.source)}, expected one of "
                    f"{', '.join(known) or 'none, for there is no tokenizer'}"
                )
            if port.dtype != (dtype := self._dtype(port.source)):
                raise strict.Mismatch(f"graphs.{name}.inputs[{i}].dtype: {port.source} is {dtype}, got {port.dtype}")
        sources = {port.source.partition(".")[0] for port in graph.inputs}
        if "negative" in sources and "guidance_scale" not in sources:
            raise strict.Mismatch(f"graphs.{name}.inputs: a negative condition, but no guidance_scale")
        if name == "encoder" and "image" not in sources:
            raise strict.Mismatch(f"graphs.{name}.inputs: none is the image")

    def _dtype(self, source: str) -> str:
        """What a runtime feeds an input of that source with."""
        kind, _, output = source.partition(".")
        if kind in ("condition", "negative"):
            ports = [port for name in self.text_encoders() for port in self.graphs[name].outputs]
            return next(port.dtype for port in ports if port.name == output)
        return {"tokens": "int64", "mask": "int64", "image": "uint8"}.get(kind, "float32")

    def _check_sizes(self) -> None:
        """Every size of images has a schedule, and every schedule's sizes are sizes of images."""
        for name, schedule in self.schedules.items():
            for i, size in enumerate(schedule.sizes):
                if not self.image.takes(*size):
                    raise strict.Mismatch(f"schedules.{name}.sizes[{i}]: {list(size)} is no size of image")
        for size in ((self.image.height, self.image.width), *self.image.sizes):
            if not any(schedule.fits(*size) for schedule in self.schedules.values()):
                raise strict.Mismatch(f"schedules: none is for {list(size)}, a size of image")
        if self.image.sides and all(schedule.sizes for schedule in self.schedules.values()):
            raise strict.Mismatch("schedules: image.sides allows any size in a range, and none is for all sizes")

    def conditions(self) -> list[str]:
        """The names of what the text encoders put out, in order of the graphs."""
        return [port.name for name in self.text_encoders() for port in self.graphs[name].outputs]

    def text_encoders(self) -> list[str]:
        """The names of the text encoders' graphs."""
        return [name for name in self.graphs if TEXT_ENCODER.fullmatch(name)]

    def _check_step(self, path: str, step: Step) -> None:
        name = f"denoiser.{step.phase}"
        if name not in self.graphs:
            raise strict.Mismatch(f"{path}.phase: there is no graph {strict.shown(name)}")
        if "encoder" in self.graphs and not step.mix:
            raise strict.Mismatch(f"{path}.mix: missing; the graph encoder makes it possible to start from an image")
        for port in self.graphs[name].inputs:
            if port.source == "table.coefficients" and port.shape != (len(step.coefficients),):
                raise strict.Mismatch(
                    f"{path}.coefficients: {len(step.coefficients)} numbers, for input {port.name!r} of {name}, "
                    f"whose shape is {list(port.shape)}"
                )

    def _references(self) -> Iterable[tuple[str, str]]:
        for name, tokenizer in self.tokenizers.items():
            yield f"tokenizers.{name}.file", tokenizer.file
        for name, graph in self.graphs.items():
            for dtype, file in graph.files.items():
                yield f"graphs.{name}.files.{dtype}", file
            for i, file in enumerate(graph.weights):
                yield f"graphs.{name}.weights[{i}]", file
        for target, engines in self.engines.items():
            for name, engine in engines.graphs.items():
                yield f"engines.{target}.graphs.{name}.file", engine.file
                for i, file in enumerate(engine.weights):
                    yield f"engines.{target}.graphs.{name}.weights[{i}]", file

    def schedule(self, name: str | None = None) -> Schedule:
        """The named schedule, or the first. Raises `BundleError` if there is none of that name."""
        return _get(self.schedules, "schedule", next(iter(self.schedules)) if name is None else name)

    def engine_files(self, target: str) -> list[str]:
        """The files that running on `target` reads, tokenizers included, without repetition.

        Raises `BundleError` if there are no engines for that target.
        """
        files = [tokenizer.file for tokenizer in self.tokenizers.values()]
        files += _get(self.engines, "target", target).files()
        return list(dict.fromkeys(files))


def load(text: str | bytes, where: str = MANIFEST) -> Manifest:
    """Parse and check a manifest. Raises `BundleError`, whose text names the file and the key path."""
    try:
        text = text.decode() if isinstance(text, bytes) else text  # json.loads would take UTF-16 as well
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not valid JSON: {error}") from None
    found = value.get("format") if isinstance(value, dict) else None
    if isinstance(found, bool):  # an int to Python, and no format
        found = None
    if isinstance(found, int) and found > FORMAT:
        raise BundleError(
            f"{where}: format {found} is newer than {FORMAT}, which this version reads; upgrade glance-trt"
        )
    if isinstance(found, int) and found != FORMAT:
        raise BundleError(f"{where}: format {found} is unknown; this version reads {FORMAT}")
    try:
        return strict.read(Manifest, value)
    except strict.Mismatch as error:
        raise BundleError(f"{where}: {error}") from None


def dump(manifest: Manifest) -> str:
    """The manifest as JSON text. Raises `BundleError` where a reader would refuse it, for its size or its values."""
    text = json.dumps(strict.write(manifest), indent=1) + "\n"
    if len(text) > limits.MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST}: {len(text)} bytes; at most {limits.MANIFEST_BYTES} are allowed")
    load(text)
    return text


def _get(items: Mapping[str, T], what: str, name: str) -> T:
    if name not in items:
        raise BundleError(f"{what} {name!r}: this bundle has {', '.join(items) or 'none'}")
    return items[name]


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {strict.shown(key)} stands twice")
            seen.add(key)
    return result


def _parse_int(digits: str) -> int:
    if len(digits) > 20:  # no field takes more, and Python before 3.10.7 takes quadratic time over them
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)

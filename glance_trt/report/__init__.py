"""A build's report: one HTML file about a bundle, for whoever puts it into production.

The file needs nothing else, and forbids itself scripts and the network.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Protocol

from glance_trt.manifest import Manifest
from glance_trt.report.drawing import MARKS, draw, key
from glance_trt.report.markup import CSS, POLICY, Html, bar, table, tag


class Parity(Protocol):
    """A graph's difference from PyTorch; `glance_trt.export.parity.Parity` is one, which this tier cannot import."""

    @property
    def graph(self) -> str: ...
    @property
    def error(self) -> float: ...
    @property
    def tolerance(self) -> float: ...


@dataclass(frozen=True)
class Sample:
    """An image that the bundle made: the bytes of a PNG file."""

    caption: str
    seed: int
    png: bytes


@dataclass(frozen=True)
class BuildRecord:
    """What a report says beyond the manifest. Sections without content are left out.

    Attributes:
        built: when, with a time zone; shown in UTC.
        seconds: wall clock, by stage.
        parity: by what ran, a target's name or a few words.
        not_compared: why, by what could not run here.
        precision: the number of layers, by target, graph, type of layer and dtype.
        log_snr: by schedule, nats: before each step, then after the last (`glance_trt.schedule.log_snr`); inf is fine.
        samples: images.
        notes: what a user should read.
    """

    built: datetime
    seconds: Mapping[str, float] = field(default_factory=dict)
    parity: Mapping[str, Sequence[Parity]] = field(default_factory=dict)
    not_compared: Mapping[str, str] = field(default_factory=dict)
    precision: Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]] = field(default_factory=dict)
    log_snr: Mapping[str, Sequence[float]] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    notes: Sequence[str] = ()


def render(manifest: Manifest, record: BuildRecord) -> str:
    """The text of an HTML file, to be written as UTF-8; the same arguments give the same text.

    Raises `ValueError` for a time without a zone and for log-SNRs that are no numbers or not one more than the steps,
    `BundleError` for those of a schedule that is not there.
    """
    if record.built.tzinfo is None:
        raise ValueError(f"built: {record.built} has no time zone")
    for name, values in record.log_snr.items():
        expected = len(manifest.schedule(name).steps) + 1
        if len(values) != expected or any(math.isnan(value) for value in values):
            raise ValueError(f"log_snr.{name}: expected {expected} numbers, got {list(values)}")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{manifest.name}: build report"),
        tag("style", CSS),
    )
    sections = {
        "Notes": [tag("p", note) for note in record.notes],
        "Schedule": _schedules(manifest, record.log_snr),
        "Samples": _samples(record.samples),
        "Parity with PyTorch": _parity(record),
        "Targets": _targets(manifest),
        "Files": _files(manifest),
        "Precision": _precision(record.precision),
        "Build time": _times(record.seconds),
    }
    parts = [tag("section", tag("h2", title), *inner) for title, inner in sections.items() if inner]
    page = tag("html", head, tag("body", _header(manifest, record.built), *parts), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


# --- sections ---


def _header(manifest: Manifest, built: datetime) -> Html:
    source, image, utc = manifest.provenance, manifest.image, built.astimezone(timezone.utc)
    facts = {
        "Built": f"{utc:%Y-%m-%d %H:%M} UTC",
        "Family": manifest.family,
        "Base model": source.model,
        "Images": f"{image.described()}, latents {' x '.join(map(str, image.latent_shape))}",
        "Tools": ", ".join(f"{name} {_short(version)}" for name, version in source.tools.items()),
    }
    rows = [(lora.phase, "LoRA", lora.file, f"{lora.scale:g}", _short(lora.sha256)) for lora in source.loras]
    rows += [(item.phase, f"guide, {item.kind}", item.file, "", _short(item.sha256)) for item in source.guides]
    added = [table(("Phase", "Kind", "File", "Scale", "SHA-256"), rows, "lllrl")] if rows else []
    listed = [part for key, value in facts.items() if value for part in (tag("dt", key), tag("dd", value))]
    return tag("header", tag("h1", manifest.name), tag("dl", *listed), *added)


def _schedules(manifest: Manifest, log_snr: Mapping[str, Sequence[float]]) -> list[Html]:
    parts, all_steps = [], [step for schedule in manifest.schedules.values() for step in schedule.steps]
    styles = {phase: i % MARKS for i, phase in enumerate(dict.fromkeys(step.phase for step in all_steps))}
    for name, schedule in manifest.schedules.items():
        levels = log_snr.get(name, ())
        rows = [
            [str(i), key(step.phase, styles), f"{step.timestep:g}", *(f"{value:.5f}" for value in step.coefficients)]
            for i, step in enumerate(schedule.steps, start=1)
        ]
        head = ["Step", "Phase", "Timestep", *schedule.coefficients]
        if levels:
            rows.append(["end", *("" for _ in head[1:])])
            for row, cell in zip([head, *rows], ["log-SNR", *(f"{level:.2f}" for level in levels)], strict=True):
                row.insert(3, cell)
        drawn = [draw(name, schedule, levels, styles)] if levels else []
        parts.append(tag("h3", f"{name}, initial noise x {schedule.initial_noise_scale:g}"))
        parts.append(tag("div", *drawn, table(head, rows, "ll" + "r" * len(head[2:])), class_="beside"))
    return parts


def _samples(samples: Sequence[Sample]) -> list[Html]:
    figures = []
    for sample in samples:
        source = "data:image/png;base64," + base64.b64encode(sample.png).decode("ascii")
        caption = tag("figcaption", sample.caption, tag("small", f"seed {sample.seed}"))
        figures.append(tag("figure", tag("img", src=source, alt=sample.caption), caption))
    return [tag("div", *figures, class_="grid")] if figures else []


def _parity(record: BuildRecord) -> list[Html]:
    rows = []
    for ran, results in record.parity.items():
        for item in results:
            exact = item.error == item.tolerance == 0
            share = 0.0 if exact else item.error / item.tolerance if item.tolerance else math.inf
            pixels = item.graph == "decoder"
            unit = " of 255" if pixels else ""
            rounded = pixels and 0 < item.error <= min(1, item.tolerance)  # to the next whole number
            said = "exact" if exact else "rounding" if rounded else f"{100 * share:.0f} %"
            shown = bar(said, 0 if rounded else share)
            rows.append((item.graph, ran, f"{item.error:.2g}{unit}", f"{item.tolerance:g}{unit}", shown))
    head = ("Graph", "Ran as", "Largest error", "Tolerance", "Share of tolerance")
    unit = "Errors are relative to the largest value of PyTorch's output, the decoder's are pixel values."
    parts = [table(head, rows, "llrrr"), tag("p", unit)] if rows else [tag("p", "Nothing was compared.")]
    missing = record.not_compared.items()
    return parts + [tag("p", tag("strong", f"{name} was not compared here: "), reason) for name, reason in missing]


def _targets(manifest: Manifest) -> list[Html]:
    rows = []
    for target, engines in manifest.engines.items():
        files = manifest.engine_files(target)
        needs = ", ".join(f"{key} {value}" for key, value in engines.requires.items()) or "nothing else"
        rows.append((target, engines.backend, engines.dtype, f"{len(files)} files, {_size(manifest, files)}", needs))
    return [table(("Target", "Backend", "Dtype", "Reads", "Needs where it runs"), rows, "lllrl")] if rows else []


def _files(manifest: Manifest) -> list[Html]:
    """Each file once, in the first group that has it."""
    groups = {
        "Weights": [file for graph in manifest.graphs.values() for file in graph.weights],
        "Graphs": [file for graph in manifest.graphs.values() for file in graph.files.values()],
        "Tokenizers": [tokenizer.file for tokenizer in manifest.tokenizers.values()],
        **{f"Engines for {target}": manifest.engine_files(target) for target in manifest.engines},
        "Other": list(manifest.files),
    }
    left, tables = set(manifest.files), []
    for group, claimed in groups.items():
        if files := sorted(left & set(claimed)):
            left -= set(files)
            rows = [(file, _size(manifest, [file]), _short(manifest.files[file].sha256)) for file in files]
            tables.append(table(("File", "Size", "SHA-256"), rows, "lrl", f"{group}, {_size(manifest, files)}"))
    total = f"{len(manifest.files)} files, {_size(manifest, manifest.files)} in all."
    return [tag("p", total), tag("div", *tables, class_="beside")]


def _precision(precision: Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]]) -> list[Html]:
    parts = []
    for target, graph, layers in ((target, *item) for target, graphs in precision.items() for item in graphs.items()):
        dtypes = sorted({dtype for counts in layers.values() for dtype in counts})
        rows = [(kind, *(str(counts.get(dtype, 0)) for dtype in dtypes)) for kind, counts in layers.items()]
        totals = [f"{sum(counts.get(dtype, 0) for counts in layers.values())} {dtype}" for dtype in dtypes]
        summary = tag("summary", f"{target}, {graph}: {', '.join(totals)}")
        parts.append(tag("details", summary, table(("Layer type", *dtypes), rows, "l" + "r" * len(dtypes))))
    return parts


def _times(seconds: Mapping[str, float]) -> list[Html]:
    longest = max(seconds.values(), default=0.0) or 1.0
    rows = [(stage, bar(f"{value:.1f} s", value / longest)) for stage, value in seconds.items()]
    total = f"{sum(seconds.values()):.1f} s in all."
    return [table(("Stage", "Time"), rows, "lr"), tag("p", total)] if rows else []


def _short(text: str) -> str:
    """The start of a SHA-256, all of any other text."""
    return text[:12] if len(text) == 64 else text


def _size(manifest: Manifest, files: Iterable[str]) -> str:
    size = sum(manifest.files[file].size for file in files)
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"

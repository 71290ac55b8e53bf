"""A build's report: what it says, and that it is HTML which no text in it can change."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from glance_trt import schema
from glance_trt.bundle import Bundle
from glance_trt.errors import BundleError
from glance_trt.manifest import Manifest
from glance_trt.report import BuildRecord, Sample, render

from .models import tiny

BUILT = datetime(2025, 11, 21, 0, 30, tzinfo=timezone(timedelta(hours=2)))
LOG_SNR = {"default": [-math.inf, -4.0, -1.0, 5.0, math.inf], "short": [0.5, 2.5]}
HOSTILE = """<script>alert(1)</script> "' onerror=x </style></title> &amp; <img src=http://x>"""
VOID = ("meta", "img")


class Compared(NamedTuple):
    graph: str
    error: float
    tolerance: float


RECORD = BuildRecord(
    BUILT,
    seconds={"fuse and export": 30.0, "engines cpu": 7.5},
    parity={"cpu": [Compared("denoiser.slow", 4.2e-5, 1e-4), Compared("decoder", 2.0, 4.0)]},
    not_compared={"rtx": "there is no GPU here"},
    precision={"rtx": {"denoiser.slow": {"Convolution": {"float16": 12, "float32": 3}, "MatMul": {"float16": 30}}}},
    log_snr=LOG_SNR,
    samples=[Sample("a red circle", 7, b"\x89PNG one"), Sample("a blue star", 8, b"\x89PNG two")],
    notes=["slow.safetensors gives no alpha"],
)


@dataclasses.dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    content: list[Element | str] = dataclasses.field(default_factory=list)

    def find(self, tag: str, **attributes: str) -> list[Element]:
        """All such elements inside, in order; an attribute named class_ stands for class."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [e for e in self.walk() if e.tag == tag and wanted.items() <= e.attributes.items()]

    def walk(self) -> Iterator[Element]:
        for part in self.content:
            if isinstance(part, Element):
                yield part
                yield from part.walk()

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.content)


class Parser(HTMLParser):
    """Builds a tree, and fails where an element is not closed by its own end tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} stands twice"
        element = Element(tag, {key: value or "" for key, value in attrs})
        self.open[-1].content.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].content.append(data)


def parse(text: str) -> Element:
    parser = Parser()
    parser.feed(text)
    parser.close()
    assert len(parser.open) == 1, f"not closed: {[element.tag for element in parser.open]}"
    return parser.open[0]


def section(page: Element, title: str) -> Element:
    return next(item for item in page.find("section") if item.find("h2")[0].text == title)


def rows(element: Element) -> list[list[str]]:
    """The cells' texts in the bodies of all tables inside."""
    found = [row for body in element.find("tbody") for row in body.find("tr")]
    return [[cell.text.strip() for cell in row.walk() if cell.tag in ("th", "td")] for row in found]


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    """As of a build for two targets: the engines for ``cpu`` are files of their own, those for ``rtx`` have weights."""
    plain = Bundle.open(tiny_bundle).manifest
    cpu = {name: schema.Engine(f"cpu.{name}.onnx", (f"cpu.{name}.bin",)) for name in plain.graphs}
    rtx = {name: schema.Engine("rtx.plan") for name in plain.graphs}
    new = [
        *(file for engine in cpu.values() for file in (engine.file, *engine.weights)),
        "rtx.plan",
        "base.safetensors",
    ]
    entries = {file: schema.FileEntry(1000 * i, f"{i:064x}") for i, file in enumerate(new, start=1)}
    graphs = {name: dataclasses.replace(graph, weights=("base.safetensors",)) for name, graph in plain.graphs.items()}
    lora = schema.LoraSource("slow", "slow.safetensors", "ab" * 32, 4.0)
    guide = schema.GuideSource("fast", "guide.safetensors", "cd" * 32, "full")
    return dataclasses.replace(
        plain,
        provenance=schema.Provenance("a-model", (lora,), {"torch": "2.13.0", "build": "ef" * 32}, (guide,)),
        graphs=graphs,
        engines={
            "cpu": schema.EngineSet("onnxruntime", "float32", cpu, {"onnxruntime": "1.31.1"}),
            "rtx": schema.EngineSet("tensorrt-rtx", "float16", rtx, {"compute_capability": "8.9 12.0"}),
        },
        files=plain.files | entries,
    )


@pytest.fixture(scope="module")
def page(manifest: Manifest) -> Element:
    return parse(render(manifest, RECORD))


# --- what it says ---


def test_the_header_names_origin_time_and_tools(page: Element) -> None:
    header = page.find("header")[0]
    assert header.find("h1")[0].text == "tiny"
    facts = dict(zip((e.text for e in header.find("dt")), (e.text for e in header.find("dd")), strict=True))
    assert facts["Built"] == "2025-11-20 22:30 UTC"
    assert facts["Family"] == "tiny"
    assert facts["Base model"] == "a-model"
    assert facts["Images"] == "4 x 6 (height x width), latents 3 x 4 x 6"
    assert facts["Tools"] == "torch 2.13.0, build efefefefefef"
    assert rows(header) == [
        ["slow", "LoRA", "slow.safetensors", "4", "abababababab"],
        ["fast", "guide, full", "guide.safetensors", "", "cdcdcdcdcdcd"],
    ]


def test_every_file_stands_once_in_its_group_whose_total_is_theirs(page: Element, manifest: Manifest) -> None:
    shown: dict[str, str] = {}
    captions = {}
    for table in section(page, "Files").find("table"):
        group, _, total = table.find("caption")[0].text.partition(", ")
        captions[group] = total
        for file, size, sha256 in rows(table):
            assert file not in shown
            assert size == f"{manifest.files[file].size / 1e3:.1f} kB"
            assert sha256 == manifest.files[file].sha256[:12]
            shown[file] = group
    assert set(shown) == set(manifest.files)
    assert shown["base.safetensors"] == "Weights"
    assert shown["denoiser.slow.onnx"] == "Graphs"
    assert shown["cpu.decoder.onnx"] == shown["cpu.decoder.bin"] == "Engines for cpu"
    assert shown["rtx.plan"] == "Engines for rtx"
    assert shown["tokenizer.json"] == "Tokenizers"
    assert captions["Engines for cpu"] == "36.0 kB"  # 1 + 2 + ... + 8
    assert captions["Engines for rtx"] == "9.0 kB"
    in_all = sum(entry.size for entry in manifest.files.values())
    assert f"{len(manifest.files)} files, {in_all / 1e3:.1f} kB in all." in section(page, "Files").text


@pytest.mark.parametrize(("size", "shown"), [(99_949, "99.9 kB"), (152.9e6, "152.9 MB"), (41_200_000_000, "41.20 GB")])
def test_sizes_are_decimal(manifest: Manifest, size: float, shown: str) -> None:
    files = manifest.files | {"rtx.plan": schema.FileEntry(int(size), "0" * 64)}
    page = parse(render(dataclasses.replace(manifest, files=files), RECORD))
    assert ["rtx.plan", shown, "0" * 12] in rows(section(page, "Files"))


def test_targets_say_what_they_read_and_need(page: Element, manifest: Manifest) -> None:
    tokenizer = manifest.files["tokenizer.json"].size
    assert rows(section(page, "Targets")) == [
        ["cpu", "onnxruntime", "float32", f"9 files, {(36_000 + tokenizer) / 1e3:.1f} kB", "onnxruntime 1.31.1"],
        [
            "rtx",
            "tensorrt-rtx",
            "float16",
            f"2 files, {(9_000 + tokenizer) / 1e3:.1f} kB",
            "compute_capability 8.9 12.0",
        ],
    ]


def test_parity_shows_the_share_of_the_tolerance_and_what_was_not_compared(page: Element) -> None:
    parity = section(page, "Parity with PyTorch")
    assert rows(parity) == [
        ["denoiser.slow", "cpu", "4.2e-05", "0.0001", "42 %"],
        ["decoder", "cpu", "2 of 255", "4 of 255", "50 %"],
    ]
    assert [bar.attributes["style"] for bar in parity.find("span", class_="fill")] == ["width:42.0%", "width:50.0%"]
    assert "rtx was not compared here: there is no GPU here" in parity.text


@pytest.mark.parametrize(
    ("error", "tolerance", "share", "style"),
    [
        (0.0, 0.0, "exact", "fill"),
        (1.0, 1.0, "100 %", "fill"),
        (2.0, 1.0, "200 %", "fill over"),
        (math.nan, 1.0, "nan %", "fill over"),
        (1.0, 0.0, "inf %", "fill over"),
    ],
)
def test_an_error_beyond_the_tolerance_is_marked(
    manifest: Manifest, error: float, tolerance: float, share: str, style: str
) -> None:
    record = BuildRecord(BUILT, parity={"cpu": [Compared("denoiser.slow", error, tolerance)]})
    parity = section(parse(render(manifest, record)), "Parity with PyTorch")
    assert rows(parity)[0][-1] == share
    assert len(parity.find("span", class_=style)) == 1


def test_a_pixel_that_is_rounded_to_the_next_number_is_no_error_to_measure(manifest: Manifest) -> None:
    record = BuildRecord(BUILT, parity={"cpu": [Compared("decoder", 1.0, 1.0), Compared("decoder", 1.0, 0.5)]})
    parity = section(parse(render(manifest, record)), "Parity with PyTorch")
    assert [row[-1] for row in rows(parity)] == ["rounding", "200 %"]
    assert [bar.attributes["style"] for bar in parity.find("span", class_="fill")] == ["width:0.0%"]


def test_precision_counts_layers_and_times_add_up(page: Element) -> None:
    precision = section(page, "Precision")
    assert precision.find("summary")[0].text == "rtx, denoiser.slow: 42 float16, 3 float32"
    assert [cell.text for cell in precision.find("th", scope="col")] == ["Layer type", "float16", "float32"]
    assert rows(precision) == [["Convolution", "12", "3"], ["MatMul", "30", "0"]]
    times = section(page, "Build time")
    assert rows(times) == [["fuse and export", "30.0 s"], ["engines cpu", "7.5 s"]]
    assert [bar.attributes["style"] for bar in times.find("span", class_="fill")] == ["width:100.0%", "width:25.0%"]
    assert "37.5 s in all." in times.text


def test_samples_are_the_png_files_themselves(page: Element) -> None:
    figures = section(page, "Samples").find("figure")
    images = [figure.find("img")[0].attributes for figure in figures]
    prefix = "data:image/png;base64,"
    assert all(image["src"].startswith(prefix) for image in images)
    assert [base64.b64decode(image["src"].removeprefix(prefix)) for image in images] == [b"\x89PNG one", b"\x89PNG two"]
    assert [image["alt"] for image in images] == ["a red circle", "a blue star"]
    assert [figure.text for figure in figures] == ["a red circleseed 7", "a blue starseed 8"]


def test_sections_without_content_are_left_out(manifest: Manifest) -> None:
    page = parse(render(manifest, BuildRecord(BUILT)))
    titles = [title.text for title in page.find("h2")]
    assert titles == ["Schedule", "Parity with PyTorch", "Targets", "Files"]
    assert "Nothing was compared." in section(page, "Parity with PyTorch").text
    assert not page.find("svg", role="img")
    assert rows(section(page, "Schedule"))[0] == ["1", "slow", "999", "1.00000", "0.75000", "-0.50000"]


# --- the schedule ---


def marks(drawing: Element) -> list[tuple[float, str]]:
    """Where each step's mark is, and its shape."""
    found = []
    for group in drawing.find("g"):
        place = re.match(r"translate\((\S+) ", group.attributes["transform"])
        assert place
        found.append((float(place[1]), group.find("path")[0].attributes["d"]))
    return found


def arcs(drawing: Element) -> list[tuple[float, float, str]]:
    """From where to where each arc goes, and its class."""
    found = []
    for path in drawing.find("path"):
        if "arc" in path.attributes["class"]:
            numbers = re.findall(r"[\d.]+", path.attributes["d"])
            found.append((float(numbers[0]), float(numbers[-2]), path.attributes["class"]))
    return found


def test_the_table_of_steps_holds_their_numbers(page: Element) -> None:
    schedule = section(page, "Schedule")
    head = ["Step", "Phase", "Timestep", "log-SNR", "c_in", "a", "b"]
    assert [cell.text for cell in schedule.find("th", scope="col")] == head * 2
    found = rows(schedule)
    assert len(found) == 4 + 1 + 1 + 1
    for i, (row, step) in enumerate(zip(found, tiny.SCHEDULES["default"].steps, strict=False)):
        assert row[:2] == [str(i + 1), step.phase]
        assert [float(cell) for cell in row[2:]] == [step.timestep, LOG_SNR["default"][i], *step.coefficients]
    assert found[4] == ["end", "", "", "inf", "", "", ""]
    assert found[6] == ["end", "", "", "2.50", "", "", ""]


def test_marks_lie_on_the_axis_and_arcs_join_them(page: Element) -> None:
    drawing = page.find("svg", role="img")[0]
    width = float(drawing.attributes["viewbox"].split()[2])
    places = [place for place, _ in marks(drawing)]
    labels = {label.text: float(label.attributes["x"]) for label in drawing.find("text")}
    places.append(labels["end"])
    assert 0 < places[0] < places[1]
    assert places[-2] < places[-1] < width
    # -4, -1 and 5 are drawn to scale, what is infinite beyond them
    assert (places[3] - places[2]) / (places[2] - places[1]) == pytest.approx(2, abs=0.01)
    assert places[0] == labels["-inf"]
    assert places[-1] == labels["inf"]
    assert labels["-4"] == places[1]  # a tick of the axis, below step 2
    assert [(start, end) for start, end, _ in arcs(drawing)] == list(itertools.pairwise(places))


def test_phases_differ_in_shape_and_dashes_as_well_as_in_colour(page: Element) -> None:
    drawing = page.find("svg", role="img")[0]
    shapes = [shape for _, shape in marks(drawing)]
    assert shapes[0] == shapes[1] != shapes[2] == shapes[3]
    classes = [class_ for _, _, class_ in arcs(drawing)]
    assert classes[0] == classes[1] != classes[2] == classes[3]
    style = page.find("style")[0].text
    dashes = [re.search(rf"\.{class_.replace(' ', '.')} {{ stroke-dasharray: ([^}}]+) }}", style) for class_ in classes]
    assert [bool(dash) for dash in dashes] == [False, False, True, True]
    legend = page.find("figcaption")[0].find("span", class_="key")
    assert [(key.text, key.find("path")[0].attributes["d"]) for key in legend] == [
        ("slow", shapes[0]),
        ("fast", shapes[2]),
    ]
    second = page.find("svg", role="img")[1]  # of the schedule that has only the fast phase
    assert marks(second)[0][1] == shapes[2]


@pytest.mark.parametrize("count", [1, 4, 50, 1000])
def test_labels_do_not_overlap(manifest: Manifest, count: int) -> None:
    steps = tuple(schema.Step("slow", 0.0, (1.0, 1.0, 1.0)) for _ in range(count))
    changed = dataclasses.replace(manifest, schedules={"default": schema.Schedule(steps)})
    record = BuildRecord(BUILT, log_snr={"default": [math.log1p(i) for i in range(count)] + [math.inf]})
    drawing = parse(render(changed, record)).find("svg", role="img")[0]
    assert len(marks(drawing)) == count
    width = float(drawing.attributes["viewbox"].split()[2])
    lines: dict[str, list[tuple[float, float]]] = {}
    for label in drawing.find("text"):
        at, half = float(label.attributes["x"]), 3.9 * len(label.text)  # half of DejaVu Sans's digits at 12 px
        assert 0 < at - half < at + half < width
        lines.setdefault(label.attributes["y"], []).append((at - half, at + half))
    for line in lines.values():
        line.sort()
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(line))


@pytest.mark.parametrize("levels", [[-math.inf, math.inf], [2.0, 2.0], [0.3, 0.300001], [-1e6, 1e6]])
def test_any_log_snr_can_be_drawn(manifest: Manifest, levels: list[float]) -> None:
    drawing = parse(render(manifest, BuildRecord(BUILT, log_snr={"short": levels}))).find("svg", role="img")[0]
    width = float(drawing.attributes["viewbox"].split()[2])
    [(start, end, _)] = arcs(drawing)
    assert 0 < start <= end < width
    ticks = [label for label in drawing.find("text") if label.text not in ("1", "end", "-inf", "inf")]
    assert 3 <= len(ticks) <= 1 + 9  # one of them names the axis


# --- how it is made ---


def test_it_is_a_page_for_everyone(page: Element) -> None:
    html = page.find("html")[0]
    assert html.attributes["lang"] == "en"
    head = html.find("head")[0]
    assert head.find("title")[0].text == "tiny: build report"
    assert head.content[0] == head.find("meta", charset="utf-8")[0]
    assert "@media (prefers-color-scheme: dark)" in head.find("style")[0].text
    assert head.find("meta", name="viewport")
    assert all(cell.attributes["scope"] in ("row", "col") for cell in page.find("th"))
    assert all(image.attributes["alt"] for image in page.find("img"))
    for drawing in page.find("svg"):
        if drawing.attributes.get("aria-hidden") != "true":
            assert drawing.attributes["role"] == "img"
            assert [part.tag for part in drawing.content[:2] if isinstance(part, Element)] == ["title", "desc"]
    described = page.find("svg", role="img")[0].find("desc")[0].text
    assert described == "From -inf to inf nats. Steps: 2 of slow, then 2 of fast."


def test_it_needs_nothing_else(manifest: Manifest) -> None:
    text = render(manifest, RECORD)
    page = parse(text)
    assert not {element.tag for element in page.walk()} & {"script", "link", "iframe", "object", "base", "use"}
    assert not re.search(r"https?:|//|url\(|@import", text)
    (policy,) = page.find("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_no_text_becomes_markup(manifest: Manifest) -> None:
    lora = schema.LoraSource("slow", HOSTILE, "0" * 64, 1.0)
    guide = schema.GuideSource("fast", HOSTILE, "0" * 64, HOSTILE)
    engines = {name: dataclasses.replace(item, requires={HOSTILE: HOSTILE}) for name, item in manifest.engines.items()}
    changed = dataclasses.replace(
        manifest,
        family=HOSTILE,
        provenance=schema.Provenance(HOSTILE, (lora,), {HOSTILE: HOSTILE}, (guide,)),
        engines=engines,
    )
    record = BuildRecord(
        BUILT,
        seconds={HOSTILE: 1.0},
        parity={HOSTILE: [Compared(HOSTILE, 0.5, 1.0)]},
        not_compared={HOSTILE: HOSTILE},
        precision={HOSTILE: {HOSTILE: {HOSTILE: {HOSTILE: 1}}}},
        log_snr=LOG_SNR,
        samples=[Sample(HOSTILE, 1, b"<script>")],
        notes=[HOSTILE],
    )
    page, plain = parse(render(changed, record)), parse(render(manifest, RECORD))
    assert {element.tag for element in page.walk()} == {element.tag for element in plain.walk()}
    assert {key for element in page.walk() for key in element.attributes} == {
        key for element in plain.walk() for key in element.attributes
    }
    assert len(page.find("img")) == 1
    assert page.find("img")[0].attributes["alt"] == HOSTILE
    # 4 facts, 1 LoRA, 2 of a guide, 4 that targets require, 1 note, 1 stage, 2 of parity, 2 of what was not compared,
    # 5 of precision, 1 caption
    assert page.text.count(HOSTILE) == 23


def test_control_characters_are_replaced(manifest: Manifest) -> None:
    caption = "line\nbreak \x00\x1b[2J \u202egnp.exe \ud800 größer 模糊 \N{ARTIST PALETTE}"
    text = render(manifest, BuildRecord(BUILT, samples=[Sample(caption, 1, b"")]))
    shown = parse(text).find("img")[0].attributes["alt"]
    assert shown == "line break ??[2J ?gnp.exe ? größer 模糊 \N{ARTIST PALETTE}"
    assert text.encode("utf-8")


def test_the_same_build_gives_the_same_bytes_in_every_process(tiny_bundle: Path) -> None:
    code = """
import datetime, sys
from glance_trt import report
from glance_trt.bundle import Bundle
built = datetime.datetime(2025, 11, 21, tzinfo=datetime.timezone.utc)
levels = {"default": [float("-inf"), -4.0, -1.0, 5.0, float("inf")]}
counts = {"cpu": {"decoder": {"Conv": {"float16": 1}, "Mul": {"float32": 2, "int64": 3}}}}
record = report.BuildRecord(built, log_snr=levels, precision=counts)
sys.stdout.buffer.write(report.render(Bundle.open(sys.argv[1]).manifest, record).encode())
"""
    command = [sys.executable, "-c", code, str(tiny_bundle)]
    environments = [os.environ | {"PYTHONHASHSEED": seed, "TZ": zone} for seed, zone in (("1", "UTC"), ("2", "EST5"))]
    pages = [subprocess.run(command, env=env, capture_output=True, check=True).stdout for env in environments]
    assert pages[0] == pages[1]
    assert b"2025-11-21 00:00 UTC" in pages[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"built": datetime(2025, 11, 21)}, ValueError, "^built: 2025-11-21 00:00:00 has no time zone$"),
        ({"log_snr": {"short": [1.0]}}, ValueError, r"^log_snr\.short: expected 2 numbers, got \[1\.0\]$"),
        (
            {"log_snr": {"short": [1.0, math.nan]}},
            ValueError,
            r"^log_snr\.short: expected 2 numbers, got \[1\.0, nan\]$",
        ),
        ({"log_snr": {"long": [1.0]}}, BundleError, "long"),
    ],
)
def test_what_makes_no_report_is_refused(
    manifest: Manifest, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        render(manifest, dataclasses.replace(RECORD, **changes))

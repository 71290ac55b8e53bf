"""A schedule, drawn over log-SNR."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from glance_trt.report.markup import Html, tag
from glance_trt.schema import Schedule

_WIDTH, _LINE, _AXIS, _EDGE, _BEYOND = 600, 100, 150, 24, 48  # the last is the room for what is infinite
_MARKS = (  # one per phase, and around again: a phase is known by its mark and dashes as well as by its colour
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "M-5-5H5V5H-5z",
    "M0-6.5L6.5 0L0 6.5L-6.5 0z",
)
MARKS = len(_MARKS)
"""Phases that look different; a style is a number below."""


def draw(name: str, schedule: Schedule, levels: Sequence[float], styles: Mapping[str, int]) -> Html:
    """A mark for each step at its log-SNR, and an arc from it to the next. levels: one more than the steps, nats.
    styles: a number below `MARKS` for each phase."""
    finite = [level for level in levels if math.isfinite(level)] or [0.0]
    low, high = min(finite), max(finite)
    if low == high:
        low, high = low - 1, high + 1
    left, right = _EDGE + _BEYOND * (-math.inf in levels), _WIDTH - _EDGE - _BEYOND * (math.inf in levels)

    def x(level: float) -> float:
        if math.isinf(level):
            return _EDGE if level < 0 else _WIDTH - _EDGE
        return left + (level - low) / (high - low) * (right - left)

    parts = [_path(f"M{left} {_AXIS}H{right}", "axis"), _path(f"M{_EDGE} {_AXIS}H{_WIDTH - _EDGE}", "axis beyond")]
    unit = 10.0 ** math.floor(math.log10((high - low) / 8))
    unit *= next(factor for factor in (1, 2, 5, 10) if factor * unit * 8 >= high - low)
    ticks = [i * unit for i in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
    for tick in [*ticks, *(end for end in (-math.inf, math.inf) if end in levels)]:
        parts += [_path(f"M{x(tick):.1f} {_AXIS}v5", "axis"), _text(x(tick), _AXIS + 18, f"{tick:g}")]
    parts.append(_text(_WIDTH / 2, _AXIS + 36, "noise \N{LEFTWARDS ARROW} log-SNR, nats \N{RIGHTWARDS ARROW} image"))
    places, marks = [x(level) for level in levels], [_path(f"M{x(levels[-1]):.1f} {_LINE - 8}v16", "axis")]
    widest = max(abs(end - start) for start, end in itertools.pairwise(places)) or 1
    for i, step in enumerate(schedule.steps):
        (start, end), style = places[i : i + 2], styles[step.phase]
        top = _LINE - 20 - 160 * abs(end - start) / widest  # of the control point: the curve rises half as far
        parts.append(
            _path(f"M{start:.1f} {_LINE}Q{(start + end) / 2:.1f} {top:.1f} {end:.1f} {_LINE}", f"arc p{style}")
        )
        title = tag("title", f"step {i + 1}, {step.phase}, timestep {step.timestep:g}, log-SNR {levels[i]:.2f}")
        marks.append(tag("g", title, _path(_MARKS[style], f"p{style}"), transform=f"translate({start:.1f} {_LINE})"))
    rows = [-math.inf, -math.inf]  # where the last label of each ends; one that fits in neither is left to the table
    for label, at in zip([*(str(i + 1) for i in range(len(schedule.steps))), "end"], places, strict=True):
        half = 4.0 * len(label) + 1
        if (row := next((row for row, end in enumerate(rows) if end < at - half), None)) is not None:
            rows[row] = at + half
            parts.append(_text(at, _LINE + 22 + 13 * row, label))
    runs = [f"{len(list(run))} of {phase}" for phase, run in itertools.groupby(step.phase for step in schedule.steps)]
    description = tag("desc", f"From {levels[0]:.2f} to {levels[-1]:.2f} nats. Steps: {', then '.join(runs)}.")
    titles = (tag("title", f"Schedule {name} over log-SNR"), description)
    svg = tag("svg", *titles, *parts, *marks, role="img", viewBox=f"0 0 {_WIDTH} {_AXIS + 42}")
    keys = [key(phase, styles) for phase in dict.fromkeys(step.phase for step in schedule.steps)]
    caption = tag("figcaption", *keys, "Marks are steps; an arc leads from each to the next noise level.")
    return tag("figure", tag("div", svg, class_="scroll"), caption, class_="drawing")


def key(phase: str, styles: Mapping[str, int]) -> Html:
    """A phase's name beside its mark."""
    mark = _path(_MARKS[styles[phase]], f"p{styles[phase]}")
    return tag("span", tag("svg", mark, viewBox="-8 -8 16 16", aria_hidden="true"), phase, class_="key")


def _path(data: str, class_: str) -> Html:
    return tag("path", d=data, class_=class_)


def _text(x: float, y: float, text: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}")

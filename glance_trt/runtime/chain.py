"""Graphs that run one after the other, each on what came before: what a pipeline asks of a runner for a whole image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Call:
    """One run of a graph. `inputs` and `outputs` pair its ports with the names of values; a value is given once, from
    outside or by an earlier call."""

    graph: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Chained:
    """What a chain of calls gave: the values that were wanted, and the time that each graph took, milliseconds."""

    values: dict[str, Any]
    milliseconds: dict[str, float]


def needed(calls: Sequence[Call]) -> list[str]:
    """The values that calls take from outside, in order of use."""
    made = {value for call in calls for _, value in call.outputs}
    return list(dict.fromkeys(value for call in calls for _, value in call.inputs if value not in made))


def by_graph(calls: Sequence[Call]) -> Iterator[tuple[Call, ...]]:
    """Cut a chain where the graph changes."""
    for _, group in groupby(calls, key=lambda call: call.graph):
        yield tuple(group)


def in_turn(
    run: Callable[[str, Arrays], Arrays], calls: Sequence[Call], values: Arrays, wanted: Sequence[str]
) -> Chained:
    """Run calls on a backend whose inputs and outputs are arrays of the host."""
    known, milliseconds = dict(values), dict.fromkeys((call.graph for call in calls), 0.0)
    for call in calls:
        start = time.perf_counter()
        results = run(call.graph, {port: known[value] for port, value in call.inputs})
        known |= {value: results[port] for port, value in call.outputs}
        milliseconds[call.graph] += (time.perf_counter() - start) * 1e3
    return Chained({name: known[name] for name in wanted}, milliseconds)

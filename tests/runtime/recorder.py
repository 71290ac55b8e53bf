"""A runner that remembers what it was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from glance_trt.runtime.chain import Call, Chained, in_turn
from glance_trt.runtime.pipeline import Pipeline


class Recorder:
    """Takes the place of a pipeline's runner. `calls`: each graph that ran, with its inputs."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.inner, self.calls = pipeline.runner, list[tuple[str, dict[str, NDArray[Any]]]]()
        pipeline.runner = self

    @property
    def graphs(self) -> list[str]:
        """The graphs that ran, in order."""
        return [graph for graph, _ in self.calls]

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.calls.append((graph, dict(inputs)))
        return self.inner.run(graph, inputs)

    def chain(
        self, calls: Sequence[Call], values: Mapping[str, Any], wanted: Sequence[str], *, on_device: bool = False
    ) -> Chained:
        return in_turn(self.run, calls, values, wanted)

    def close(self) -> None:
        self.inner.close()

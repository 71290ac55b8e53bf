"""Times a bundle, stage by stage, and against the same model and LoRAs run by diffusers. Linux only."""

from __future__ import annotations

import os
import resource
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from numpy.typing import NDArray

from glance_trt import __version__, preflight, recipe
from glance_trt.bundle import Bundle
from glance_trt.duel import Duel, cold_start, peer_name, steady_state
from glance_trt.errors import InputError
from glance_trt.progress import Progress, silent
from glance_trt.prompts import PromptTruncated
from glance_trt.runtime.chain import Call, Chained, in_turn
from glance_trt.runtime.pipeline import Pipeline
from glance_trt.runtime.runners import ChainRunner

PROMPT = "a photograph"
"""Where no recipe gives one."""


@dataclass(frozen=True)
class Stages:
    """Medians of one batch size; milliseconds, wall clock, unless the name says otherwise.

    text_encoder is all text encoders, for one prompt, and decoder for the whole batch. step is by phase, and includes
    overhead_us: the microseconds per step that the pipeline spends outside its runner.
    """

    batch: int
    text_encoder: float
    step: dict[str, float]
    decoder: float
    overhead_us: float


@dataclass(frozen=True)
class Memory:
    """Of the process that ran the stages, MB (10^6 bytes): the peak of its resident memory, and at the end the pages
    that are its own and those that are mapped from files, which processes can share."""

    peak: float
    private: float
    mapped: float


@dataclass(frozen=True)
class Report:
    """What was measured, of what, by what. `peer` names the other side with versions; nothing without one."""

    bundle: str
    bundle_sha256: str
    target: str
    versions: dict[str, str]
    threads: int
    runs: int
    stages: tuple[Stages, ...]
    memory: Memory
    peer: str | None
    duels: tuple[Duel, ...]


def measure(
    bundle: Bundle,
    *,
    against: str | None = None,
    runs: int = 5,
    batches: Sequence[int] = (1, 4),
    threads: int | None = None,
    progress: Progress = silent,
) -> Report:
    """Time a bundle: `runs` times each stage, after one run that is not counted.

    against: the recipe that the bundle was built from, to be run by diffusers too. threads: that each side computes
    with, by default one per core. Raises `InputError`, `TargetError` where a side cannot run here, and what
    `glance_trt.export.inputs.read` does.
    """
    if runs < 1 or not batches or min(batches) < 1:
        raise InputError(f"runs and batches: expected at least 1, got {runs} and {list(batches)}")
    batches = list(dict.fromkeys(batches))
    threads = threads or len(os.sched_getaffinity(0))
    prompt, duels, peer = PROMPT, [], None
    if against:
        # First, before this process grows: see `duel.run_process`.
        peer = peer_name(threads)
        plan, folder = recipe.load_of(against, bundle.manifest.name)
        from glance_trt.export import inputs

        made_from = inputs.read(plan, folder, progress)
        trained = sum(phase.lora is not None for phase in plan.phases)
        needed = preflight.timing(made_from.parts(), made_from.family.components["denoiser"], trained)
        preflight.check_memory(needed, preflight.free_memory())
        prompt = (plan.distill and plan.distill.prompt) or PROMPT
        duels = cold_start(bundle.directory, against, prompt, runs, threads, progress)
        duels += steady_state(bundle.directory, against, prompt, runs, batches, threads, progress)
    with Pipeline.open(bundle, threads=threads) as pipeline:
        target = pipeline.target
        stages = tuple(time_stages(pipeline, prompt, batch, runs, progress) for batch in batches)
        used = memory()
    manifest = bundle.manifest
    versions = {"glance-trt": __version__, **manifest.engines[target].requires}
    return Report(manifest.name, bundle.sha256, target, versions, threads, runs, stages, used, peer, tuple(duels))


class _Stopwatch:
    """A `ChainRunner` that notes the seconds that another one takes, by graph."""

    def __init__(self, runner: ChainRunner) -> None:
        self._runner = runner
        self.seconds: list[tuple[str, float]] = []

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        start = time.perf_counter()
        outputs = self._runner.run(graph, inputs)
        self.seconds.append((graph, time.perf_counter() - start))
        return outputs

    def chain(
        self, calls: Sequence[Call], values: Mapping[str, Any], wanted: Sequence[str], *, on_device: bool = False
    ) -> Chained:
        return in_turn(self.run, calls, values, wanted)

    def close(self) -> None:
        self._runner.close()


def time_stages(pipeline: Pipeline, prompt: str, batch: int, runs: int, progress: Progress = silent) -> Stages:
    """Generate `runs` batches, after one that is not counted.

    Each prompt begins with the numbers of its batch size and run, so that none is cached.
    """
    runner = pipeline.runner
    encoders, watch = pipeline.bundle.manifest.text_encoders(), _Stopwatch(runner)
    pipeline.runner = watch
    stage = f"stages, batch {batch}"
    encoder: list[float] = []
    decoder: list[float] = []
    overhead: list[float] = []
    steps: dict[str, list[float]] = {}
    try:
        for i in range(runs + 1):
            progress(stage, i, runs + 1)
            watch.seconds.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PromptTruncated)
                results = list(pipeline.steps(f"{batch}.{i} {prompt}", seed=i, count=batch))
            pipeline.decode(results[-1].latents)
            if i == 0:
                continue
            engines = [seconds * 1e3 for graph, seconds in watch.seconds if graph.startswith("denoiser.")]
            encoder.append(sum(seconds * 1e3 for graph, seconds in watch.seconds if graph in encoders))
            decoder += [seconds * 1e3 for graph, seconds in watch.seconds if graph == "decoder"]
            for result, engine in zip(results, engines, strict=True):
                steps.setdefault(result.phase, []).append(result.milliseconds)
                overhead.append((result.milliseconds - engine) * 1e3)
    finally:
        pipeline.runner = runner
    progress(stage, runs + 1, runs + 1)
    by_phase = {phase: median(times) for phase, times in steps.items()}
    return Stages(batch, median(encoder), by_phase, median(decoder), median(overhead))


def memory() -> Memory:
    """This process's. Linux only."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return Memory(peak, fields["Private_Dirty"], fields["Shared_Clean"] + fields["Private_Clean"])

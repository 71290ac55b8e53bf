"""Times a bundle, stage by stage, and against the same model and LoRAs run by diffusers.

The comparison runs both sides in processes of their own, in turns (A B A B), so that whatever else the machine does
meets both alike, and takes the ratio pair by pair. Linux only, as far as memory goes.

``python -m glance_trt.bench BUNDLE TARGET THREADS`` is this package's side in the steady state;
``python -m glance_trt.export.reference`` is the peer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import IO, Any

from numpy.typing import NDArray

from glance_trt import recipe
from glance_trt.bundle import Bundle
from glance_trt.errors import GlanceError, InputError, TargetError
from glance_trt.progress import Progress, silent
from glance_trt.runtime.pipeline import Pipeline
from glance_trt.runtime.runners import Runner

PROMPT = "a photograph"
"""Where no recipe gives one."""

_BLOCK = 0.5
"""Seconds that a block of the steady state should take at least: short, so that the sides take turns often."""

_GENERATE = "from glance_trt.cli.main import main; main()"


@dataclass(frozen=True)
class Stages:
    """Medians of one batch size; milliseconds, wall clock, unless the name says otherwise.

    text_encoder is for one prompt and decoder for the whole batch. step is by phase, and includes overhead_us: the
    microseconds per step that the runtime spends outside the engine.
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
class Duel:
    """One quantity of both sides: medians, and the median over the pairs of how many times better glance-trt is."""

    quantity: str
    unit: str
    glance_trt: float
    peer: float
    ratio: float
    pairs: tuple[tuple[float, float], ...]
    """(glance-trt, peer), in the order in which they were measured."""


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

    against: the recipe that the bundle was built from, to be run by diffusers too. threads: that both sides compute
    with, by default one per core. Raises `InputError`, and `TargetError` where a side cannot run here.
    """
    if runs < 1 or not batches or min(batches) < 1:
        raise InputError(f"runs and batches: expected at least 1, got {runs} and {list(batches)}")
    threads = threads or len(os.sched_getaffinity(0))
    prompt, duels, peer = PROMPT, [], None
    if against:
        # First, because a process's peak memory is never less than its parent's was when it started.
        peer = _peer(threads)
        plan, _ = recipe.load(against)
        prompt = plan.distill.prompt if plan.distill else PROMPT
        duels = _cold(bundle, against, prompt, runs, threads, progress)
        duels += _steady(bundle, against, prompt, runs, batches, threads, progress)
    with Pipeline.open(bundle, threads=threads) as pipeline:
        target = pipeline.target
        stages = tuple(time_stages(pipeline, prompt, batch, runs, progress) for batch in batches)
        memory = _memory()
    manifest = bundle.manifest
    versions = {"glance-trt": manifest.provenance.tools.get("glance-trt", "unknown")}
    versions = {"glance-trt": metadata.version("glance-trt"), **manifest.engines[target].requires}
    return Report(manifest.name, bundle.sha256, target, versions, threads, runs, stages, memory, peer, tuple(duels))


class _Stopwatch:
    """A `Runner` that notes the seconds that another one takes, by graph."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.seconds: list[tuple[str, float]] = []

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        start = time.perf_counter()
        outputs = self._runner.run(graph, inputs)
        self.seconds.append((graph, time.perf_counter() - start))
        return outputs

    def close(self) -> None:
        self._runner.close()


def time_stages(pipeline: Pipeline, prompt: str, batch: int, runs: int, progress: Progress = silent) -> Stages:
    """Generate `runs` batches, after one that is not counted. Each has a prompt of its own, so that none is cached."""
    runner = pipeline.runner
    watch = _Stopwatch(runner)
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
            results = list(pipeline.steps(f"{i} {prompt}", seed=i, count=batch))
            pipeline.decode(results[-1].latents)
            if i == 0:
                continue
            engines = [seconds * 1e3 for graph, seconds in watch.seconds if graph.startswith("denoiser.")]
            encoder += [seconds * 1e3 for graph, seconds in watch.seconds if graph == "text_encoder"]
            decoder += [seconds * 1e3 for graph, seconds in watch.seconds if graph == "decoder"]
            for result, engine in zip(results, engines, strict=True):
                steps.setdefault(result.phase, []).append(result.milliseconds)
                overhead.append((result.milliseconds - engine) * 1e3)
    finally:
        pipeline.runner = runner
    progress(stage, runs + 1, runs + 1)
    by_phase = {phase: median(times) for phase, times in steps.items()}
    return Stages(batch, median(encoder), by_phase, median(decoder), median(overhead))


def _memory() -> Memory:
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return Memory(peak, fields["Private_Dirty"], fields["Shared_Clean"] + fields["Private_Clean"])


# --- against the peer ---


def _peer(threads: int) -> str:
    """The peer's name, with versions. Raises `TargetError` if it is not installed."""
    needed = ("diffusers", "torch", "peft", "transformers")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise TargetError(f"--against needs {', '.join(missing)}, not installed here; pip install glance-trt[distill]")
    return ", ".join([*(f"{name} {metadata.version(name)}" for name in needed[:3]), f"{threads} threads"])


def _cold(
    bundle: Bundle, against: str, prompt: str, runs: int, threads: int, progress: Progress
) -> list[Duel]:
    """Whole processes, from nothing to one image on the disk."""
    pairs = []
    with tempfile.TemporaryDirectory(prefix="glance-bench-") as folder:
        options = ["--seed", "0", "--threads", str(threads), "--overwrite", "-o", f"{folder}/ours.png"]
        ours = [sys.executable, "-c", _GENERATE, "generate", str(bundle.directory), prompt, *options]
        peer = [sys.executable, "-m", "glance_trt.export.reference", against, prompt, "0", f"{folder}/peer.png"]
        for i in range(runs + 1):
            progress("cold start", i, runs + 1)
            pairs.append((_process(ours, threads), _process(peer, threads)))
    progress("cold start", runs + 1, runs + 1)
    del pairs[0]  # the warm-up: the files were not in the page cache
    return [
        _duel("cold start to one image", "s", [(a[0], b[0]) for a, b in pairs]),
        _duel("peak memory, one image", "MB", [(a[1], b[1]) for a, b in pairs]),
    ]


def _process(command: Sequence[str], threads: int) -> tuple[float, float]:
    """Seconds and peak resident memory (MB) of a process."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(threads))
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise _ended(command, child.returncode, log)
    return seconds, usage.ru_maxrss * 1024 / 1e6


def _steady(
    bundle: Bundle, against: str, prompt: str, runs: int, batches: Sequence[int], threads: int, progress: Progress
) -> list[Duel]:
    """Images per second of two processes that live on, in alternating blocks."""
    target = ""
    ours = [sys.executable, "-m", "glance_trt.bench", str(bundle.directory), str(threads)]
    peer = [sys.executable, "-m", "glance_trt.export.reference", against]
    duels = []
    with _Side(ours, threads) as a, _Side(peer, threads) as b:
        for batch in batches:
            stage = f"steady state, batch {batch}"
            progress(stage, 0, runs + 1)
            for side in (a, b):
                side.seconds(f"warm-up {prompt}", 0, batch)
            usual = min(side.seconds(f"warmed up {prompt}", 0, batch) for side in (a, b))
            repeats = max(1, round(_BLOCK / usual))
            pairs = []
            for i in range(1, runs + 1):
                progress(stage, i, runs + 1)
                pair = [0.0, 0.0]
                for j, side in enumerate((a, b)):
                    for k in range(repeats):
                        pair[j] += side.seconds(f"{i * repeats + k} {prompt}", i, batch)
                pairs.append((batch * repeats / pair[0], batch * repeats / pair[1]))
            progress(stage, runs + 1, runs + 1)
            duels.append(_duel(f"steady state, batch {batch}", "images/s", pairs))
    return duels


class _Side:
    """A process that generates batches, one per line of JSON that it reads, and answers with seconds."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self._command = command
        self._log = tempfile.TemporaryFile()
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._log, env=_environment(threads), text=True
        )

    def seconds(self, prompt: str, seed: int, count: int) -> float:
        """For one batch of `count` images, whose seeds begin with `seed`, in the child's own wall clock."""
        assert self._child.stdin and self._child.stdout
        try:
            self._child.stdin.write(json.dumps({"prompt": prompt, "seeds": list(range(seed, seed + count))}) + "\n")
            self._child.stdin.flush()
            return float(self._child.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise _ended(self._command, self._child.wait(), self._log) from None

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._child.kill()
        with self._log, self._child:
            pass


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _ended(command: Sequence[str], code: int, log: IO[bytes]) -> GlanceError:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines() or [f"it ended with code {code}"]
    return TargetError(f"{' '.join(command[1:4])}: {lines[-1]}")


def _duel(quantity: str, unit: str, pairs: Sequence[tuple[float, float]]) -> Duel:
    """A rate is better where it is higher, anything else where it is lower."""
    ratios = [a / b if unit.endswith("/s") else b / a for a, b in pairs]
    ours, peers = (median(side) for side in zip(*pairs, strict=True))
    return Duel(quantity, unit, ours, peers, median(ratios), tuple(pairs))


def _serve(bundle: str, threads: str) -> None:
    with Pipeline.open(bundle, threads=int(threads)) as pipeline:
        for line in sys.stdin:
            request = json.loads(line)
            seeds, start = request["seeds"], time.perf_counter()
            pipeline.generate(request["prompt"], seed=seeds[0], count=len(seeds), batch_size=len(seeds))
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])

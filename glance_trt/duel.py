"""Runs this package and a peer, diffusers, in turns: A B A B.

Each side is a process of its own. Whatever else the machine does meets both alike, and ratios are taken pair by pair.

``python -m glance_trt.duel BUNDLE THREADS`` is this package's side of the steady state, and
``python -m glance_trt.export.reference`` the peer of both comparisons.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import IO, Any

from glance_trt.errors import GlanceError, TargetError
from glance_trt.progress import Progress
from glance_trt.runtime.pipeline import Pipeline

_GENERATE = ("-c", "from glance_trt.cli.main import main; main()")
_PEER = ("-m", "glance_trt.export.reference")

_BLOCK = 0.5
"""Seconds that a block of the steady state should take at least: short, so that the sides take turns often."""


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


def peer_name(threads: int) -> str:
    """The peer's name, with versions. Raises `TargetError` if it is not installed."""
    needed = ("diffusers", "torch", "peft", "transformers")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise TargetError(f"--against needs {', '.join(missing)}, not installed here; pip install glance-trt[distill]")
    return ", ".join([*(f"{name} {metadata.version(name)}" for name in needed[:3]), f"{threads} threads"])


def cold_start(bundle: Path, against: str, prompt: str, runs: int, threads: int, progress: Progress) -> list[Duel]:
    """Whole processes, from nothing to one image on the disk; a first pair is not counted.

    bundle: its folder. against: the recipe that it was built from. threads: of each side.
    """
    pairs = []
    with tempfile.TemporaryDirectory(prefix="glance-bench-") as folder:
        options = ["--seed", "0", "--threads", str(threads), "--overwrite", "-o", f"{folder}/ours.png"]
        ours = [sys.executable, *_GENERATE, "generate", str(bundle), prompt, *options]
        peer = [sys.executable, *_PEER, against, prompt, "0", f"{folder}/peer.png"]
        for i in range(runs + 1):
            progress("cold start", i, runs + 1)
            pairs.append((run_process(ours, threads), run_process(peer, threads)))
    progress("cold start", runs + 1, runs + 1)
    del pairs[0]  # the warm-up: the files were not in the page cache
    return [
        _duel("cold start to one image", "s", [(a[0], b[0]) for a, b in pairs]),
        _duel("peak memory, one image", "MB", [(a[1], b[1]) for a, b in pairs]),
    ]


def run_process(command: Sequence[str], threads: int) -> tuple[float, float]:
    """Run a process to its end: seconds, wall clock, and its peak resident memory, MB, or that of one it started.

    The peak is never less than this process's own, which the kernel counts until the child has begun its program.
    Raises `TargetError` with the last line of its output where it fails.
    """
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment(threads))
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise _ended(command, child.returncode, log)
    return seconds, usage.ru_maxrss * 1024 / 1e6


def steady_state(
    bundle: Path, against: str, prompt: str, runs: int, batches: Sequence[int], threads: int, progress: Progress
) -> list[Duel]:
    """Images per second of processes that live on, in alternating blocks; arguments as in `cold_start`.

    The peer runs twice: with LoRAs that it switches, as they are, and with a UNet per phase, its LoRA fused in. That is
    faster, at the cost of memory. Each prompt begins with numbers of its own, so that none is cached.
    """
    ours = [sys.executable, "-m", "glance_trt.duel", str(bundle), str(threads)]
    peer = [sys.executable, *_PEER, against]
    duels = []
    with _side(ours, threads) as a, _side(peer, threads) as b, _side([*peer, "--fused"], threads) as c:
        sides = (a, b, c)
        for batch in batches:
            stage = f"steady state, batch {batch}"
            progress(stage, 0, runs + 1)
            for side in sides:
                side.seconds(f"{batch} {prompt}", 0, batch)
            usual = min(side.seconds(f"{batch}.0 {prompt}", 0, batch) for side in sides)
            repeats = max(1, round(_BLOCK / usual))
            rates = []
            for i in range(1, runs + 1):
                progress(stage, i, runs + 1)
                prompts = [f"{batch}.{i * repeats + k} {prompt}" for k in range(repeats)]
                rates.append(
                    [batch * repeats / sum(side.seconds(text, i, batch) for text in prompts) for side in sides]
                )
            progress(stage, runs + 1, runs + 1)
            duels.append(_duel(stage, "images/s", [(rate[0], rate[1]) for rate in rates]))
            duels.append(_duel(f"{stage}, fused peer", "images/s", [(rate[0], rate[2]) for rate in rates]))
    return duels


@dataclass(frozen=True)
class _Side:
    """A process that generates batches, one per line of JSON that it reads, and answers with seconds."""

    child: subprocess.Popen[str]
    log: IO[bytes]

    def seconds(self, prompt: str, seed: int, count: int) -> float:
        """For one batch of `count` images, whose seeds begin with `seed`, by the child's own wall clock."""
        assert self.child.stdin and self.child.stdout
        request = {"prompt": prompt, "seeds": list(range(seed, seed + count))}
        with contextlib.suppress(BrokenPipeError):  # of a child that is dead already; its log says why
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
        if not (answer := self.child.stdout.readline()):
            raise _ended(self.child.args, self.child.wait(), self.log)
        return float(answer)


@contextlib.contextmanager
def _side(command: Sequence[str], threads: int) -> Iterator[_Side]:
    pipe, variables = subprocess.PIPE, environment(threads)
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=variables, text=True)
        try:
            yield _Side(child, log)
        finally:
            child.kill()
            with contextlib.suppress(BrokenPipeError):  # of a request that the child did not read
                child.communicate()


def environment(threads: int) -> dict[str, str]:
    """A process's, in which libraries compute with so many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _ended(command: Any, code: int, log: IO[bytes]) -> GlanceError:
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

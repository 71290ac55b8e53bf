"""What the benchmarks of builds share: stages in processes of their own, and a table of figures with limits."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glance_trt.duel import run_process


@dataclass(frozen=True)
class Figure:
    """A measured value, and the most that it may be, if there is such a limit."""

    what: str
    value: float
    unit: str
    limit: float | None = None


def run_stage(script: str, work: Path, stage: tuple[str, ...], *options: str) -> tuple[float, float, Any]:
    """Seconds, peak memory in MB, and what a stage of `script` returns, which it writes to --figures."""
    print(" ".join(stage), file=sys.stderr, flush=True)
    figures = work / "figures.json"
    command = [sys.executable, script, "--stage", *stage, "--work", str(work), "--figures", str(figures), *options]
    seconds, peak = run_process(command, len(os.sched_getaffinity(0)))
    return seconds, peak, json.loads(figures.read_text())


def show(figures: Iterable[Figure], *, limited: bool) -> int:
    """Print figures as they come, and return 1 if one is beyond its limit. limited: whether limits hold."""
    broken = False
    print(f"{'':<44}{'measured':>11}{'':<5}{'limit':>7}")
    for figure in figures:
        limit = figure.limit if limited else None
        over = limit is not None and figure.value > limit
        broken |= over
        shown = f"{'' if limit is None else f'{limit:g}':>7}{'  BROKEN' if over else ''}"
        print(f"{figure.what:<44}{figure.value:>11.2f} {figure.unit:<4}{shown}".rstrip(), flush=True)
    return int(broken)

"""Progress on stderr: bars on a terminal, and lines elsewhere, for logs.

What counts appears after two seconds, what does not at once.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import click

from glance_trt.progress import Progress

_DELAY = 2.0  # seconds
_INTERVAL = 60.0  # seconds between the lines of a stage


@contextlib.contextmanager
def bars() -> Iterator[Progress]:
    """A `Progress` that draws one bar at a time, and cleans up behind itself."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from tqdm import tqdm

    current: dict[str, tqdm[NoReturn]] = {}

    def report(stage: str, done: float, total: float) -> None:
        if stage not in current:
            close()
            large = total > 1 << 20  # a count of bytes
            current[stage] = tqdm(
                desc=stage,
                total=total,
                delay=_DELAY if total > 1 else 0,
                file=sys.stderr,
                leave=False,
                unit="B" if large else "",
                unit_scale=large,
                bar_format="{l_bar}{bar}| {elapsed}<{remaining}" if total <= 1 else None,
            )
        current[stage].update(done - current[stage].n)
        if done >= total:
            close()

    def close() -> None:
        while current:
            current.popitem()[1].close()

    try:
        yield report
    finally:
        close()


class _Lines:
    """A line when a stage has begun, and one a minute while it goes on."""

    def __init__(self) -> None:
        self._stage, self._due = "", 0.0

    def __call__(self, stage: str, done: float, total: float) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._due = stage, now + (_DELAY if total > 1 else 0)
        if done < total and now >= self._due:
            self._due = now + _INTERVAL
            click.echo(f"{stage} {100 * done / total:.0f} %" if done else stage, err=True)


def echo(line: str | bytes) -> None:
    """Print a line to stdout; a bar that is on the same terminal makes way for it."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        click.echo(line)

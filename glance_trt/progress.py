"""How long-running library functions report: they call back, they never print."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with a stage's name, how much is done, and of how much (the unit is the stage's own).

    The first call of a stage has ``done == 0``, its last one ``done == total``.
    """

    def __call__(self, stage: str, done: float, total: float) -> None: ...


def silent(stage: str, done: float, total: float) -> None:
    """Reports nothing."""

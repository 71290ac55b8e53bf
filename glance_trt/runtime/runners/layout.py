"""Where values lie in one block of memory, so that what is never alive together shares its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 256
"""Bytes; what CUDA's own allocations are aligned to, and TensorRT asks of every address."""


@dataclass(frozen=True)
class Life:
    """A value's size in bytes, and the first and the last moment at which it is used, both included."""

    nbytes: int
    first: int
    last: int


def aligned(nbytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def in_line(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offsets for values of these sizes, one behind the other, and the size of the whole; bytes."""
    offsets, end = {}, 0
    for name, nbytes in sizes.items():
        offsets[name] = end
        end += aligned(nbytes)
    return offsets, end


def shared(lives: Mapping[str, Life]) -> tuple[dict[str, int], int]:
    """The same where values whose lives do not meet may lie in one place: each at the lowest offset that is free."""
    offsets: dict[str, int] = {}
    for name, life in lives.items():
        taken = sorted(
            (offsets[other], offsets[other] + aligned(lives[other].nbytes))
            for other in offsets
            if lives[other].first <= life.last and life.first <= lives[other].last
        )
        offsets[name] = _first_gap(taken, aligned(life.nbytes))
    return offsets, max((offset + aligned(lives[name].nbytes) for name, offset in offsets.items()), default=0)


def _first_gap(taken: Sequence[tuple[int, int]], nbytes: int) -> int:
    place = 0
    for start, end in taken:
        if place + nbytes <= start:
            break
        place = max(place, end)
    return place

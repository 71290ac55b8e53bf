from __future__ import annotations

import random

from glance_trt.runtime.runners.layout import ALIGNMENT, Life, aligned, in_line, shared


def test_values_in_line_do_not_overlap_and_are_aligned() -> None:
    assert in_line({"a": 1, "b": 256, "c": 257}) == ({"a": 0, "b": 256, "c": 512}, 1024)
    assert in_line({}) == ({}, 0)


def test_the_latents_of_many_steps_need_two_places() -> None:
    lives = {f"latents.{i}": Life(1000, i, i + 1) for i in range(50)}
    offsets, total = shared(lives)
    assert total == 2048
    assert [offsets[f"latents.{i}"] for i in range(4)] == [0, 1024, 0, 1024]


def test_values_whose_lives_meet_never_overlap() -> None:
    draw = random.Random(0)
    for _ in range(200):
        lives = {}
        for name in range(20):
            first = draw.randrange(10)
            lives[str(name)] = Life(draw.randrange(1, 2000), first, first + draw.randrange(5))
        offsets, total = shared(lives)
        for a, one in lives.items():
            assert offsets[a] % ALIGNMENT == 0
            assert offsets[a] + one.nbytes <= total <= sum(aligned(life.nbytes) for life in lives.values())
            for b, other in lives.items():
                if a < b and one.first <= other.last and other.first <= one.last:
                    assert offsets[a] + one.nbytes <= offsets[b] or offsets[b] + other.nbytes <= offsets[a]

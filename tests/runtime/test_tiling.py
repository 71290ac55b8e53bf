"""Tiles cover an image with as much overlap as was asked for; where they overlap, their pixels are blended linearly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from glance_trt.runtime import tiling

from ..models import rich

RNG = np.random.default_rng(0)
CASES = [(64, 64, 0), (65, 64, 0), (65, 64, 16), (96, 64, 32), (100, 64, 32), (200, 64, 63), (129, 32, 4), (33, 32, 31)]


@pytest.mark.parametrize(("length", "side", "overlap"), CASES)
def test_tiles_cover_an_axis_and_are_as_few_as_may_be(length: int, side: int, overlap: int) -> None:
    tiles = tiling.spans(length, side, overlap)
    assert tiles[0][0] == 0
    assert tiles[-1][1] == length
    assert {end - start for start, end in tiles} == {min(side, length)}
    shared = [tiles[i][1] - tiles[i + 1][0] for i in range(len(tiles) - 1)]
    assert all(overlap <= pixels < side for pixels in shared)
    assert len(tiles) == 1 or side + (len(tiles) - 2) * (side - overlap) < length, "one less would not do"
    assert max(shared, default=0) - min(shared, default=0) <= 1


@pytest.mark.parametrize(("length", "side", "overlap"), CASES)
def test_weights_are_1_in_all_and_linear_over_an_overlap_of_two(length: int, side: int, overlap: int) -> None:
    tiles = tiling.spans(length, side, overlap)
    total, count = np.zeros(length), np.zeros(length, int)
    for (start, end), weight in zip(tiles, tiling.weights(tiles), strict=True):
        assert weight.dtype == np.float32
        assert (weight > 0).all()
        total[start:end] += weight
        count[start:end] += 1
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-6)
    if len(tiles) > 1 and count.max() == 2:
        pixels = tiles[0][1] - tiles[1][0]
        falling = tiling.weights(tiles)[0][len(count[: tiles[1][0]]) :]
        np.testing.assert_allclose(falling, 1 - (np.arange(pixels) + 0.5) / max(pixels, 1), rtol=0, atol=1e-6)


def test_tiles_lie_where_the_format_says() -> None:
    # docs/bundle-format.md: m = ceil((L - S) / (S - O)), starts at floor(i * (L - S) / m + 1/2)
    assert tiling.spans(20, 8, 2) == [(0, 8), (6, 14), (12, 20)]
    assert tiling.spans(21, 8, 2) == [(0, 8), (4, 12), (9, 17), (13, 21)]
    assert tiling.spans(7, 8, 2) == [(0, 7)]


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
@pytest.mark.parametrize(("side", "overlap"), [(64, 0), (64, 2), (64, 16), (64, 62), (16, 6)])
def test_a_constant_image_stays_constant(value: int, side: int, overlap: int) -> None:
    def decode(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        _, _, h, w = latents.shape
        return np.full((1, 2 * h, 2 * w, 3), value, np.uint8)

    latents = np.zeros((2, 4, 75, 41), np.float32)
    found = tiling.decode(latents, decode, scale=2, side=side, overlap=overlap)
    assert (found.shape, found.dtype) == ((2, 150, 82, 3), np.uint8)
    assert (found == value).all()


def test_a_local_decoder_gives_the_whole_image_away_from_the_edges_of_tiles() -> None:
    latents = RNG.normal(size=(2, 3, 40, 17)).astype(np.float32)
    whole = rich.decode(latents)
    found = tiling.decode(latents, rich.decode, scale=2, side=24, overlap=8)
    near = np.zeros(whole.shape[1:3], bool)
    for axis, length in enumerate((40, 17)):
        for start, end in tiling.spans(length, 12, 4):
            for edge in {start, end} - {0, length}:
                # The decoder sees one latent around: only the latents on both sides of an edge may differ.
                near[(slice(None),) * axis + (slice(2 * edge - 2, 2 * edge + 2),)] = True
    assert 0.3 < near.mean() < 0.9
    np.testing.assert_array_equal(found[:, ~near], whole[:, ~near])
    assert (found != whole).any()
    # There, each is a mean of the whole image's value and one that lacks a third or more of what is around.
    exact = np.abs(found.astype(int) - whole).max()
    assert 0 < exact < 128


def test_a_decoder_that_sees_nothing_around_gives_the_whole_image() -> None:
    pixels = RNG.integers(0, 256, (1, 3, 50, 70)).astype(np.float32)

    def decode(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        return latents.transpose(0, 2, 3, 1).astype(np.uint8)

    for side, overlap in [(16, 0), (16, 5), (16, 15), (49, 1), (64, 32)]:
        found = tiling.decode(pixels, decode, scale=1, side=side, overlap=overlap)
        np.testing.assert_array_equal(found, decode(pixels))


def test_two_tiles_that_differ_are_blended_linearly_and_rounded_once() -> None:
    tiles = iter([0, 200])

    def decode(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        return np.full((1, latents.shape[2], latents.shape[3], 3), next(tiles), np.uint8)

    found = tiling.decode(np.zeros((1, 1, 1, 12), np.float32), decode, scale=1, side=8, overlap=4)
    expected = [0, 0, 0, 0, 25, 75, 125, 175, 200, 200, 200, 200]  # 200 * (k + 1/2) / 4
    assert found[0, 0, :, 0].tolist() == expected


def test_tiles_are_decoded_one_by_one_and_none_is_larger_than_it_may_be() -> None:
    shapes: list[Any] = []

    def decode(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        shapes.append(latents.shape)
        return rich.decode(latents)

    tiling.decode(np.zeros((2, 3, 40, 7), np.float32), decode, scale=2, side=24, overlap=8)
    assert shapes == [(1, 3, 12, 7)] * 2 * len(tiling.spans(40, 12, 4))

"""Latents to pixels in overlapping tiles, for images that are too large to be decoded whole.

A decoder sees its surroundings, so a tile is not what the whole image would be there: seams are blended, not exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]
"""Start and end of a tile along one axis."""


def decode(
    latents: NDArray[np.float32],
    decode_tile: Callable[[NDArray[np.float32]], NDArray[np.uint8]],
    *,
    scale: int,
    side: int,
    overlap: int,
) -> NDArray[np.uint8]:
    """Decode images tile by tile, and blend the pixels linearly where tiles overlap.

    Args:
        latents: [B, C, h, w].
        decode_tile: gives the pixels [1, height, width, 3] of latents [1, C, height / scale, width / scale].
        scale: pixels per latent, along each side.
        side, overlap: of a tile, pixels, multiples of `scale`. An axis that is shorter than a tile is not cut.

    Returns:
        A new array [B, h * scale, w * scale, 3]. Beside it, memory holds one image in float32, and one tile.
    """
    height, width = (length * scale for length in latents.shape[2:])
    rows, columns = (spans(length // scale, side // scale, overlap // scale) for length in (height, width))
    found = np.empty((len(latents), height, width, 3), np.uint8)
    for i, image in enumerate(found):
        blended = np.zeros(image.shape, np.float32)
        for (top, bottom), down in _weighed(rows, scale):
            for (left, right), across in _weighed(columns, scale):
                tile = decode_tile(latents[i : i + 1, :, top:bottom, left:right])[0]
                place = blended[top * scale : bottom * scale, left * scale : right * scale]
                place += tile * (down[:, None] * across)[..., None]
        np.rint(blended, out=blended)
        image[:] = blended
    return found


def spans(length: int, side: int, overlap: int) -> list[Span]:
    """Tiles that cover an axis: as few as may be, all of one size, evenly spread, each with at least `overlap` of the
    one before."""
    if length <= side:
        return [(0, length)]
    last = -(-(length - side) // (side - overlap))  # rounded up
    starts = [(2 * i * (length - side) + last) // (2 * last) for i in range(last + 1)]
    return [(start, start + side) for start in starts]


def weights(tiles: Sequence[Span]) -> list[NDArray[np.float32]]:
    """What the pixels of each tile along an axis are multiplied with: linear over an overlap, and 1 in all."""
    total = np.zeros(tiles[-1][1])
    ramps = []
    for i, (start, end) in enumerate(tiles):
        place = np.arange(start, end) + 0.5
        ramp = np.ones(end - start)
        if i and (overlap := tiles[i - 1][1] - start):
            ramp = np.minimum(ramp, (place - start) / overlap)
        if i + 1 < len(tiles) and (overlap := end - tiles[i + 1][0]):
            ramp = np.minimum(ramp, (end - place) / overlap)
        ramps.append(ramp)
        total[start:end] += ramp
    # Two tiles make 1 already; where a third reaches the place, for the overlap is half a tile or more, they do not.
    return [(ramp / total[start:end]).astype(np.float32) for ramp, (start, end) in zip(ramps, tiles, strict=True)]


def _weighed(tiles: Sequence[Span], scale: int) -> Iterator[tuple[Span, NDArray[np.float32]]]:
    return zip(tiles, weights([(start * scale, end * scale) for start, end in tiles]), strict=True)

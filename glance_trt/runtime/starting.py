"""What denoising starts from: noise alone, or an image's latents with noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from glance_trt.errors import InputError
from glance_trt.runtime.noise import Generator, check_seed, randn

Latents = NDArray[np.float32]
"""[B, C, h, w]"""


def seeds_from(seed: int, count: int) -> list[int]:
    """The seeds of `count` images, the first of which has `seed`. Raises `InputError`."""
    if not isinstance(count, (int, np.integer)) or count < 1:
        raise InputError(f"count: expected a whole number, at least 1, got {count!r}")
    first = check_seed(seed)
    check_seed(first + int(count) - 1)
    return list(range(first, first + int(count)))


def from_noise(shape: Sequence[int], seeds: Sequence[int]) -> Latents:
    """The noise of images, each that of its own seed: [1, *shape] as the first draw of its `Generator`.

    Args:
        shape: of one image's latents, [C, h, w].

    Returns:
        A new array [B, C, h, w], of unit variance (a schedule's initial noise scale is not applied).
    """
    return np.stack([randn(shape, seed) for seed in seeds])


def from_image(
    encode: Callable[[Latents | None], Latents],
    shape: Sequence[int],
    seeds: Sequence[int],
    mix: Sequence[float],
    *,
    posterior: bool,
) -> Latents:
    """An image's latents with noise, as pipelines of diffusers draw it: of each seed's generator first the noise of the
    posterior, which the autoencoder's sample is made with, then that of the start.

    Args:
        encode: gives the image's latents [1, C, h, w], sampled with noise of that shape.
        shape: of one image's latents, [C, h, w].
        mix: what the latents and what the noise are multiplied with.
        posterior: whether `encode` takes noise; where not, none is drawn for it.

    Returns:
        A new array [B, C, h, w].
    """
    signal, level = (np.float32(number) for number in mix)
    found = []
    for seed in seeds:  # one by one, so that an image is the same whatever the batch
        generator = Generator(seed)
        encoded = encode(generator.randn((1, *shape)) if posterior else None)
        found.append(signal * encoded + level * generator.randn((1, *shape)))
    return np.concatenate(found)

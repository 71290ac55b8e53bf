"""Gaussian noise as PyTorch's CPU generator draws it, without PyTorch: a seed means the same noise as in diffusers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from glance_trt.errors import InputError

SEED_MIN = -(2**63)
SEED_MAX = 2**64 - 1

_BLOCK = 16  # PyTorch's vectorised Box-Muller works on blocks of 16: 8 values for the radius, 8 for the angle


class Generator:
    """Draws as `torch.Generator("cpu").manual_seed(seed)` does, one draw after the other.

    The bits are those of MT19937 seeded with the low 32 bits of `seed`, as in PyTorch. What is left is the rounding
    of log, sine and cosine. It stays below 1e-6 (over 8.4e7 values) against PyTorch on x86 with AVX2 or AVX-512;
    PyTorch without them rounds the angle otherwise and differs from itself as much as from this, by up to 2.5e-6.
    Draws of fewer than 16 values are equal to the bit.

    Args:
        seed: from -2**63 to 2**64 - 1, the range that `torch.Generator.manual_seed` takes.

    Raises:
        InputError: `seed` is not an integer in that range.
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(check_seed(seed) & 0xFFFFFFFF)  # legacy seeding: PyTorch's init_genrand
        self._left: NDArray[np.float64] = np.empty(0)

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next draw of standard normal noise, equal to `torch.randn(shape, generator=...)`.

        Args:
            shape: any shape; the values fill it in C order.

        Returns:
            A new array [*shape] float32.
        """
        size = math.prod(shape)
        values = _randn_blocks(self._words, size) if size >= _BLOCK else self._randn_short(size)
        return values.reshape(shape)

    def _randn_short(self, size: int) -> NDArray[np.float32]:
        """Draw `size` < 16 values one by one: Box-Muller in float64 on 53-bit uniforms, cosine first, then the sine.

        A sine that was not asked for is kept for the next such draw; draws of 16 or more neither take nor drop it.
        """
        pairs = (max(size - len(self._left), 0) + 1) // 2
        high, low = self._words.randint(0, 2**32, (2 * pairs, 2), np.uint32).astype(np.uint64).T
        uniform = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) * 2.0**-53
        angle, radius = 2 * math.pi * uniform[0::2], np.sqrt(-2 * np.log1p(-uniform[1::2]))
        drawn = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
        values = np.concatenate([self._left, drawn])
        self._left = values[size:]
        return values[:size].astype(np.float32)


def randn(shape: Sequence[int], seed: int) -> NDArray[np.float32]:
    """The first draw of a `Generator`."""
    return Generator(seed).randn(shape)


def check_seed(seed: int) -> int:
    """A seed that `Generator` takes, as a Python int. Raises `InputError`."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise InputError(f"seed: got {type(seed).__name__}; a seed is a whole number from {SEED_MIN} to {SEED_MAX}")
    if not SEED_MIN <= int(seed) <= SEED_MAX:
        raise InputError(f"seed: got {seed}; a seed is a whole number from {SEED_MIN} to {SEED_MAX}")
    return int(seed)


def _randn_blocks(words: np.random.RandomState, size: int) -> NDArray[np.float32]:
    """Draw `size` >= 16 values: one 24-bit uniform each, then Box-Muller in float32 over blocks of 16.

    Where 16 does not divide `size`, the last 16 values are drawn anew, over the tail of the last whole block.
    """
    tail = size % _BLOCK
    uniform = _uniform24(words, size + (_BLOCK if tail else 0))
    if not tail:
        return _box_muller(uniform)
    noise = np.empty(size, np.float32)
    noise[: size - tail] = _box_muller(uniform[: size - tail])
    noise[size - _BLOCK :] = _box_muller(uniform[size:])
    return noise


def _uniform24(words: np.random.RandomState, count: int) -> NDArray[np.float32]:
    """Uniforms in [0, 1) with 24 bits, the precision of float32: the low bits of one 32-bit word each."""
    bits = words.randint(0, 2**32, count, np.uint32) & np.uint32(0xFFFFFF)
    return bits.astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    # All in float32: float64 is nearer to the true values and further from PyTorch's.
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = np.float32(2 * math.pi) * blocks[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)

"""The noise is PyTorch's: against committed draws, and against PyTorch itself."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from glance_trt.errors import InputError
from glance_trt.runtime.noise import Generator, randn

VECTORS = json.loads(Path(__file__).with_name("noise_vectors.json").read_text())


def torch_randn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    import torch

    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


def torch_tolerance() -> float:
    """PyTorch without AVX2 (ARM, too) rounds the angle otherwise and is up to 2.5e-6 from itself with it."""
    import torch

    return 1e-6 if torch.backends.cpu.get_cpu_capability().startswith("AVX") else 3e-6


def test_vectors_cover_both_ends_of_the_seeds_and_sizes_around_16() -> None:
    assert {-(2**63), -1, 0, 2**32 + 7, 2**64 - 1} <= {vector["seed"] for vector in VECTORS}
    assert {1, 5, 15, 16, 17, 31, 32, 100, 1024, 16384} <= {vector["size"] for vector in VECTORS}


@pytest.mark.parametrize("size", sorted({vector["size"] for vector in VECTORS}))
def test_randn_equals_the_recorded_draws_of_torch(size: int) -> None:
    for vector in VECTORS:
        if vector["size"] == size:
            noise = randn([size], vector["seed"])
            np.testing.assert_allclose(noise[vector["index"]], vector["value"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 8, 14, 15, 16, 17, 24, 31, 32, 33, 100, 1000, 16384, 16385, 2**17])
def test_randn_equals_torch_in_every_value(size: int) -> None:
    for seed in (0, 1, 42, 2**32 - 1, 2**32, 2**40 + 3, 2**63 + 11, 2**64 - 1, -1, -(2**32), -(2**63)):
        noise = randn([size], seed)
        assert noise.dtype == np.float32
        np.testing.assert_allclose(noise, torch_randn((size,), seed), rtol=0, atol=torch_tolerance())


@pytest.mark.parametrize("size", range(1, 16))
def test_randn_of_less_than_a_block_equals_torch_to_the_last_place(size: int) -> None:
    for seed in range(50):
        np.testing.assert_array_max_ulp(randn([size], seed), torch_randn((size,), seed), maxulp=1)


def test_randn_fills_any_shape_in_c_order() -> None:
    for shape in [(), (3, 5), (2, 3, 4), (1, 4, 64, 64), (4, 0, 8)]:
        noise = randn(shape, 3)
        assert noise.shape == shape
        np.testing.assert_allclose(noise, torch_randn(shape, 3), rtol=0, atol=torch_tolerance())


def test_randn_takes_numpy_integers_as_seeds() -> None:
    np.testing.assert_array_equal(randn([20], np.uint64(2**63 + 5)), randn([20], 2**63 + 5))
    np.testing.assert_array_equal(randn([20], np.int64(-5)), randn([20], -5))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_torch_refuses_is_refused(seed: int) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        torch_randn((4,), seed)
    text = f"^seed: got {seed}; a seed is a whole number from -9223372036854775808 to 18446744073709551615$"
    with pytest.raises(InputError, match=text):
        randn([4], seed)


@pytest.mark.parametrize(("seed", "kind"), [(1.0, "float"), ("1", "str"), (None, "NoneType"), (True, "bool")])
def test_a_seed_that_is_no_integer_is_refused(seed: object, kind: str) -> None:
    with pytest.raises(InputError, match=f"^seed: got {kind}; a seed is a whole number from "):
        randn([4], seed)  # type: ignore[arg-type]


def test_successive_draws_equal_those_of_one_generator_of_torch() -> None:
    import torch

    choose = random.Random(0)
    for _ in range(100):
        seed = choose.randrange(-(2**63), 2**64)
        theirs, ours = torch.Generator("cpu").manual_seed(seed), Generator(seed)
        for _ in range(8):
            size = choose.choice([0, 1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 33, 100, 1000])
            expected = torch.randn(size, generator=theirs).numpy()
            np.testing.assert_allclose(ours.randn([size]), expected, rtol=0, atol=torch_tolerance(), err_msg=str(seed))


def test_the_second_of_a_pair_of_short_draws_is_kept_over_long_ones() -> None:
    import torch

    theirs, ours = torch.Generator("cpu").manual_seed(5), Generator(5)
    drawn = []
    for size in (5, 32, 0, 1, 17, 2):
        drawn.append(ours.randn([size]))
        np.testing.assert_allclose(drawn[-1], torch.randn(size, generator=theirs), rtol=0, atol=torch_tolerance())
    # Six numbers of three pairs: the sixth came out two draws after the fifth.
    np.testing.assert_array_equal(np.concatenate([drawn[0], drawn[3]]), randn([6], 5))


def test_two_draws_of_latents_are_those_of_diffusers_randn_tensor() -> None:
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    for shape in [(1, 4, 64, 48), (1, 16, 9, 7), (1, 3, 2, 2), (1, 4, 5, 7)]:
        theirs, ours = torch.Generator("cpu").manual_seed(11), Generator(11)
        for _ in range(2):
            expected = randn_tensor(shape, generator=theirs, dtype=torch.float32).numpy()
            np.testing.assert_allclose(ours.randn(shape), expected, rtol=0, atol=torch_tolerance())

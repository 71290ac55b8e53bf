"""The noise is PyTorch's: against committed draws, and against PyTorch itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from glance_trt.errors import InputError
from glance_trt.runtime.noise import initial_latents, randn

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


def test_initial_latents_equal_those_of_diffusers_for_a_list_of_generators() -> None:
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator("cpu").manual_seed(7 + i) for i in range(3)]
    expected = randn_tensor((3, 4, 9, 7), generator=generators).numpy()
    latents = initial_latents((4, 9, 7), 7, 3)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, expected, rtol=0, atol=torch_tolerance())


def test_any_image_of_a_batch_can_be_made_again_from_its_own_seed() -> None:
    batch = initial_latents((4, 8, 8), 2**32 - 2, 4)
    for i in range(4):
        np.testing.assert_array_equal(batch[i : i + 1], initial_latents((4, 8, 8), 2**32 - 2 + i, 1))


def test_initial_latents_refuse_a_batch_that_runs_out_of_seeds() -> None:
    assert initial_latents((4, 8, 8), 2**64 - 2, 2).shape == (2, 4, 8, 8)
    with pytest.raises(InputError, match=f"seed: got {2**64}; a seed is"):
        initial_latents((4, 8, 8), 2**64 - 2, 3)


@pytest.mark.parametrize("count", [0, -1])
def test_initial_latents_refuse_less_than_one_image(count: int) -> None:
    with pytest.raises(InputError, match=f"^count: got {count}; at least 1 image"):
        initial_latents((4, 8, 8), 0, count)

"""The native library's noise is that of PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from glance_trt.runtime.noise import randn

from .abi import Library

VECTORS = json.loads((Path(__file__).parents[1] / "runtime/noise_vectors.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['seed']}-{vector['size']}")
def test_it_is_what_pytorch_gave(native: Library, vector: dict[str, list[float]]) -> None:
    values = native.noise(vector["seed"] % 2**64, vector["size"])
    np.testing.assert_allclose(values[vector["index"]], vector["value"], rtol=0, atol=1e-6)


def test_it_is_torch_randn_for_many_sizes_and_seeds(native: Library) -> None:
    import torch

    for size in (1, 2, 15, 16, 17, 31, 100, 1021, 100_003):
        for seed in (0, 1, 2**32 - 1, 2**32, 2**63 - 1):
            expected = torch.randn(size, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
            np.testing.assert_allclose(native.noise(seed, size), expected, rtol=0, atol=1e-6)


def test_a_million_values_are_those_of_python(native: Library) -> None:
    for seed in range(5):
        np.testing.assert_allclose(native.noise(seed, 1 << 20), randn((1 << 20,), seed), rtol=0, atol=1e-6)

"""Writes noise_vectors.json, a few values of many `torch.randn` draws, for tests that have no PyTorch.

Run `python tests/runtime/make_noise_vectors.py` where PyTorch is installed, on x86 with AVX2 or AVX-512 (PyTorch's
scalar code rounds otherwise, by up to 2.5e-6). The file need not change unless PyTorch changes its generator.
"""

from __future__ import annotations

import json
from pathlib import Path

VECTORS = Path(__file__).with_name("noise_vectors.json")
SEEDS = (0, 1, 7, 2**31, 2**32 - 1, 2**32 + 7, 2**63, 2**64 - 1, -1, -(2**63))
SIZES = (1, 2, 5, 15, 16, 17, 31, 32, 100, 1024, 16384)


def make_vectors() -> list[dict[str, object]]:
    """Draw every seed at every size; keep the ends, and the places where the last, redrawn block of 16 begins."""
    import torch

    vectors: list[dict[str, object]] = []
    for seed in SEEDS:
        for size in SIZES:
            noise = torch.randn(size, generator=torch.Generator("cpu").manual_seed(seed))
            wanted = (0, 1, 8, size // 2, size - 17, size - 16, size - 9, size - 8, size - 1)
            index = sorted({i for i in wanted if 0 <= i < size})
            vectors.append({"seed": seed, "size": size, "index": index, "value": noise[index].tolist()})
    return vectors


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(vector) for vector in make_vectors())
    VECTORS.write_text(f"[\n{lines}\n]\n")

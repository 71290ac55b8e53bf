"""A tiny bundle of every family makes the images that the Python runtime makes, from prompts as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glance_trt.runtime.pipeline import Pipeline

from ..export.families import fidelity
from ..models import flux, qwen_image, sd3, sdxl
from .abi import Library

CLIPPED = {"height": 16, "width": 24, "sizes": [[24, 16]], "from_image": True}
FAMILIES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "stable-diffusion-xl": (sdxl.make, {"height": 16, "width": 16, "sizes": [[24, 16]], "from_image": True}),
    "stable-diffusion-3": (sd3.make, {**CLIPPED, "prompt_tokens": 24}),
    "flux": (flux.make, {**CLIPPED, "prompt_tokens": 24, "guidance": {"mode": "embedded", "scale": 3.5}}),
    "qwen-image": (
        qwen_image.write,
        {"height": 32, "width": 48, "sizes": [[56, 40]], "prompt_tokens": 40, "from_image": True},
    ),
}
WORDS = ["a large red circle", "A small BLUE star", "🔥 and 漢字", "cafe\u0301 left of 12 squares", "x" * 400]


@pytest.fixture(scope="module", params=FAMILIES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make, recipe = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return fidelity.make(make(folder / "model"), folder / "made", **recipe).bundle


@pytest.mark.filterwarnings("ignore:.*longer than the")
def test_fifty_prompts_and_seeds_are_those_of_python(native: Library, bundle: Path) -> None:
    with native.open(bundle, threads=1) as opened, Pipeline.open(bundle, threads=1) as pipeline:
        (height, width) = pipeline.bundle.manifest.image.sizes[0]
        picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        for seed in range(50):
            prompt, wishes, given = f"{seed} {WORDS[seed % len(WORDS)]}", dict[str, Any](), dict[str, Any]()
            if seed % 10 >= 5:
                wishes, given = {"height": height, "width": width}, {"size": (height, width)}
            if seed % 10 >= 8:
                wishes |= {"image": picture, "strength": 0.6}
                given |= {"image": picture, "strength": 0.6}
            (found,) = opened.generate(prompt=prompt, seed=seed, **given)
            (expected,) = pipeline.generate(prompt, seed=seed, **wishes)
            difference = np.abs(found.astype(int) - np.asarray(expected).astype(int))
            assert difference.max() <= 1, (seed, prompt)

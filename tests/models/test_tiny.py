"""Each generated graph is valid ONNX and computes what its function in numpy computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from glance_trt.bundle import Bundle, GuidanceMode

from . import tiny

RNG = np.random.default_rng(1)
LATENTS = RNG.normal(size=(2, 3, tiny.HEIGHT, tiny.WIDTH)).astype(np.float32)
EMBEDS = RNG.normal(size=(2, tiny.LENGTH, 3)).astype(np.float32)
NEGATIVE = RNG.normal(size=(2, tiny.LENGTH, 3)).astype(np.float32)
STEP = {
    "latents": LATENTS,
    "timestep": np.float32(700),
    "coefficients": np.array([0.5, 0.75, -0.25], np.float32),
    "prompt_embeds": EMBEDS,
}


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> Any:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: np.asarray(value) for name, value in feeds.items()})[0]


def test_text_encoder_looks_tokens_up() -> None:
    ids = np.arange(2 * tiny.LENGTH, dtype=np.int64).reshape(2, tiny.LENGTH)
    np.testing.assert_array_equal(run(tiny.text_encoder_model(), {"input_ids": ids}), tiny.encode(ids))


@pytest.mark.parametrize("phase", ["slow", "fast"])
def test_denoiser_takes_one_guided_step(phase: str) -> None:
    feeds = STEP | {"guidance_scale": np.float32(3), "negative_prompt_embeds": NEGATIVE}
    expected = tiny.denoise(phase, LATENTS, 700, (0.5, 0.75, -0.25), EMBEDS, NEGATIVE, 3)
    np.testing.assert_allclose(run(tiny.denoiser_model(phase), feeds), expected, rtol=0, atol=1e-6)


def test_denoiser_without_guidance_is_the_guided_one_at_scale_one() -> None:
    expected = tiny.denoise("slow", LATENTS, 700, (0.5, 0.75, -0.25), EMBEDS, NEGATIVE, 1)
    np.testing.assert_allclose(run(tiny.denoiser_model("slow", "none"), STEP), expected, rtol=0, atol=1e-6)


def test_denoiser_with_embedded_guidance_at_scale_one_is_the_one_without() -> None:
    embedded = run(tiny.denoiser_model("slow", "embedded"), STEP | {"guidance_scale": np.float32(1)})
    np.testing.assert_array_equal(embedded, run(tiny.denoiser_model("slow", "none"), STEP))


def test_decoder_makes_pixels() -> None:
    pixels = run(tiny.decoder_model(), {"latents": 3 * LATENTS})
    np.testing.assert_array_equal(pixels, tiny.decode(3 * LATENTS))
    assert pixels.shape == (2, tiny.HEIGHT, tiny.WIDTH, 3)
    assert {0, 255} < set(pixels.flat)


@pytest.mark.parametrize("guidance", ["cfg", "embedded", "none"])
def test_bundle_is_valid(guidance: GuidanceMode, tmp_path: Path) -> None:
    Bundle.open(tiny.make_bundle(tmp_path / "tiny.bundle", guidance=guidance)).verify()

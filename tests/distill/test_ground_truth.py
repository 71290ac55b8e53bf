"""Training on the base model's own target: the noised images and targets are those of diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from glance_trt.distill.data import Examples
from glance_trt.distill.ground_truth import ground_truth_loss, knots_of
from glance_trt.recipe import Distill

SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIM, zero terminal SNR": {
        "_class_name": "DDIMScheduler",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "clip_sample": False,
    },
    "DDIM of SD 1": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "clip_sample": False,
    },
    "Euler between timesteps": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"},
    "Euler, zero terminal SNR": {
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    },
}


def settings(batch_size: int = 1, caption_dropout: float = 0.0) -> Distill:
    return Distill(prompt="a star", batch_size=batch_size, caption_dropout=caption_dropout)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name.startswith("DDIM")])
def test_loss_is_the_error_to_the_noise_velocity_or_image_of_diffusers(
    name: str, prediction_type: str, recorder: Any, examples: Examples
) -> None:
    config = {**SCHEDULERS[name], "prediction_type": prediction_type}
    reference = diffusers.DDIMScheduler.from_config(config)
    reference.set_timesteps(10)
    knots = knots_of(config, 10, (1, 3, 10))
    loss_of_step = ground_truth_loss(
        recorder, examples, knots, prediction_type=prediction_type, settings=settings(batch_size=4)
    )
    generator = torch.Generator().manual_seed(7)
    for _ in range(4):
        replay = torch.Generator()
        replay.set_state(generator.get_state())
        ((loss, timesteps),) = loss_of_step(generator)
        torch.randint(3, (4,), generator=replay), torch.rand(4, generator=replay)
        noise = torch.randn(4, 4, 8, 8, generator=replay)
        latents = examples.latents[torch.randint(3, (4,), generator=replay)]
        assert set(timesteps) <= set(reference.timesteps[[0, 2, 9]].tolist())
        sample, given, _, _ = recorder.calls[-1]
        assert given.tolist() == list(timesteps)
        times = torch.tensor(timesteps).long()
        torch.testing.assert_close(sample, reference.add_noise(latents, noise, times), rtol=1e-6, atol=1e-6)
        velocity = reference.get_velocity(latents, noise, times)
        target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction_type]
        torch.testing.assert_close(loss, target.square().mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name.startswith("Euler")])
def test_noised_latents_are_the_model_input_of_diffusers_euler_scheduler(
    name: str, recorder: Any, examples: Examples
) -> None:
    reference = diffusers.EulerDiscreteScheduler.from_config(SCHEDULERS[name])
    reference.set_timesteps(7)
    for step in range(1, 8):
        knots = knots_of(SCHEDULERS[name], 7, (step,))
        loss_of_step = ground_truth_loss(recorder, examples, knots, prediction_type="epsilon", settings=settings())
        ((_, (timestep,)),) = loss_of_step(torch.Generator().manual_seed(step))
        replay = torch.Generator().manual_seed(step)
        torch.randint(1, (1,), generator=replay), torch.rand(1, generator=replay)
        noise = torch.randn(1, 4, 8, 8, generator=replay)
        latents = examples.latents[torch.randint(3, (1,), generator=replay)]
        expected = reference.timesteps[step - 1]
        assert timestep == expected
        reference._step_index = None
        noised = reference.add_noise(latents, noise, expected[None])
        scaled = reference.scale_model_input(noised, expected)
        torch.testing.assert_close(recorder.calls[-1][0], scaled, rtol=1e-5, atol=1e-5)


def test_a_first_step_at_zero_terminal_snr_is_pure_noise() -> None:
    knots = knots_of(SCHEDULERS["DDIM, zero terminal SNR"], 10, (1,))
    assert knots.timesteps.tolist() == [999]
    assert knots.alphas_cumprod.tolist() == [0]


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_captions_are_dropped_at_the_given_rate_and_knots_drawn_uniformly(
    dropout: float, share: float, recorder: Any, examples: Examples
) -> None:
    knots = knots_of(SCHEDULERS["DDIM of SD 1"], 50, (1, 3, 5, 7, 9))
    loss_of_step = ground_truth_loss(
        recorder, examples, knots, prediction_type="epsilon", settings=settings(4000, dropout)
    )
    ((_, timesteps),) = loss_of_step(torch.Generator().manual_seed(0))
    embeds = recorder.calls[0][2]
    assert (embeds == 0).all(dim=(1, 2)).float().mean().item() == pytest.approx(share, abs=0.03)
    assert sorted(set(timesteps)) == [821, 861, 901, 941, 981]
    assert all(timesteps.count(timestep) / 4000 == pytest.approx(0.2, abs=0.03) for timestep in set(timesteps))


def test_each_image_goes_with_its_own_caption(recorder: Any, examples: Examples) -> None:
    """At the end of the grid almost nothing but the image is left."""
    knots = knots_of({**SCHEDULERS["DDIM of SD 1"], "steps_offset": 0}, 1000, (1000,))
    assert knots.timesteps.tolist() == [0]
    loss_of_step = ground_truth_loss(
        recorder, examples, knots, prediction_type="epsilon", settings=settings(batch_size=300)
    )
    list(loss_of_step(torch.Generator().manual_seed(0)))
    sample, _, embeds, _ = recorder.calls[0]
    distances = (sample[:, None] - examples.latents[None]).square().mean(dim=(2, 3, 4))
    images = distances.argmin(dim=1)
    assert distances.min(dim=1).values.max() < 0.01
    assert torch.equal(embeds, examples.embeds[examples.caption[images]])
    assert all(count == pytest.approx(100, abs=30) for count in images.bincount().tolist())

"""What denoising starts from is what pipelines of diffusers start from, draw for draw."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from glance_trt.errors import InputError
from glance_trt.runtime import starting

SEEDS = [7, 8, 2**40 + 1]
SHAPE = (16, 6, 4)
IMAGE = np.random.default_rng(0).uniform(-1, 1, (1, 3, 12, 8)).astype(np.float32)


def test_noise_equals_that_of_diffusers_for_a_list_of_generators() -> None:
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    for shape in [(4, 9, 7), (3, 2, 2)]:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
        expected = randn_tensor((3, *shape), generator=generators).numpy()
        found = starting.from_noise(shape, SEEDS)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)


def test_any_image_of_a_batch_can_be_made_again_from_its_own_seed() -> None:
    batch = starting.from_noise((4, 8, 8), [2**32 - 2 + i for i in range(4)])
    for i in range(4):
        np.testing.assert_array_equal(batch[i : i + 1], starting.from_noise((4, 8, 8), [2**32 - 2 + i]))


def test_seeds_follow_one_another_and_may_not_run_out() -> None:
    assert starting.seeds_from(-1, 3) == [-1, 0, 1]
    assert starting.seeds_from(np.int64(2**62), np.int32(2)) == [2**62, 2**62 + 1]
    assert starting.seeds_from(2**64 - 2, 2) == [2**64 - 2, 2**64 - 1]
    with pytest.raises(InputError, match=f"^seed: got {2**64}; a seed is"):
        starting.seeds_from(2**64 - 2, 3)
    for count in (0, -1, 1.5, "2"):
        with pytest.raises(InputError, match=r"^count: expected a whole number, at least 1, got "):
            starting.seeds_from(0, count)  # type: ignore[arg-type]


# --- from images ----------------------------------------------------------------------------------------------------


def moments(image: Any) -> Any:
    """Mean and log-variance of a posterior [B, 16, 6, 4], of an image [B, 3, 12, 8]; torch."""
    import torch

    mean = torch.nn.functional.avg_pool2d(image, 2).repeat(1, 6, 1, 1)[:, :16]
    return mean, mean * 2 - 1


class Autoencoder:
    """A VAE of diffusers to its pipelines. frames: whether its tensors have a dimension for them, as Qwen-Image's."""

    def __init__(self, *, frames: bool = False, **config: Any) -> None:
        self.config = SimpleNamespace(latent_channels=16, force_upcast=False, **config)
        self.dtype, self._frames = None, frames

    def encode(self, image: Any) -> Any:
        import torch
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        found = torch.cat(moments(image[:, :, 0] if self._frames else image), 1)
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(found[:, :, None] if self._frames else found))


def pipeline(name: str, vae: Autoencoder, scheduler: Any) -> Any:
    """One of diffusers' image-to-image pipelines with the parts that prepare latents, and no others."""
    import diffusers

    made = object.__new__(getattr(diffusers, name))
    made.__dict__.update(vae=vae, scheduler=scheduler, vae_scale_factor=2, latent_channels=16)
    return made


def ours(
    mix: tuple[float, float], shift: Callable[[NDArray[np.float32]], NDArray[np.float32]], *, posterior: bool = True
) -> NDArray[np.float32]:
    """shift: what the autoencoder's sample becomes before it is a denoiser's latents."""
    import torch

    mean, deviation = (part.numpy() for part in moments(torch.from_numpy(IMAGE)))
    deviation = np.exp(0.5 * deviation)

    def encode(noise: NDArray[np.float32] | None) -> NDArray[np.float32]:
        assert (noise is not None) == posterior
        return shift(mean if noise is None else mean + deviation * noise).astype(np.float32)

    return starting.from_image(encode, SHAPE, SEEDS, mix, posterior=posterior)


def generators() -> list[Any]:
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"])
@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("start", [0, 3, 9])
def test_latents_of_an_image_are_those_of_diffusers_pipelines_with_a_unet(name: str, kind: str, start: int) -> None:
    import diffusers
    import torch

    scheduler = getattr(diffusers, kind)(beta_schedule="scaled_linear")
    scheduler.set_timesteps(10)
    theirs = pipeline(name, Autoencoder(scaling_factor=0.25), scheduler)
    timestep = scheduler.timesteps[start : start + 1].repeat(3)
    expected = theirs.prepare_latents(torch.from_numpy(IMAGE), timestep, 3, 1, torch.float32, "cpu", generators())
    if kind == "DDIMScheduler":
        kept = scheduler.alphas_cumprod[scheduler.timesteps[start]]
        mix = (float(kept**0.5), float((1 - kept) ** 0.5))
    else:
        mix = (1.0, float(scheduler.sigmas[start]))
    np.testing.assert_allclose(ours(mix, lambda x: x * 0.25), expected.numpy(), rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("name", ["StableDiffusion3Img2ImgPipeline", "FluxImg2ImgPipeline", "QwenImageImg2ImgPipeline"])
@pytest.mark.parametrize("start", [0, 2, 9])
def test_latents_of_an_image_are_those_of_diffusers_pipelines_with_a_transformer(name: str, start: int) -> None:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(start)
    timestep, sigma = scheduler.timesteps[start : start + 1].repeat(3), float(scheduler.sigmas[start])
    image = torch.from_numpy(IMAGE).repeat(3, 1, 1, 1)
    shift: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda x: (x - 0.125) * 0.75  # noqa: E731
    if name == "QwenImageImg2ImgPipeline":
        means, deviations = np.linspace(-1, 1, 16), np.linspace(0.5, 2, 16)
        vae = Autoencoder(frames=True, z_dim=16, latents_mean=means.tolist(), latents_std=deviations.tolist())
        shift = lambda x: (x - means[:, None, None]) / deviations[:, None, None]  # noqa: E731
    else:
        vae = Autoencoder(shift_factor=0.125, scaling_factor=0.75)
    theirs = pipeline(name, vae, scheduler)
    if name == "StableDiffusion3Img2ImgPipeline":
        expected = theirs.prepare_latents(image, timestep, 3, 1, torch.float32, "cpu", generators())
    else:
        found = theirs.prepare_latents(image, timestep, 3, 16, 12, 8, torch.float32, "cpu", generators())
        packed = found[0] if isinstance(found, tuple) else found
        expected = theirs._unpack_latents(packed, 12, 8, 2).reshape(3, *SHAPE)
    np.testing.assert_allclose(ours((1 - sigma, sigma), shift), expected.numpy(), rtol=1e-6, atol=2e-5)


def test_an_encoder_that_samples_nothing_draws_nothing() -> None:
    noise = starting.from_noise(SHAPE, SEEDS)
    found = ours((0.25, 0.5), lambda x: x, posterior=False)
    mean = ours((1.0, 0.0), lambda x: x, posterior=False)
    np.testing.assert_allclose(found, 0.25 * mean + 0.5 * noise, rtol=1e-6, atol=1e-6)


def test_an_image_s_latents_do_not_depend_on_the_batch() -> None:
    batch = ours((0.5, 0.5), lambda x: x)
    mean = np.zeros((1, *SHAPE), np.float32)
    for i, seed in enumerate(SEEDS):
        one = starting.from_image(lambda noise: mean + noise, SHAPE, [seed], (0.0, 0.5), posterior=True)
        many = starting.from_image(lambda noise: mean + noise, SHAPE, SEEDS, (0.0, 0.5), posterior=True)
        np.testing.assert_array_equal(many[i : i + 1], one)
    assert batch.dtype == np.float32

"""Schedules against diffusers' own schedulers, the formulas of the papers, and the papers' printed numbers."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr

from glance_trt import schedule, schedulers
from glance_trt.errors import RecipeError
from glance_trt.schedule import compile_schedule, teacher_grid

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, **SD_BETAS}
EULER = {"_class_name": "EulerDiscreteScheduler", **SD_BETAS}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SD15 = {  # as Stable Diffusion 1.5 ships it
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SDXL = {**EULER, "timestep_spacing": "leading", "steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False}
QWEN = {**FLOW, "use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
FLUX = {**FLOW, "use_dynamic_shifting": True, "shift": 3.0}
SD3 = {**FLOW, "shift": 3.0, "own_sigmas": True}
GLANCE = [("slow", (1, 3, 5, 7, 9)), ("fast", (11, 21, 31, 41, 50))]

DDIM_CONFIGS = [
    {**DDIM, **dict(zip(("beta_schedule", "prediction_type", "timestep_spacing"), choice, strict=True))}
    for choice in itertools.product(
        ("linear", "scaled_linear", "squaredcos_cap_v2"),
        ("epsilon", "v_prediction", "sample"),
        ("leading", "trailing"),
    )
] + [
    {**SD15, "_class_name": "DDIMScheduler"},
    {**DDIM, "set_alpha_to_one": False},
    {**DDIM, "steps_offset": 1, "num_train_timesteps": 500},
    {**DDIM, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
]
EULER_CONFIGS = [
    {**EULER, **dict(zip(("beta_schedule", "prediction_type", "timestep_spacing"), choice, strict=True))}
    for choice in itertools.product(
        ("linear", "scaled_linear", "squaredcos_cap_v2"),
        ("epsilon", "v_prediction", "sample"),
        ("leading", "linspace", "trailing"),
    )
] + [
    SDXL,
    {**EULER, "final_sigmas_type": "sigma_min"},
    {**EULER, "interpolation_type": "log_linear"},
    {**EULER, "use_karras_sigmas": True},
    {**EULER, "use_karras_sigmas": True, "interpolation_type": "log_linear", "timestep_spacing": "trailing"},
    {**EULER, "use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0},
    {**EULER, "timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
    {**EULER, "timestep_type": "continuous", "prediction_type": "epsilon"},
    {**EULER, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {**EULER, "rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
]
FLOW_CONFIGS = [
    FLOW,
    {**FLOW, "shift": 3.0},
    {**FLOW, "shift": 3.0, "shift_terminal": 0.1, "num_train_timesteps": 500},
    {**FLOW, "shift": 2.0, "use_karras_sigmas": True},
    QWEN,
    FLUX,
    {**FLUX, "time_shift_type": "linear"},
]
OWN_CONFIGS = [
    SD3,
    {**SD3, "shift": 1.0},
    {**SD3, "shift": 1.7, "num_train_timesteps": 777, "shift_terminal": 0.1},
    {**SD3, "use_karras_sigmas": True},
    {**SD3, "use_dynamic_shifting": True},
    {**SD3, "use_dynamic_shifting": True, "time_shift_type": "linear"},
]


# The released code's literals; bfloat16 makes them 1000, 980, 956, 936, 912 and 888, 744, 564, 320, 20.
SLOW_BF16 = torch.tensor([1000.0, 979.1915, 957.5157, 934.9171, 911.3354], dtype=torch.bfloat16)
FAST_BF16 = torch.tensor([886.7053, 745.0728, 562.9505, 320.0802, 20.0], dtype=torch.bfloat16)


def label(value: Any) -> str:
    """A short test id."""
    if not isinstance(value, dict):
        return ""
    parts = [str(value.get("_class_name")), *(f"{k}={v}" for k, v in value.items() if k not in {*DDIM, "_class_name"})]
    return "-".join([*parts, str(value.get("beta_schedule", ""))])


def reference(config: dict[str, Any], steps: int, tokens: int | None = None) -> Any:
    """diffusers' scheduler, its timesteps set as the pipelines set them."""
    known = {key: value for key, value in config.items() if key != "own_sigmas"}
    scheduler = getattr(diffusers, config["_class_name"]).from_config(known)
    if config["_class_name"] != FLOW["_class_name"]:
        scheduler.set_timesteps(steps)
        return scheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[name] for name in names)) if tokens else None
    if config.get("own_sigmas"):
        scheduler.set_timesteps(steps, mu=mu)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


def assert_steps_like_diffusers(config: dict[str, Any], steps: int, tokens: int | None = None) -> None:
    theirs = reference(config, steps, tokens)
    ours = compile_schedule(config, [("all", range(1, steps + 1))], teacher_steps=steps, image_tokens=tokens)
    assert len(ours.steps) == len(theirs.timesteps) == steps
    assert ours.initial_noise_scale == pytest.approx(float(getattr(theirs, "init_noise_sigma", 1.0)), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for index, (step, timestep) in enumerate(zip(ours.steps, theirs.timesteps, strict=True)):
        assert step.timestep == pytest.approx(float(timestep), rel=1e-6, abs=1e-6)
        level = float(theirs.sigmas[index]) if hasattr(theirs, "sigmas") else 1.0
        x, output = torch.randn(2, 2, 4, 8, 8, generator=generator)
        x = x * max(level, 1.0)
        if hasattr(theirs, "scale_model_input"):
            torch.testing.assert_close(step.c_in * x, theirs.scale_model_input(x, timestep), rtol=1e-6, atol=1e-6)
        expected = theirs.step(output, timestep, x, return_dict=False)[0]
        error = (step.a * x + step.b * output - expected).abs().max()
        # diffusers works in float32, so its own error is a few units of the largest number that it adds up.
        assert error <= 1e-6 * max(x.abs().max(), expected.abs().max())


@pytest.mark.parametrize("config", DDIM_CONFIGS + EULER_CONFIGS, ids=label)
def test_every_step_of_the_teacher_equals_diffusers(config: dict[str, Any]) -> None:
    for steps in (10, 50):
        assert_steps_like_diffusers(config, steps)


@pytest.mark.parametrize("config", FLOW_CONFIGS + OWN_CONFIGS, ids=label)
def test_every_flow_step_equals_diffusers_at_every_image_size(config: dict[str, Any]) -> None:
    sizes = (256, 1024, 4096, 6032) if config.get("use_dynamic_shifting") else (None,)
    for steps, tokens in itertools.product((7, 50), sizes):
        assert_steps_like_diffusers(config, steps, tokens)


@pytest.mark.parametrize("config", OWN_CONFIGS, ids=label)
def test_own_sigmas_are_those_of_diffusers_to_the_last_bit(config: dict[str, Any]) -> None:
    for steps, tokens in itertools.product((2, 7, 28, 50), (1024, 4096)):
        theirs, ours = reference(config, steps, tokens), teacher_grid(config, steps, tokens)
        np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
        np.testing.assert_array_equal(ours.levels, theirs.sigmas.numpy())


@pytest.mark.parametrize("config", [DDIM, EULER, FLOW], ids=lambda c: c["_class_name"])
def test_missing_keys_take_the_defaults_of_diffusers(config: dict[str, Any]) -> None:
    schema = schedulers.SCHEDULERS[config["_class_name"]]
    signature = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters
    ours = {field.name: field.default for field in dataclasses.fields(schema) if field.name != "own_sigmas"}
    assert ours == {name: signature[name].default for name in ours}
    only_matter_when_clipping = {"dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value"}
    assert set(signature) - set(ours) <= only_matter_when_clipping | {"self"}


def test_a_config_of_another_class_is_read_as_from_config_does() -> None:
    pndm = diffusers.PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1)
    config = {**pndm.config, "_class_name": "EulerDiscreteScheduler"}
    assert "timestep_spacing" in config["_use_default_values"]  # "leading", where Euler's own default is "linspace"
    theirs = diffusers.EulerDiscreteScheduler.from_config(pndm.config)
    theirs.set_timesteps(20)
    ours = teacher_grid(config, 20)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps, rtol=1e-6)
    np.testing.assert_allclose(ours.levels, theirs.sigmas, rtol=1e-6)


def test_the_ddim_grid_holds_the_cumulative_alphas_of_diffusers() -> None:
    for config in DDIM_CONFIGS:
        theirs = reference(config, 50)
        ours = teacher_grid(config, 50)
        assert ours.timesteps.dtype == ours.levels.dtype == np.float32
        alphas = theirs.alphas_cumprod[theirs.timesteps].numpy()
        # torch's linspace and sqrt differ in the last bit between processors, hence no plain equality.
        np.testing.assert_allclose(
            ours.levels[:-1], alphas, rtol=4e-6 if config.get("rescale_betas_zero_snr") else 5e-7
        )
        assert ours.levels[-1] == theirs.final_alpha_cumprod


@pytest.mark.parametrize("config", DDIM_CONFIGS, ids=label)
def test_log_snr_of_ddim_is_that_of_diffusers(config: dict[str, Any]) -> None:
    theirs = reference(config, 50)
    ours = schedule.log_snr(config, teacher_grid(config, 50).levels)
    expected = compute_snr(theirs, theirs.timesteps).double().log()  # -inf at zero terminal SNR
    np.testing.assert_allclose(ours[:-1], expected, rtol=0, atol=2e-4)  # diffusers squares a root in float32
    final = float(theirs.final_alpha_cumprod)
    assert ours[-1] == (math.inf if final == 1 else pytest.approx(math.log(final / (1 - final)), abs=1e-6))


@pytest.mark.parametrize("config", EULER_CONFIGS + FLOW_CONFIGS, ids=label)
def test_log_snr_of_sigmas_is_twice_the_lambda_of_diffusers(config: dict[str, Any]) -> None:
    solver = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=config["_class_name"] == FLOW["_class_name"])
    alphas, sigmas = solver._sigma_to_alpha_sigma_t(reference(config, 50, 1024).sigmas[:51].double())
    ours = schedule.log_snr(config, teacher_grid(config, 50, 1024).levels)
    np.testing.assert_allclose(ours, 2 * (alphas.log() - sigmas.log()), rtol=1e-5, atol=1e-5)
    assert np.all(np.diff(ours) >= 0)  # a grid may hold its smallest sigma twice


def test_log_snr_refuses_what_the_grid_refuses() -> None:
    with pytest.raises(RecipeError, match="PNDMScheduler is not supported"):
        schedule.log_snr(SD15, np.ones(1, np.float32))


def test_the_teacher_grid_has_as_many_steps_as_asked_where_arange_runs_too_far() -> None:
    for config in (DDIM, EULER):
        config = {**config, "timestep_spacing": "trailing"}
        assert len(reference(config, 61).timesteps) == 62  # diffusers 0.42.1 adds a step at timestep -1
        grid = teacher_grid(config, 61)
        np.testing.assert_array_equal(grid.timesteps, reference(config, 61).timesteps[:61])
        assert len(grid.levels) == 62


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_consistent_ddim_follows_equation_12_between_the_knots(spacing: str) -> None:
    alphas_cumprod = diffusers.DDIMScheduler(**SD_BETAS).alphas_cumprod.double()
    x, output = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    config = {**DDIM, "timestep_spacing": spacing}
    compiled = compile_schedule(config, GLANCE, teacher_steps=50).steps
    grid = reference(config, 50).timesteps.tolist()
    assert [step.timestep for step in compiled] == [grid[k - 1] for _, steps in GLANCE for k in steps]
    for step, following in itertools.zip_longest(compiled, compiled[1:]):
        alpha = alphas_cumprod[int(step.timestep)]
        target = alphas_cumprod[int(following.timestep)] if following else torch.ones(())
        image = (x - (1 - alpha).sqrt() * output) / alpha.sqrt()
        expected = target.sqrt() * image + (1 - target).sqrt() * output
        torch.testing.assert_close(step.a * x + step.b * output, expected, rtol=0, atol=1e-6 * float(x.abs().max()))


def test_consistent_euler_steps_are_sigma_differences() -> None:
    sigmas = reference(SDXL, 50).sigmas.double().numpy()
    compiled = compile_schedule(SDXL, GLANCE, teacher_steps=50)
    levels = [*(sigmas[k - 1] for _, steps in GLANCE for k in steps), 0.0]
    np.testing.assert_allclose([step.b for step in compiled.steps], np.diff(levels), rtol=1e-6)
    np.testing.assert_allclose([step.c_in for step in compiled.steps], (np.square(levels[:-1]) + 1) ** -0.5, rtol=1e-6)
    assert {step.a for step in compiled.steps} == {1.0}


def test_consistent_v_prediction_lands_on_the_next_knot_when_the_model_is_exact() -> None:
    """With the true velocity of one image, any first-order sampler stays on its line: at the end is the image."""
    image, noise = np.random.default_rng(2).normal(size=(2, 1000))
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    config = {**DDIM, **zero_snr}
    alphas = reference(config, 50).alphas_cumprod.double().numpy()
    assert alphas[999] == 0
    x = noise
    for step in compile_schedule(config, GLANCE, teacher_steps=50).steps:
        alpha = alphas[int(step.timestep)]
        np.testing.assert_allclose(x, alpha**0.5 * image + (1 - alpha) ** 0.5 * noise, atol=1e-5)
        x = step.a * x + step.b * (alpha**0.5 * noise - (1 - alpha) ** 0.5 * image)
    np.testing.assert_allclose(x, image, atol=1e-5)


def test_initial_noise_scale_is_that_of_stable_diffusion_with_euler() -> None:
    linspace = compile_schedule(EULER, [("all", range(1, 51))], teacher_steps=50)
    assert linspace.initial_noise_scale == pytest.approx(14.6146, abs=1e-4)
    assert compile_schedule({**EULER, "timestep_spacing": "leading"}, GLANCE, teacher_steps=50).initial_noise_scale == (
        pytest.approx(math.hypot(1, float(reference({**EULER, "timestep_spacing": "leading"}, 50).sigmas[0])), rel=1e-6)
    )
    zero_snr = {**EULER, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert compile_schedule(zero_snr, GLANCE, teacher_steps=50).initial_noise_scale == pytest.approx(4096, rel=1e-6)
    assert compile_schedule(QWEN, GLANCE, teacher_steps=50, image_tokens=4096).initial_noise_scale == 1
    assert compile_schedule(DDIM, GLANCE, teacher_steps=50).initial_noise_scale == 1


def test_a_schedule_that_starts_late_starts_at_the_noise_of_its_first_knot() -> None:
    compiled = compile_schedule(EULER, [("fast", (11, 50))], teacher_steps=50)
    assert compiled.initial_noise_scale == pytest.approx(float(reference(EULER, 50).sigmas[10]), rel=1e-6)


def test_qwen_image_gives_the_printed_timesteps_and_sigma_differences() -> None:
    compiled = compile_schedule(QWEN, GLANCE, teacher_steps=50, image_tokens=4096)
    assert [step.phase for step in compiled.steps] == ["slow"] * 5 + ["fast"] * 5
    printed = [1000, 979.1915, 957.5157, 934.9171, 911.3354, 886.7053, 745.0728, 562.9505, 320.0802, 20]
    np.testing.assert_allclose([step.timestep for step in compiled.steps], printed, atol=5.1e-5)
    differences = [-0.0208, -0.0217, -0.0226, -0.0236, -0.0246, -0.1416, -0.1821, -0.2429, -0.3001, -0.0200]
    np.testing.assert_allclose([step.b for step in compiled.steps], differences, atol=5.1e-5)
    assert {(step.c_in, step.a) for step in compiled.steps} == {(1.0, 1.0)}


def test_flux_gives_the_printed_timesteps() -> None:
    compiled = compile_schedule(FLUX, GLANCE, teacher_steps=50, image_tokens=4096)
    printed = [1000, 986.9786, 973.2042, 958.6094, 943.1188, 926.6473, 825.7017, 677.9868, 441.1997, 60.5503]
    np.testing.assert_allclose([step.timestep for step in compiled.steps], printed, atol=6.1e-5)


@pytest.mark.parametrize("phases", [GLANCE, [("one", (1,))], [("a", (2, 3)), ("b", (9,)), ("c", (30, 47))]])
def test_consistent_flow_steps_telescope_to_the_whole_interval(phases: Any) -> None:
    for config in FLOW_CONFIGS + OWN_CONFIGS:
        compiled = compile_schedule(config, phases, teacher_steps=50, image_tokens=1024)
        first = float(reference(config, 50, 1024).sigmas[phases[0][1][0] - 1])
        assert sum(step.b for step in compiled.steps) == pytest.approx(-first, abs=1e-7)


def test_released_walks_sigmas_as_two_pipelines_of_diffusers_that_replace_only_the_timesteps() -> None:
    compiled = compile_schedule(QWEN, GLANCE, teacher_steps=50, sampler="released", image_tokens=4096)
    generator = torch.Generator().manual_seed(3)
    ours = theirs = torch.randn(1, 64, generator=generator)
    remaining = iter(compiled.steps)
    for phase, count, timesteps in (("slow", 50, SLOW_BF16), ("fast", 5, FAST_BF16)):
        scheduler = reference(QWEN, count, 4096)
        scheduler.set_begin_index(0)
        for timestep in timesteps:
            velocity = torch.randn(1, 64, generator=generator)
            theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
            step = next(remaining)
            assert (step.phase, step.timestep) == (phase, float(timestep))
            ours = step.a * ours + step.b * velocity
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_released_keeps_the_stride_of_two_ddim_pipelines_of_diffusers(set_alpha_to_one: bool) -> None:
    config = {**DDIM, "set_alpha_to_one": set_alpha_to_one}
    compiled = compile_schedule(config, GLANCE, teacher_steps=50, sampler="released")
    generator = torch.Generator().manual_seed(3)
    ours = theirs = torch.randn(1, 64, generator=generator)
    knots = teacher_grid(config, 50).timesteps[[step - 1 for _, steps in GLANCE for step in steps]]
    scheduler = diffusers.DDIMScheduler.from_config(config)
    for i, (step, timestep) in enumerate(zip(compiled.steps, knots, strict=True)):
        scheduler.set_timesteps(50 if i < len(GLANCE[0][1]) else len(GLANCE[1][1]))
        output = torch.randn(1, 64, generator=generator)
        theirs = scheduler.step(output, int(timestep), theirs, return_dict=False)[0]
        assert step.timestep == timestep
        ours = step.a * ours + step.b * output
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_released_gives_the_printed_numbers() -> None:
    compiled = compile_schedule(QWEN, GLANCE, teacher_steps=50, sampler="released", image_tokens=4096)
    timesteps = [step.timestep for step in compiled.steps]
    assert timesteps == [1000, 980, 956, 936, 912, 888, 744, 564, 320, 20]
    assert 1 + sum(step.b for step in compiled.steps[:5]) == pytest.approx(0.946, abs=5e-4)
    assert sum(step.b for step in compiled.steps[5:]) == pytest.approx(-1, abs=1e-6)
    assert sum(step.b for step in compiled.steps) == pytest.approx(-1.054, abs=5e-4)


def test_released_keeps_the_timesteps_of_1024_pixels_at_other_sizes() -> None:
    phases: dict[str, Any] = {"phases": GLANCE, "teacher_steps": 50, "sampler": "released"}
    small = compile_schedule(QWEN, image_tokens=1024, **phases)
    large = compile_schedule(QWEN, image_tokens=4096, **phases)
    assert [step.timestep for step in small.steps] == [step.timestep for step in large.steps]
    sigmas = reference(QWEN, 50, 1024).sigmas[:6]
    np.testing.assert_allclose([step.b for step in small.steps[:5]], np.diff(sigmas), atol=1e-7)


def test_every_number_of_a_schedule_is_exact_in_float32() -> None:
    for config in (DDIM, SDXL, QWEN):
        compiled = compile_schedule(config, GLANCE, teacher_steps=50, image_tokens=4096)
        numbers = [getattr(step, name) for step in compiled.steps for name in ("timestep", "c_in", "a", "b")]
        numbers.append(compiled.initial_noise_scale)
        assert all(type(number) is float and float(np.float32(number)) == number for number in numbers)


REFUSED_CONFIGS = [
    ({**DDIM, "clip_sample": True}, "scheduler: clip_sample is on; .* not linear in the latents"),
    ({"_class_name": "DDIMScheduler"}, "scheduler: clip_sample is on; .*set it to false in scheduler_config.json"),
    ({**DDIM, "thresholding": True}, "scheduler: thresholding is on; .* not linear in the latents"),
    ({**DDIM, "trained_betas": [0.1, 0.2]}, "scheduler: trained_betas is on; only betas by beta_schedule"),
    ({**EULER, "use_exponential_sigmas": True}, "scheduler: use_exponential_sigmas is on; .* only use_karras_sigmas"),
    ({**EULER, "use_beta_sigmas": True}, "scheduler: use_beta_sigmas is on; .* only use_karras_sigmas"),
    ({**EULER, "use_karras_sigmas": True, "sigma_min": -1.0}, "use_karras_sigmas: cannot space 50 sigmas between -1.0"),
    ({**FLOW, "use_beta_sigmas": True}, "scheduler: use_beta_sigmas is on; .* only use_karras_sigmas"),
    ({**FLOW, "invert_sigmas": True}, "scheduler: invert_sigmas is on; only sigmas that fall from 1 to 0"),
    ({**FLOW, "stochastic_sampling": True}, "scheduler: stochastic_sampling is on; it adds fresh noise"),
    (
        SD15,
        "PNDMScheduler is not supported; expected one of DDIMScheduler, EulerDiscreteScheduler, "
        "FlowMatchEulerDiscreteScheduler. A recipe may name one of them in its place, such as 'scheduler: DDIM",
    ),
    ({}, "scheduler._class_name: None is not supported"),
    ({"_class_name": ["DDIMScheduler"]}, r"scheduler._class_name: \['DDIMScheduler'\] is not supported"),
    (
        {**DDIM, "beta_schedule": "sigmoid"},
        r"scheduler.beta_schedule: expected one of linear, scaled_linear, squaredcos_cap_v2; got text \('sigmoid'\)",
    ),
    ({**DDIM, "beta_start": "0.1"}, "scheduler.beta_start: expected a number, got text"),
    ({**DDIM, "num_train_timesteps": 0}, "scheduler.num_train_timesteps: got 0; expected at least 1"),
    ({**DDIM, "num_train_timesteps": 20}, "50 teacher steps .* num_train_timesteps = 20; ask for at most 20"),
    ({**DDIM, "steps_offset": 25}, r"scheduler.steps_offset: 25 puts the timesteps 1005\.\.25 of 50"),
    ({**DDIM, "beta_start": -1.0}, "scheduler: step 1 of 50 has noise level nan .* check the betas"),
    ({**EULER, "beta_end": 3.0}, "scheduler: step 1 of 50 has noise level inf .* check the betas"),
    (
        {**DDIM, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        "scheduler.prediction_type: epsilon says nothing about the image at zero terminal SNR",
    ),
    ({**FLUX, "max_shift": 1e6}, "scheduler: step 1 of 50 has noise level nan .* check the betas or shifts"),
    ({**QWEN, "base_shift": None}, "use_dynamic_shifting needs base_shift and max_shift"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED_CONFIGS, ids=lambda value: label(value)[:60])
def test_what_no_table_can_say_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compile_schedule(config, GLANCE, teacher_steps=50, image_tokens=4096)


def test_dynamic_shifting_needs_the_size_of_the_image() -> None:
    with pytest.raises(RecipeError, match=r"image_tokens is None; give the number of image tokens \(4096 for 1024"):
        compile_schedule(FLUX, GLANCE, teacher_steps=50)


def test_one_step_of_a_schedule_with_a_terminal_shift_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"step 1 of 1 has noise level nan .* or use more steps"):
        teacher_grid(QWEN, 1, 4096)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "phases: there is none; name at least one"),
        ([("slow", (1, 3)), ("fast", ())], r"phases.fast: has no steps; give at least one of 1\.\.50, or remove it"),
        ([("slow", (0, 3))], r"phases.slow: step 0 is outside the teacher's 1\.\.50"),
        ([("slow", (1, 51))], r"phases.slow: step 51 is outside the teacher's 1\.\.50"),
        ([("slow", (1, 3)), ("fast", (3, 9))], "phases.fast: step 3 is taken twice, first in phase slow; remove one"),
        ([("slow", (1, 5, 5))], "phases.slow: step 5 is taken twice, first in phase slow"),
        ([("slow", (5, 3))], "phases.slow: step 3 comes after step 5 of phase slow; steps must rise"),
        ([("slow", (1, 9)), ("fast", (7,))], "phases.fast: step 7 comes after step 9 of phase slow; steps must rise"),
    ],
)
def test_phases_that_make_no_schedule_are_refused(phases: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compile_schedule(DDIM, phases, teacher_steps=50)


def test_the_sampler_must_fit_the_scheduler() -> None:
    with pytest.raises(RecipeError, match=r"'released' is known for .* is EulerDiscreteScheduler; use 'consistent'"):
        compile_schedule(EULER, GLANCE, teacher_steps=50, sampler="released")
    with pytest.raises(RecipeError, match="sampler: got 'fast'; expected 'consistent' or 'released'"):
        compile_schedule(DDIM, GLANCE, teacher_steps=50, sampler="fast")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="teacher_steps: got 0; expected at least 1"):
        teacher_grid(DDIM, 0)


def test_bfloat16_rounds_as_torch_does_ties_to_even() -> None:
    ties = np.arange(1, 4001, dtype=np.float32) / 4
    np.testing.assert_array_equal(schedule._bfloat16(ties), torch.from_numpy(ties).bfloat16().float().numpy())

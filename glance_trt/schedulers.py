"""diffusers' schedulers, recomputed with numpy: the noise levels of a grid, and the update between two of them.

Grids are computed in diffusers' own precision and order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glance_trt import strict
from glance_trt.errors import RecipeError

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Grid:
    """The teacher's own steps, in order of denoising.

    timesteps [N] float32: what the model is given at each step (for flow matching 1000 * sigma).
    levels [N + 1] float32: the noise level before each step, then the one that the last step reaches. They are
    cumulative alphas for `DDIMScheduler` (rising) and sigmas for the Euler schedulers (falling).
    """

    timesteps: Floats
    levels: Floats


class Update(NamedTuple):
    c_in: float
    a: float
    b: float


@dataclass(frozen=True)
class _Diffusion:
    """What the schedulers over a table of betas have in common; field names and defaults are diffusers'."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: object = None
    steps_offset: int = 0
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    rescale_betas_zero_snr: bool = False

    def alphas_cumprod(self) -> Floats:
        """[num_train_timesteps] float32: torch's bits on a CPU with fused multiply-add, but for rescaled betas, where
        torch's square root is not correctly rounded (relative differences up to 4e-6 where the alphas vanish)."""
        count = self.num_train_timesteps
        if self.beta_schedule == "linear":
            betas = _torch_linspace(self.beta_start, self.beta_end, count)
        elif self.beta_schedule == "scaled_linear":
            betas = _torch_linspace(np.sqrt(self.beta_start), np.sqrt(self.beta_end), count) ** 2
        else:
            bars = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
            betas = np.array([min(1 - bars[i + 1] / bars[i], 0.999) for i in range(count)], np.float32)
        cumulative = _cumprod(1 - betas)
        if self.rescale_betas_zero_snr:  # arXiv 2305.08891, algorithm 1
            roots = np.sqrt(cumulative)
            first, last = roots[0], roots[-1]
            bars32 = ((roots - last) * (first / (first - last))) ** 2
            alphas = np.concatenate([bars32[:1], bars32[1:] / bars32[:-1]])
            cumulative = _cumprod(1 - (1 - alphas))  # by way of the betas, which rounds as diffusers does
        return cumulative

    def spaced_timesteps(self, steps: int, spacing: str) -> NDArray[np.float64]:
        """[steps], falling; arXiv 2305.08891, table 2."""
        count = self.num_train_timesteps
        if steps > count:
            raise RecipeError(
                f"scheduler: {steps} teacher steps were asked of a model with num_train_timesteps = {count}; "
                f"ask for at most {count}"
            )
        if spacing == "linspace":
            return np.linspace(0, count - 1, steps, dtype=np.float64)[::-1]
        if spacing == "leading":
            return np.arange(steps, dtype=np.float64)[::-1] * (count // steps) + self.steps_offset
        # Cut to the length: for some counts (61, 103, ...) arange runs one step too far, to timestep -1.
        return np.arange(count, 0, -count / steps, dtype=np.float64).round()[:steps] - 1


@dataclass(frozen=True)
class DDIM(_Diffusion):
    """DDIM (arXiv 2010.02502) without noise, eq. 12 with sigma_t = 0; a level is a cumulative alpha."""

    clip_sample: bool = True
    thresholding: bool = False
    set_alpha_to_one: bool = True
    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"

    def grid(self, steps: int, image_tokens: int | None) -> Grid:
        alphas = self.alphas_cumprod()
        timesteps = np.round(self.spaced_timesteps(steps, self.timestep_spacing)).astype(np.int64)
        if timesteps[0] >= len(alphas) or timesteps[-1] < 0:
            raise RecipeError(
                f"scheduler.steps_offset: {self.steps_offset} puts the timesteps {timesteps[0]}..{timesteps[-1]} of "
                f"{steps} teacher steps outside 0..{len(alphas) - 1}; use a smaller offset or fewer teacher steps"
            )
        final = np.float32(1) if self.set_alpha_to_one else alphas[0]
        return Grid(timesteps.astype(np.float32), np.append(alphas[timesteps], final))

    def update(self, level: float, target: float) -> Update:
        signal, noise = math.sqrt(level), math.sqrt(1 - level)
        if self.prediction_type == "epsilon":
            if signal == 0:
                raise RecipeError(
                    "scheduler.prediction_type: epsilon says nothing about the image at zero terminal SNR, where the "
                    "first step starts; use v_prediction if the model was trained so, turn rescale_betas_zero_snr "
                    "off, or start at a later teacher step"
                )
            keep, scale = 1 / signal, -noise / signal
        elif self.prediction_type == "v_prediction":
            keep, scale = signal, -noise
        else:
            keep, scale = 0.0, 1.0
        # The image is keep * x + scale * output, the noise is (x - signal * image) / noise.
        ratio = math.sqrt(1 - target) / noise
        gain = math.sqrt(target) - ratio * signal
        return Update(1.0, gain * keep + ratio, gain * scale)

    def initial_noise_scale(self, level: float) -> float:
        return 1.0

    def mix(self, level: float) -> tuple[float, float]:
        return math.sqrt(level), math.sqrt(1 - level)

    def log_snr(self, levels: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log(levels) - np.log(1 - levels)


@dataclass(frozen=True)
class Euler(_Diffusion):
    """Euler steps over sigmas (arXiv 2206.00364, algorithm 1 without churn); a level is a sigma."""

    interpolation_type: Literal["linear", "log_linear"] = "linear"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    def grid(self, steps: int, image_tokens: int | None) -> Grid:
        alphas = self.alphas_cumprod()
        if self.rescale_betas_zero_snr:
            alphas[-1] = 2.0**-24  # as diffusers has it, so that the first sigma is 4096 and not infinite
        trained = np.sqrt((1 - alphas) / alphas)
        timesteps = self.spaced_timesteps(steps, self.timestep_spacing).astype(np.float32)
        sigmas: NDArray[Any] = np.interp(timesteps, np.arange(len(trained)), trained)
        if self.interpolation_type == "log_linear":
            # One sigma more than steps: the last step of such a grid ends at the smallest sigma, not at zero.
            sigmas = np.exp(_torch_linspace(float(np.log(trained[-1])), float(np.log(trained[0])), steps + 1))
        if self.use_karras_sigmas:
            low = float(sigmas[-1]) if self.sigma_min is None else self.sigma_min
            high = float(sigmas[0]) if self.sigma_max is None else self.sigma_max
            sigmas = _karras_sigmas(low, high, steps)
            timesteps = np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained))).astype(np.float32)
        final = trained[0] if self.final_sigmas_type == "sigma_min" else 0.0
        levels = np.append(sigmas, final).astype(np.float32)[: steps + 1]
        if self.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            timesteps = np.float32(0.25) * np.log(levels[:-1])
        return Grid(timesteps, levels)

    def update(self, level: float, target: float) -> Update:
        square = level * level + 1
        if self.prediction_type == "epsilon":
            keep, scale = 1.0, -level
        elif self.prediction_type == "v_prediction":
            keep, scale = 1 / square, -level / math.sqrt(square)
        else:
            keep, scale = 0.0, 1.0
        # The image is keep * x + scale * output, the derivative is (x - image) / sigma.
        stride = (target - level) / level
        return Update(1 / math.sqrt(square), 1 + (1 - keep) * stride, -scale * stride)

    def initial_noise_scale(self, level: float) -> float:
        return math.sqrt(level * level + 1) if self.timestep_spacing == "leading" else level

    def mix(self, level: float) -> tuple[float, float]:
        return 1.0, level

    def log_snr(self, levels: NDArray[np.float64]) -> NDArray[np.float64]:
        return -2 * np.log(levels)


_OVERFLOW = 709  # exp of more is no float64


@dataclass(frozen=True)
class FlowMatch:
    """Euler steps over the flow-matching velocity ``noise - image``; a level is a sigma from 1 (noise) to 0."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False
    own_sigmas: bool = False
    """No key of diffusers: see `glance_trt.schedule.teacher_grid`."""

    def grid(self, steps: int, image_tokens: int | None) -> Grid:
        sigmas = self.own(steps) if self.own_sigmas else np.linspace(1.0, 1 / steps, steps).astype(np.float32)
        if self.use_dynamic_shifting:
            mu = self.mu(image_tokens)
            exponential = self.time_shift_type == "exponential"
            factor = mu if not exponential else math.exp(mu) if mu < _OVERFLOW else math.inf
            sigmas = factor / (factor + (1 / sigmas - 1))
        else:
            sigmas = self.shifted(sigmas)
        if self.shift_terminal:
            rest = 1 - sigmas
            sigmas = 1 - rest / (rest[-1] / (1 - self.shift_terminal))
        if self.use_karras_sigmas:
            sigmas = _karras_sigmas(float(sigmas[-1]), float(sigmas[0]), steps)
        sigmas = sigmas.astype(np.float32)
        return Grid(sigmas * np.float32(self.num_train_timesteps), np.append(sigmas, np.float32(0)))

    def own(self, steps: int) -> NDArray[Any]:
        """Sigmas before the shift, [steps] float64: between those of the first and the last timestep in training. These
        two are float32 and, as diffusers has it, shifted already where the shift is a fixed one."""
        count = self.num_train_timesteps
        ends = np.array([count, 1], np.float32) / np.float32(count)
        highest, lowest = ends if self.use_dynamic_shifting else self.shifted(ends)
        return np.linspace(float(highest) * count, float(lowest) * count, steps) / count

    def shifted(self, sigmas: NDArray[Any]) -> NDArray[Any]:
        """By `shift`, in the precision of the sigmas."""
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def mu(self, image_tokens: int | None) -> float:
        """The shift for an image of so many tokens: on the line through the base and the largest size."""
        if image_tokens is None or image_tokens < 1:
            raise RecipeError(
                f"scheduler: use_dynamic_shifting makes the timesteps depend on the image's size, and image_tokens is "
                f"{image_tokens}; give the number of image tokens (4096 for 1024 x 1024 in FLUX and Qwen-Image)"
            )
        if self.base_shift is None or self.max_shift is None or self.base_image_seq_len == self.max_image_seq_len:
            raise RecipeError(
                "scheduler: use_dynamic_shifting needs base_shift and max_shift, and a base_image_seq_len that differs "
                "from max_image_seq_len; correct them in the scheduler's config"
            )
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return image_tokens * slope + (self.base_shift - slope * self.base_image_seq_len)

    def update(self, level: float, target: float) -> Update:
        return Update(1.0, 1.0, target - level)

    def initial_noise_scale(self, level: float) -> float:
        return 1.0

    def mix(self, level: float) -> tuple[float, float]:
        return 1 - level, level

    def log_snr(self, levels: NDArray[np.float64]) -> NDArray[np.float64]:
        return 2 * (np.log(1 - levels) - np.log(levels))


Scheduler = DDIM | Euler | FlowMatch

SCHEDULERS: dict[str, type[Scheduler]] = {
    "DDIMScheduler": DDIM,
    "EulerDiscreteScheduler": Euler,
    "FlowMatchEulerDiscreteScheduler": FlowMatch,
}

_NOT_LINEAR = (
    "it clamps the predicted image, which is not linear in the latents, so no table of coefficients can say it; if the "
    "model works without, set it to false in scheduler_config.json"
)
_REFUSED = {
    "clip_sample": f"{_NOT_LINEAR} (DDIMScheduler turns it on where the config is silent)",
    "thresholding": _NOT_LINEAR,
    "trained_betas": "only betas by beta_schedule, beta_start and beta_end are supported",
    "use_exponential_sigmas": "of the other sigma spacings only use_karras_sigmas is supported",
    "use_beta_sigmas": "of the other sigma spacings only use_karras_sigmas is supported",
    "invert_sigmas": "only sigmas that fall from 1 to 0 are supported",
    "stochastic_sampling": "it adds fresh noise at every step, and these schedules are deterministic",
}


def scheduler_of(config: Mapping[str, Any]) -> Scheduler:
    """The scheduler of a scheduler_config.json. Raises `RecipeError` for a class or an option that is not supported."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise RecipeError(
            f"scheduler._class_name: {name} is not supported; expected one of {', '.join(SCHEDULERS)}. A recipe "
            "may name one of them in its place, such as 'scheduler: DDIMScheduler' for a model with a PNDMScheduler"
        )
    schema = SCHEDULERS[name]
    # diffusers lists here the keys that nobody set: the class that wrote the config filled in its own defaults.
    unset = config.get("_use_default_values", ())
    known = {field.name for field in fields(schema)}
    try:
        scheduler = strict.read(schema, {k: v for k, v in config.items() if k in known and k not in unset}, "scheduler")
    except strict.Mismatch as error:
        raise RecipeError(f"{error}; correct it in the scheduler's config") from None
    for key, reason in _REFUSED.items():
        if getattr(scheduler, key, None):
            raise RecipeError(f"scheduler: {key} is on; {reason}")
    if scheduler.num_train_timesteps < 1:
        raise RecipeError(f"scheduler.num_train_timesteps: got {scheduler.num_train_timesteps}; expected at least 1")
    return scheduler


def grid_of(scheduler: Scheduler, steps: int, image_tokens: int | None) -> Grid:
    """The scheduler's grid of so many steps. Raises `RecipeError` where no step can be made from one of its levels."""
    if steps < 1:
        raise RecipeError(f"teacher_steps: got {steps}; expected at least 1")
    with np.errstate(all="ignore"):  # what comes of bad numbers is found and named below
        grid = scheduler.grid(steps, image_tokens)
    levels = grid.levels
    usable = (levels >= 0) & (levels < 1) if isinstance(scheduler, DDIM) else (levels > 0) & np.isfinite(levels)
    bad = np.flatnonzero(~usable[:-1] | ~np.isfinite(grid.timesteps))
    if len(bad):
        raise RecipeError(
            f"scheduler: step {bad[0] + 1} of {steps} has noise level {levels[bad[0]]} and timestep "
            f"{grid.timesteps[bad[0]]}, from which no step can be made; check the betas or shifts of the scheduler's "
            "config, or use more steps"
        )
    return grid


def _torch_linspace(start: float, end: float, count: int) -> Floats:
    """torch.linspace in float32: from both ends to the middle, multiplied and added with one rounding."""
    first, last = np.float32(start), np.float32(end)
    stride = float((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    # A float32 times a small integer is exact in float64, so that rounding the sum once is the fused result.
    rising, falling = float(first) + stride * index, float(last) - stride * (count - 1 - index)
    return np.where((index < count // 2) | (count == 1), rising, falling).astype(np.float32)


def _cumprod(alphas: Floats) -> Floats:
    """torch.cumprod of float32 on a CPU, which accumulates in float64."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _karras_sigmas(low: float, high: float, count: int) -> NDArray[np.float64]:
    """[count], falling from high to low; arXiv 2206.00364, eq. 5 with rho = 7."""
    if not 0 < low < high:
        raise RecipeError(
            f"scheduler.use_karras_sigmas: cannot space {count} sigmas between {low} and {high}; expected positive, "
            "rising sigma_min and sigma_max and more than one step"
        )
    ramp = np.linspace(0, 1, count)
    sigmas: NDArray[np.float64] = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return sigmas

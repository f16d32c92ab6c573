"""`CovarianceScheduler`: a diffusers scheduler whose steps take the covariance of x0, in the DDPM and the DDIM form."""

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from noisewise.denoising.models import denoised
from noisewise.diffusion.levels import PREDICTIONS, NoiseLevels
from noisewise.diffusion.model import Prediction, first_channels
from noisewise.diffusion.reverse import reverse_step
from noisewise.diffusion.sources import Source
from noisewise.diffusion.steps import step_schedule
from noisewise.errors import InvalidInput, NoisewiseWarning, require

_utilities = require("diffusers.schedulers.scheduling_utils", "diffusion")
SchedulerMixin, SchedulerOutput = _utilities.SchedulerMixin, _utilities.SchedulerOutput
_configuration = require("diffusers.configuration_utils", "diffusion")
ConfigMixin, register_to_config = _configuration.ConfigMixin, _configuration.register_to_config
DDPMScheduler = require("diffusers.schedulers.scheduling_ddpm", "diffusion").DDPMScheduler
randn_tensor = require("diffusers.utils.torch_utils", "diffusion").randn_tensor

__all__ = ["CovarianceScheduler", "CovarianceSchedulerOutput"]

_SPACINGS = ("linspace", "leading", "trailing", "linear", "power", "linear_ddim", "quad_ddim")
_FIXED = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
# sampling with most variances, or most of x0 at some step, cut says that the head, or the scale of the data, is wrong
_CUT = 0.5
# pixels that are black or white lie about the end of the range; this far beyond it lies what the clip destroys
_BEYOND = 1.1
# beyond this s/a hardly anything is known of x0, and any error of the network makes variances that are cut
_COUNTED = 3.0
# other schedulers' options that this one has no form of
_FOREIGN = ("sigma_data", "shift", "use_flow_sigmas", "sigma_min", "snr_shift_scale")


@dataclass
class CovarianceSchedulerOutput(SchedulerOutput):  # type: ignore[misc]
    """`prev_sample` x_s, `pred_original_sample` E[x0 | x_t] (clipped as configured), `variance` of the step, or None."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
    variance: Tensor | None = None


class CovarianceScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Ancestral steps with the covariance of x0 given the state: Cov[x_s | x_t] = variance I + gain^2 Cov[x0 | x_t].

    Constructor arguments as `DDPMScheduler`'s, and these: `eta`: None for the DDPM form, a number in [0, 1] for DDIM's (0 is
    still stochastic, through the covariance). `timestep_spacing`: diffusers' three or the authors' "linear", "power",
    "linear_ddim", "quad_ddim". `max_variance`: largest variance of an entry of x0, by default `clip_sample_range`^2 where
    samples are clipped and none elsewhere. `floor`: least r, for heads that are not positive. `noise_clip`: in the step into
    the last level before the data, at most so many grey levels of mean absolute noise (the authors' 1 or 2; 0 is off; not for
    operators).
    `needs_covariance`: refuse a step without one, set by `attach`. Without a covariance a step has `variance_type`, as DDPM's.
    Source: Ou et al., ICLR 2025, arXiv 2406.10808; Bao et al., arXiv 2201.06503.
    """

    # a saved pipeline names this module, which must be imported before it is loaded: `import noisewise` is enough
    __module__ = "noisewise"
    _compatibles: list[str] = ["DDPMScheduler", "DDIMScheduler"]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float | int = 0.0001,
        beta_end: float | int = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float | int = 0.995,
        clip_sample_range: float | int = 1.0,
        sample_max_value: float | int = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        eta: float | int | None = None,
        max_variance: float | int | None = None,
        floor: float | int = 0.0,
        noise_clip: float | int = 0.0,
        needs_covariance: bool = False,
    ) -> None:
        if timestep_spacing not in _SPACINGS:
            raise InvalidInput(f"timestep_spacing must be one of {_SPACINGS}, got {timestep_spacing!r}")
        if variance_type not in _FIXED:
            raise InvalidInput(f"variance_type must be one of {_FIXED}, got {variance_type!r}")
        for name, value in (("floor", floor), ("noise_clip", noise_clip)):
            if not value >= 0:
                raise InvalidInput(f"{name} must be at least 0, got {value!r}")
        if max_variance is not None and not max_variance > 0:
            raise InvalidInput(f"max_variance must be above 0, got {max_variance!r}")
        try:
            # the tables of diffusers itself, so that the levels are to the last bit those of the other schedulers
            self._like = DDPMScheduler(
                num_train_timesteps=num_train_timesteps, beta_start=beta_start, beta_end=beta_end,
                beta_schedule=beta_schedule, trained_betas=trained_betas, prediction_type="epsilon",
                thresholding=thresholding, dynamic_thresholding_ratio=dynamic_thresholding_ratio,
                sample_max_value=sample_max_value, rescale_betas_zero_snr=rescale_betas_zero_snr,
            )  # fmt: skip
        except (NotImplementedError, TypeError) as error:
            raise InvalidInput(f"beta_schedule {beta_schedule!r} is unknown to diffusers: {error}") from error
        self.betas, self.alphas_cumprod = self._like.betas, self._like.alphas_cumprod
        self.levels = NoiseLevels.from_alphas_cumprod(
            self.alphas_cumprod, prediction_type, variance_type in ("learned", "learned_range")
        )
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._source: Callable[[Tensor, int], Any] | None = None
        self._cut, self._beyond = [0, 0], 0.0
        if eta is not None:
            reverse_step(self.levels.pair(1), self.levels.pair(0), eta)  # raises for another eta

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers', but a configuration of another family is refused instead of read past."""
        if isinstance(config, dict):
            # what the other class has by default is not what this one has
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
            name = config.get("_class_name", "")
            if "beta_schedule" not in config and "num_train_timesteps" not in kwargs:
                raise InvalidInput(
                    f"the configuration of {name or 'that object'} says no noise schedule (beta_schedule)"
                )
            foreign = [key for key in _FOREIGN if config.get(key) not in (None, False)]
            if "FlowMatch" in name or "EDM" in name or foreign:
                raise InvalidInput(
                    f"{name or 'that scheduler'} is not variance preserving ({', '.join(foreign) or 'flow matching'}): its "
                    "timesteps mean something else here; use NoiseLevels and posterior_variance for such a model"
                )
            if config.get("variance_type", "") is None:
                kwargs.setdefault("variance_type", "fixed_small")  # solvers of the ODE have none
            if "needs_covariance" not in config:
                # "leading", the default elsewhere, never visits the last level
                kwargs.setdefault("timestep_spacing", "linspace")
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: list[int] | None = None
    ) -> None:
        """The time steps to visit, noisy to clean, by number and `timestep_spacing`, or as a list that falls.

        Raises `InvalidInput` for fewer than 2 or more than T steps, and for a list that does not fall within 0 .. T-1.
        """
        total = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise InvalidInput("give either num_inference_steps or timesteps")
        if timesteps is not None:
            visited = [int(t) for t in timesteps]
            falls = all(later < earlier for earlier, later in itertools.pairwise(visited))
            if len(visited) < 2 or not falls or visited[0] >= total or visited[-1] < 0:
                raise InvalidInput(
                    f"timesteps must be at least two indices in 0 .. {total - 1} that fall, got {visited[:6]}; what "
                    "step_schedule gives counts from 1: [t - 1 for t in reversed(step_schedule(...))]"
                )
        else:
            assert num_inference_steps is not None
            rising = step_schedule(total, num_inference_steps, self.config.timestep_spacing)
            offset = self.config.steps_offset if self.config.timestep_spacing == "leading" else 0
            visited = [t - 1 + offset for t in reversed(rising)]
            if not 0 <= offset < total - max(rising) + 1:
                raise InvalidInput(
                    f"steps_offset={offset} moves {num_inference_steps} steps beyond the last of 0 .. {total - 1}: take fewer"
                )
        self.num_inference_steps = len(visited)
        self.timesteps = torch.tensor(visited, device=device)
        self._cut, self._beyond = [0, 0], 0.0

    def previous_timestep(self, timestep: int) -> int | None:
        """The time step after `timestep` in the direction of the data; None is the data. Raises `InvalidInput` for another."""
        visited = self.timesteps.tolist()
        if timestep not in visited:
            raise InvalidInput(f"time step {timestep} is not among those of set_timesteps: {visited[:5]}...")
        place = visited.index(timestep) + 1
        return visited[place] if place < len(visited) else None

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        eta: float | int | None = None,
        generator: Any = None,
        covariance: Any = None,
        use_clipped_model_output: bool | None = False,
        return_dict: bool = True,
    ) -> Any:
        """One reverse step; the last one gives E[x0 | x_t] without noise, and warns where most of x0 or its variance was cut.

        `covariance`: relative variance r in the shape of `sample`, or a `Covariance` operator of R = (a^2/s^2) Cov[x0 | x_t] on
        flattened events; by default what `attach` gave. `eta`: None is the configuration's. `use_clipped_model_output`: recompute
        the noise from the clipped x0. Everything inside is float32 at least; the result has the sample's dtype.
        Raises `InvalidInput` for shapes that do not fit, 2C channels that no configuration explains, a variance that is NaN,
        and a time step that was not set.
        """
        t = self._whole(timestep)
        output = first_channels(model_output, sample, self.levels.learned_variance)
        work = torch.promote_types(sample.dtype, torch.float32)
        x_t, output = sample.to(work), output.to(work)
        a, sigma = self.levels.pair(t)
        kind = PREDICTIONS[self.config.prediction_type]
        clean = denoised(kind, output, x_t, a, sigma)
        eps = output if kind == "epsilon" else (x_t - a * clean) / sigma
        given = None
        if self.previous_timestep(t) is not None:
            given = self._given(covariance, sample, t)
        mean, clean, variance = self._moved(
            x_t, clean, eps, t, given, eta, generator, model_output.dtype, bool(use_clipped_model_output)
        )
        if not return_dict:
            return (mean.to(sample.dtype), clean.to(sample.dtype))
        return CovarianceSchedulerOutput(mean.to(sample.dtype), clean.to(sample.dtype), variance)

    def move(self, prediction: Prediction, source: Source | None, generator: torch.Generator) -> Tensor:
        """x_s from what a `DiffusionModel` predicts at x_t, with the covariance of `source`; None is `variance_type`."""
        t = int(prediction.t[0])
        previous = self.previous_timestep(t)
        given = None
        if source is not None and previous is not None:
            given = self._scaled(source(prediction, previous), t)
        clean, eps, dtype = prediction.clean, prediction.eps, prediction.x_t.dtype
        moved = self._moved(prediction.x_t.to(clean), clean, eps, t, given, None, generator, dtype, False)[0]
        prediction.free()
        return moved.to(dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """a x0 + s eps at time steps [batch]."""
        return self._like.add_noise(original_samples, noise, timesteps)

    def attach_source(self, source: Callable[[Tensor, int], Any]) -> None:
        """What `attach` gives: a function of the sample and its time step, with Cov[x0 | x_t] in units of x0^2."""
        self._source = source

    def detach_source(self, source: Callable[[Tensor, int], Any]) -> None:
        """Forget `source`, unless another was attached since."""
        if self._source == source:
            self._source = None

    # --- parts of a step

    def _whole(self, timestep: Any) -> int:
        value = torch.as_tensor(timestep)
        if value.numel() != 1:
            raise InvalidInput(f"a step has one time step for the whole batch, got {value.flatten()[:8].tolist()}")
        return int(self.levels.index(value.reshape(()), 1, value.device)[0])

    def _clipped(self, clean: Tensor, t: int) -> Tensor:
        if self.config.thresholding:
            return self._like._threshold_sample(clean)
        if self.config.clip_sample:
            reach = float(self.config.clip_sample_range)
            a, s = self.levels.pair(t)
            if s <= _COUNTED * a:
                self._beyond = max(self._beyond, float((clean.abs() > _BEYOND * reach).double().mean()))
            return clean.clamp(-reach, reach)
        return clean

    def _moved(
        self,
        x_t: Tensor,
        clean: Tensor,
        eps: Tensor,
        t: int,
        given: Any,
        eta: float | int | None,
        generator: Any,
        dtype: torch.dtype,
        from_clipped: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x_s, the clipped x0 and the variance of the step."""
        (a, sigma), s = self.levels.pair(t), self.previous_timestep(t)
        clean = self._clipped(clean, t)
        if from_clipped:
            eps = (x_t - a * clean) / sigma
        step = reverse_step((a, sigma), self.levels.pair(s), self.config.eta if eta is None else eta)
        mean = step.mean(clean, eps, x_t)
        if s is None:
            self._warn_cut()
            return mean, clean, None
        noise, variance = self._noise(given, step, s, dtype, mean, generator)
        return mean + noise, clean, variance

    def _scaled(self, found: Any, t: int) -> Any:
        """What a source gives, bounded; an operator with its factor."""
        return self._bounded(found, t) if isinstance(found, Tensor) else (found, 1.0)

    def _given(self, covariance: Any, sample: Tensor, t: int) -> Any:
        """Cov[x0 | x_t]: variances, clipped and checked; an operator with its scale; or None."""
        a, s = self.levels.pair(t)
        if covariance is None and self._source is not None:
            return self._scaled(self._source(sample, t), t)
        if covariance is None:
            if self.config.needs_covariance:
                raise InvalidInput(
                    "this scheduler was set up for a covariance head, and none is attached: attach(pipeline, head, scheduler), "
                    "or step(..., covariance=r)"
                )
            return None
        if isinstance(covariance, Tensor) and covariance.shape != sample.shape:
            raise InvalidInput(
                f"covariance must have the shape of the sample, {tuple(sample.shape)}, got {tuple(covariance.shape)}"
            )
        if a == 0:
            # nothing is known of x0 there, and r is 0 / 0 of it: the variance of the data, or its bound
            return torch.full_like(sample, self._largest if math.isfinite(self._largest) else 1.0)
        if not isinstance(covariance, Tensor):
            return covariance, (s / a) ** 2
        return self._bounded(covariance.to(torch.promote_types(covariance.dtype, torch.float32)) * (s / a) ** 2, t)

    @property
    def _largest(self) -> float:
        if self.config.max_variance is not None:
            return float(self.config.max_variance)
        return float(self.config.clip_sample_range) ** 2 if self.config.clip_sample else math.inf

    def _bounded(self, variance: Tensor, t: int) -> Tensor:
        a, s = self.levels.pair(t)
        low, high = (float(edge) for edge in variance.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InvalidInput("the covariance is NaN or infinite: was the head fitted, on this network and its scale?")
        least = self.config.floor * (s / a) ** 2 if a > 0 else 0.0
        if s <= _COUNTED * a:
            self._cut[1] += variance.numel()
            if low < 0 or high > self._largest:
                self._cut[0] += int(((variance > self._largest) | (variance < 0)).sum())
        return variance.clamp(min(least, self._largest), self._largest)

    def _noise(
        self, given: Any, step: Any, s: int, dtype: torch.dtype, mean: Tensor, generator: Any
    ) -> tuple[Tensor | float, Tensor | None]:
        """The noise of the step, and its variance where that is a diagonal."""
        cap = math.inf
        if self.config.noise_clip and s == min(self.timesteps.tolist()):
            # E|N(0, v)| = sqrt(2 v / pi), in grey levels of 2 / 255
            cap = (self.config.noise_clip * 2 / 255 * math.sqrt(math.pi / 2)) ** 2
        if given is None:
            large = self.config.variance_type.startswith("fixed_large") and step.noise == 0
            value = min(step.large if large else step.variance, cap)
            if value == 0:
                return 0.0, None
            drawn = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=dtype).to(mean.dtype)
            return math.sqrt(value) * drawn, torch.full_like(mean, value)
        drawn = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=dtype).to(mean.dtype)
        if isinstance(given, Tensor):
            variance = (step.variance + step.gain**2 * given.to(mean)).clamp(max=cap)
            return variance.sqrt() * drawn, variance
        operator, scale = given
        if self.config.noise_clip:
            raise InvalidInput("noise_clip cuts variances of pixels, which an operator does not have: noise_clip=0")
        if isinstance(generator, list):
            raise InvalidInput("a covariance operator draws the whole batch at once: give one generator, not a list")
        own = generator if generator is not None else torch.Generator(mean.device).manual_seed(_from_global())
        correlated = operator.sample(own).reshape(mean.shape).to(mean)
        return math.sqrt(step.variance) * drawn + step.gain * math.sqrt(scale) * correlated, None

    def _warn_cut(self) -> None:
        cut, total = self._cut
        if total and cut > _CUT * total:
            warnings.warn(
                f"{cut / total:.0%} of the variances of x0 were below 0 or above max_variance {self._largest:g} and were cut: "
                "the head is not fitted to this scale of the data, max_variance is too small (latents are not in [-1, 1]), or "
                "the network is trained too little to know x0 at all",
                NoisewiseWarning,
                stacklevel=4,
            )
        if self._beyond > _CUT:
            warnings.warn(
                f"x0 was cut to clip_sample_range {self.config.clip_sample_range:g}, beyond which {self._beyond:.0%} of its "
                "entries lay at one step: data that are not in [-1, 1] (vectors, latents) want clip_sample=False; or the network "
                "is trained too little to know x0 at all",
                NoisewiseWarning,
                stacklevel=4,
            )
        self._cut, self._beyond = [0, 0], 0.0


def _from_global() -> int:
    # without a generator diffusers draws from torch's own; so does this, once
    return int(torch.randint(2**31, (1,), generator=None))

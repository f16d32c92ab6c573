"""`attach`: a covariance head, or Lanczos' process, in a diffusers pipeline, by hooks on its network."""

from typing import Any

import torch
from torch import Tensor

from noisewise.denoising.covariance import Covariance
from noisewise.denoising.models import denoised
from noisewise.diffusion.head import CovarianceHead
from noisewise.diffusion.levels import PREDICTIONS
from noisewise.diffusion.model import (
    DiffusionModel,
    Prediction,
    declares_variance,
    first_channels,
    module_at,
    tensor_of,
)
from noisewise.diffusion.scheduler import CovarianceScheduler
from noisewise.diffusion.sources import Source, as_source
from noisewise.errors import InvalidInput
from noisewise.typing import check_count

__all__ = ["Attachment", "attach"]

_GUIDANCE = ("conditional", "extrapolate")
_TRUNKS = ("unet", "transformer")


def attach(
    pipeline: Any,
    covariance: Any,
    scheduler: CovarianceScheduler | None = None,
    *,
    guidance: str = "conditional",
    guidance_scale: float | int | None = None,
    rank: int = 3,
    seed: int = 0,
) -> "Attachment":
    """Let `pipeline` sample with the covariance of x0: its scheduler becomes `scheduler`, its network gets hooks.

    `covariance`: a fitted `CovarianceHead`, "lanczos" (the whole matrix, `rank` backward passes and one more network call a
    step), or a source of `noisewise.diffusion.sources`. `scheduler` defaults to the pipeline's own configuration read as a
    `CovarianceScheduler`. Under classifier-free guidance the variance is that of the conditional branch, or "extrapolate",
    (1 - w) r_u + w r_c with `guidance_scale` w, cut at 0. The network is not changed; `Attachment.detach` takes the hooks off.

    Raises `InvalidInput` for a head of another network or schedule, a pipeline without `unet` or `transformer`, and clipping of
    x0 in a latent model; at sampling for a network in training mode.
    """
    if guidance not in _GUIDANCE:
        raise InvalidInput(f"guidance must be one of {_GUIDANCE}, got {guidance!r}")
    if (guidance == "extrapolate") != (guidance_scale is not None):
        raise InvalidInput("guidance_scale belongs to guidance='extrapolate', and is needed there")
    network = next((found for name in _TRUNKS if (found := getattr(pipeline, name, None)) is not None), None)
    if network is None:
        raise InvalidInput(
            f"{type(pipeline).__name__} has neither of {_TRUNKS}: attach needs the network that predicts noise"
        )
    if scheduler is None:
        scheduler = CovarianceScheduler.from_config(pipeline.scheduler.config)
    if not isinstance(scheduler, CovarianceScheduler):
        raise InvalidInput(
            f"scheduler must be a CovarianceScheduler, got {type(scheduler).__name__}: use its from_config"
        )
    if getattr(pipeline, "vae", None) is not None and scheduler.config.clip_sample:
        raise InvalidInput("latents do not lie in [-1, 1]: clip_sample=False in the scheduler of a latent model")
    generator = torch.Generator(next(network.parameters()).device).manual_seed(check_count("seed", seed, 0))
    source = as_source(covariance, generator, rank=rank)
    if source is None:
        raise InvalidInput("nothing to attach: give a CovarianceHead or 'lanczos'")
    head = getattr(source, "head", None)
    if head is not None:
        head.check_model(network, scheduler.levels)
    scheduler.register_to_config(needs_covariance=True)
    pipeline.scheduler = scheduler
    return Attachment(pipeline, network, source, scheduler, guidance_scale)


class Attachment:
    """The hooks that `attach` put on; `detach` takes them off."""

    def __init__(
        self, pipeline: Any, network: Any, source: Source, scheduler: CovarianceScheduler, scale: float | int | None
    ) -> None:
        self._pipeline = pipeline
        self._network, self._source, self._scheduler, self._scale = network, source, scheduler, scale
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._output: Tensor | None = None
        self._features: Tensor | None = None
        self._hooks = [network.register_forward_hook(self._after, with_kwargs=True)]
        if isinstance(head := getattr(source, "head", None), CovarianceHead):
            site = module_at(network, head.config.site)
            self._hooks.append(site.register_forward_pre_hook(self._at_site))
        scheduler.attach_source(self._variance)
        self._extra = getattr(pipeline, "prepare_extra_step_kwargs", None)
        if self._extra is not None:
            pipeline.prepare_extra_step_kwargs = self._without_its_own_eta

    def detach(self) -> None:
        """Take the hooks off; the scheduler stays in the pipeline and refuses steps until another covariance is attached."""
        for hook in self._hooks:
            hook.remove()
        if self._extra is not None and vars(self._pipeline).get("prepare_extra_step_kwargs") is not None:
            del self._pipeline.prepare_extra_step_kwargs
        self._scheduler.detach_source(self._variance)

    def _without_its_own_eta(self, generator: Any, eta: Any) -> dict[str, Any]:
        """The pipeline says eta=0 to any scheduler where its caller said nothing: the configuration then holds."""
        assert self._extra is not None
        options = dict(self._extra(generator, eta))
        return {name: value for name, value in options.items() if name != "eta" or value}

    def _at_site(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self._features = inputs[0].detach()

    def _after(self, module: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        if module.training:
            raise InvalidInput(
                f"{type(module).__name__} is in training mode, so dropout is on: .eval() before sampling"
            )
        self._call, self._output = (inputs, options), tensor_of(output).detach()

    def _variance(self, sample: Tensor, t: int) -> Tensor | Covariance:
        """Cov[x0 | x_t] of the call just made, for the rows of `sample`."""
        if self._output is None:
            raise InvalidInput("the scheduler was stepped before the pipeline's network was called")
        prediction = self._prediction(t)
        found = self._source(prediction, self._scheduler.previous_timestep(t))
        rows, called = len(sample), len(prediction.x_t)
        if self._scale is not None:
            if not isinstance(found, Tensor):
                raise InvalidInput("guidance='extrapolate' mixes variances of pixels: it needs a head")
            found = self._extrapolated(found, prediction.x_t, rows)
        elif called == 2 * rows and isinstance(found, Tensor):
            found = found[rows:]  # unconditional rows come first
        elif called != rows:
            raise InvalidInput(
                f"the network was called with {called} rows for {rows} samples: this guidance is not known here"
            )
        self._output = self._features = None
        return found

    def _extrapolated(self, variance: Tensor, x_t: Tensor, rows: int) -> Tensor:
        first, second = variance.chunk(2)
        w = float(self._scale or 0.0)
        if len(variance) == 2 * rows:
            return ((1 - w) * first + w * second).clamp(min=0)
        half = rows // 2
        if len(variance) != rows or rows % 2 or not torch.equal(x_t[:half], x_t[half:]):
            raise InvalidInput("guidance='extrapolate' needs both branches, and the network was called with one alone")
        # a pipeline that keeps both branches in the sample has the conditional one first
        return ((1 - w) * second + w * first).clamp(min=0).repeat(2, *(1,) * (variance.ndim - 1))

    def _prediction(self, t: int) -> Prediction:
        inputs, options = self._call
        x_t = inputs[0] if inputs else options.get("sample", options.get("hidden_states"))
        if x_t is None or self._output is None:
            raise InvalidInput("the network was called without its sample as the first argument")
        levels = self._scheduler.levels
        index = levels.index(t, len(x_t), x_t.device)
        if self._source.graph:
            named = {
                k: v for k, v in options.items() if k not in ("sample", "hidden_states", "timestep", "return_dict")
            }
            return DiffusionModel(self._network, levels).predict(x_t, index, True, **named)
        wide = x_t.float()
        a, s = levels.at(index, wide)
        output = first_channels(
            self._output, x_t, levels.learned_variance or declares_variance(self._network, x_t)
        ).float()
        clean = denoised(PREDICTIONS[levels.prediction], output, wide, a, s)
        eps = output if levels.prediction == "epsilon" else (wide - a * clean) / s
        return Prediction(wide, index, clean, eps, a, s, self._features)

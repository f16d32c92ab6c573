"""`CovarianceHead`: a small network on the features of a frozen one, which says how uncertain each pixel of x0 is."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.diffusion.levels import NoiseLevels
from noisewise.diffusion.model import Prediction, module_at
from noisewise.diffusion.reverse import reverse_step
from noisewise.errors import InvalidInput, NoisewiseWarning, RunFolderError, require
from noisewise.training import fingerprint

ConfigMixin, register_to_config = (
    getattr(require("diffusers.configuration_utils", "diffusion"), name)
    for name in ("ConfigMixin", "register_to_config")
)
ModelMixin = require("diffusers.models.modeling_utils", "diffusion").ModelMixin

__all__ = ["OBJECTIVES", "CovarianceHead", "weights_of"]

OBJECTIVES = ("ocm", "ocm_residual", "npr", "sn", "residual_nll", "vlb", "analytic")
_KINDS = ("simple", "complex")
# the least relative variance, as a share of the level's mean
_FLOOR = 1e-3
_SHIFT = math.log(math.e - 1)
# how near two fingerprints of weights are that differ by the rounding of half precision
_SAME = 0.02
# input of these modules, of which a trunk has at least one, is the last feature map before the output
_SITES = ("conv_norm_out", "norm_out", "conv_out")


class CovarianceHead(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """r(x_t, t), the posterior variance of each pixel of x0 in units of the noise's, (a^2/s^2) diag Cov[x0 | x_t].

    Made by `for_model`, trained by `fit_covariance`, saved and loaded as any diffusers model. With the "softplus" map
    r = rbar(t) (1e-3 + softplus(o + log(e - 1))) of the network's output o, which starts at 0: positive whatever was learned,
    and at first the mean rbar(t) of each level (buffers `residual` and `gamma`, E(x0 - E[x0 | x_t])^2 and E eps_hat^2 per
    pixel). "linear" is the authors' unconstrained r = 1 + o, kept for parity.
    Source: Ou, Zhang, Zhang, Xiao, Li & Barber, ICLR 2025, arXiv 2406.10808; the positive map is ours.
    """

    @register_to_config
    def __init__(
        self,
        features: int,
        channels: int,
        event: list[int],
        layout: str = "spatial",
        patch: int = 1,
        kind: str = "simple",
        parametrization: str = "softplus",
        objective: str = "ocm",
        site: str = "conv_norm_out",
        trunk: str = "",
        schedule: str = "",
        prediction: str = "epsilon",
        num_train_timesteps: int = 1000,
        weights: float | None = None,
    ) -> None:
        super().__init__()
        self.before = _Residual(features, layout, len(event)) if kind == "complex" else None
        self.norm = _norm(features, layout)
        # a range head interpolates between two logarithms of variance: one number a pixel as well
        self.out = _linear(features, channels * patch ** len(event), layout, len(event), 3)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        steps = num_train_timesteps
        self.register_buffer("a", torch.ones(steps, dtype=torch.float64))
        self.register_buffer("s", torch.ones(steps, dtype=torch.float64))
        self.register_buffer("residual", torch.full((steps,), math.nan, dtype=torch.float64))
        self.register_buffer("gamma", torch.full((steps,), math.nan, dtype=torch.float64))

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        kind: str = "simple",
        *,
        noise_schedule: Any,
        parity: bool = False,
        site: str | None = None,
        event: tuple[int, ...] | None = None,
        features: int | None = None,
        seed: int = 0,
    ) -> "CovarianceHead":
        """A head for `UNet2DModel`, `UNet2DConditionModel`, `DiTTransformer2DModel`, or any module with a named `site`.

        `kind`: "simple" (norm, SiLU, one convolution) or "complex" (a residual block that knows t before it). `site`: the
        module whose input is the feature; for another module than those three also its `event`, the shape [channel, *space] or
        [dim] of x0, and `features`, the feature's channels. `parity`: the authors' unconstrained map.
        `noise_schedule`: the scheduler that the model was trained with. The model is not changed. Raises `InvalidInput`.
        """
        if kind not in _KINDS:
            raise InvalidInput(f"kind must be one of {_KINDS}, got {kind!r}")
        levels = NoiseLevels.from_scheduler(noise_schedule)
        config = getattr(model, "config", {})
        patch = 1
        if site is None:
            site = next((name for name in _SITES if getattr(model, name, None) is not None), None)
            if site is None:
                raise InvalidInput(
                    f"{type(model).__name__} has none of the feature sites {_SITES}: name one, site='...', with event= (the "
                    "shape of x0) and features= (its channels)"
                )
        layer = module_at(model, site)
        if event is None:
            channels, size = config.get("in_channels"), config.get("sample_size")
            if channels is None or size is None:
                raise InvalidInput(
                    f"{type(model).__name__} says no in_channels and sample_size: give event=, the shape of x0"
                )
            event = (channels, *(size if isinstance(size, list | tuple) else (size, size)))
        layout = "vector" if len(event) == 1 else "spatial"
        if site == "norm_out" and config.get("patch_size"):
            layout, patch = "tokens", int(config["patch_size"])
        features = features or _width(layer)
        if features is None:
            raise InvalidInput(f"{type(layer).__name__} does not say how many channels it takes: give features=")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = cls(
                features=features, channels=event[0], event=list(event[1:]), layout=layout, patch=patch, kind=kind,
                parametrization="linear" if parity else "softplus", site=site, trunk=type(model).__name__,
                schedule=levels.digest, prediction=levels.prediction, num_train_timesteps=len(levels),
            )  # fmt: skip
        head.a.copy_(levels.a)
        head.s.copy_(levels.s)
        first = next(model.parameters(), None)
        return head if first is None else head.to(first.device)

    def forward(self, features: Float[Tensor, "batch *feature"], t: Tensor) -> Float[Tensor, "batch *event"]:
        """The raw output o, float32, for features at the site and time steps [batch]."""
        config = self.config
        h = features.to(self.out.weight.dtype)
        if self.before is not None:
            h = self.before(h, t)
        h = nn.functional.silu(self.norm(h))
        if config.layout != "tokens":
            return self.out(h)
        # tokens are patches in rows: [batch, token, patch * patch * channel]
        o, p, (height, width) = self.out(h), config.patch, config.event
        o = o.reshape(len(o), height // p, width // p, p, p, config.channels)
        return o.permute(0, 5, 1, 3, 2, 4).reshape(len(o), config.channels, height, width)

    def relative_variance(self, prediction: Prediction) -> Float[Tensor, "batch *event"]:
        """r at a prediction that holds features: at least 1e-3 of the level's mean for "softplus", anything for "linear".

        Raises `InvalidInput` for a head of a range ("vlb"), whose variance depends on the step: `implied_variance`.
        """
        objective = self.config.objective
        if objective == "vlb":
            raise InvalidInput(
                "a head fitted by 'vlb' gives the variance of a step, not of x0: use its implied_variance"
            )
        if objective == "analytic":
            gamma = self._at("gamma", prediction)
            return (1 - gamma).expand_as(prediction.clean)
        output = self.output(prediction)
        if objective == "sn":
            return output - prediction.eps.to(output).square()
        return output

    def output(self, prediction: Prediction) -> Float[Tensor, "batch *event"]:
        """What training compares with its target: r, or E eps^2 ("sn"), or the logit of a share ("vlb")."""
        return self.mapped(self._raw(prediction), prediction)

    def mapped(self, o: Float[Tensor, "batch *event"], prediction: Prediction) -> Float[Tensor, "batch *event"]:
        """`output` from the raw output."""
        if o.shape != prediction.clean.shape:
            raise InvalidInput(
                f"the head gives {tuple(o.shape)} where x_t is {tuple(prediction.clean.shape)}: it was made for another event"
            )
        if self.config.objective == "vlb":
            return o
        if self.config.parametrization == "linear":
            return 1 + o
        return self.mean_ratio(prediction) * _positive(o)

    def mean_variance(self, prediction: Prediction) -> Tensor:
        """E (x0 - E[x0 | x_t])^2 per entry of the level, to broadcast against x_t."""
        return self._at("residual", prediction)

    def share(self, o: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """The positive map: r over the level's mean, 1.001 at o = 0."""
        return _positive(o)

    def mean_ratio(self, prediction: Prediction) -> Tensor:
        """rbar(t), to broadcast against x_t."""
        return self._at("residual", prediction) * (prediction.a / prediction.s).square()

    def clean_variance(self, prediction: Prediction) -> Float[Tensor, "batch *event"]:
        """diag Cov[x0 | x_t] in units of x0^2, finite also where a = 0; for a linear map the level's mean stands in there."""
        mean = self._at("residual", prediction)
        if self.config.parametrization == "softplus" and self.config.objective in (
            "ocm",
            "ocm_residual",
            "npr",
            "residual_nll",
        ):
            return mean * _positive(self._raw(prediction))
        r = self.relative_variance(prediction)
        ratio = (prediction.s / prediction.a).square()
        return torch.where(prediction.a > 0, r * ratio.nan_to_num(posinf=0.0), mean.expand_as(r))

    def implied_variance(self, prediction: Prediction, previous: int | None) -> Float[Tensor, "batch *event"]:
        """Of a head fitted by "vlb": the Cov[x0 | x_t] with which the DDPM step from t to `previous` has the head's variance."""
        t = int(prediction.t[0])
        if previous is None:
            raise InvalidInput("a head fitted by 'vlb' knows no last step: give the level before the data")
        here, there = ((float(self.a[index]), float(self.s[index])) for index in (t, previous))
        step = reverse_step(here, there)
        share = self._raw(prediction).sigmoid()
        variance = torch.exp(share * math.log(step.large) + (1 - share) * math.log(step.variance))
        return (variance - step.variance) / step.gain**2

    def _raw(self, prediction: Prediction) -> Tensor:
        if prediction.features is None:
            raise InvalidInput(f"the prediction holds no features: make it with the head's site, {self.config.site!r}")
        return self(prediction.features, prediction.t)

    def _at(self, table: str, prediction: Prediction) -> Tensor:
        found = getattr(self, table)[prediction.t.to(self.a.device)]
        if not bool(torch.isfinite(found).all()):
            raise InvalidInput("this head was not fitted: fit_covariance(model, head, data)")
        shape = (-1,) + (1,) * (prediction.clean.ndim - 1)
        return found.to(device=prediction.clean.device, dtype=torch.float32).reshape(shape)

    def check_model(self, model: nn.Module, levels: NoiseLevels, fitting: bool = False) -> None:
        """Raise `InvalidInput` where `model` or its schedule is not what the head was made for.

        Warns (`NoisewiseWarning`) where the head was fitted on other weights, unless it is about to be fitted anew.
        """
        name = type(model).__name__
        if name != self.config.trunk:
            raise InvalidInput(f"the head was made for a {self.config.trunk}, got a {name}")
        # not by their names: another machine's tables differ in the last bits
        tables = ((levels.a, self.a.cpu().double()), (levels.s, self.s.cpu().double()))
        if (len(levels), levels.prediction) != (self.config.num_train_timesteps, self.config.prediction) or not all(
            torch.allclose(theirs, ours, rtol=2e-3, atol=1e-6) for theirs, ours in tables
        ):
            raise InvalidInput(
                "the head belongs to another noise schedule "
                f"({self.config.schedule}, {self.config.num_train_timesteps} steps of {self.config.prediction}, "
                f"got {levels.digest}, {len(levels)} of {levels.prediction}): r means something else there; fit another head"
            )
        width = _width(module_at(model, self.config.site))
        if width not in (None, self.config.features):
            raise InvalidInput(
                f"the head reads {self.config.features} channels, {name}.{self.config.site} takes {width}"
            )
        known = self.config.weights
        if (
            not fitting
            and known is not None
            and not math.isclose(known, weights_of(model), rel_tol=_SAME, abs_tol=_SAME)
        ):
            warnings.warn(
                f"the head was fitted on other weights of {name}, whose uncertainty it tells: fit it again on these",
                NoisewiseWarning,
                stacklevel=3,
            )

    @classmethod
    def from_pretrained(cls, folder: Any, **options: Any) -> "CovarianceHead":
        """As `ModelMixin.from_pretrained`; raises `RunFolderError` for the folder of another class, and an incomplete one."""
        if isinstance(folder, str | Path) and not (Path(folder) / "config.json").exists():
            # what `noisewise diffusion fit -o FOLDER` leaves
            inner = Path(folder) / "head"
            folder = inner if (inner / "config.json").exists() else folder
        try:
            found = cls.load_config(folder).get("_class_name")
            if found == cls.__name__:
                return super().from_pretrained(folder, **options)
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{folder} holds no saved CovarianceHead: {error}") from error
        raise RunFolderError(f"{folder} holds a saved {found!r}, not a CovarianceHead: load it with its own class")


def weights_of(network: nn.Module) -> float:
    """One number that other weights of the network do not have, and that a cast to half precision hardly changes."""
    return fingerprint([torch.zeros(1), *(weight.flatten()[:64] for weight in network.parameters())])


def _positive(o: Tensor) -> Tensor:
    return _FLOOR + nn.functional.softplus(o + _SHIFT)


class _Residual(nn.Module):
    """One residual block that is told the time: norm, SiLU, layer, plus a linear map of t's embedding, twice, and a skip."""

    def __init__(self, width: int, layout: str, space: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([_norm(width, layout) for _ in range(2)])
        self.layers = nn.ModuleList([_linear(width, width, layout, space, 3) for _ in range(2)])
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.channels_last = layout == "tokens"

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10_000) * torch.arange(32, device=x.device) / 32)
        angle = t.to(x.device)[:, None] * rates
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1).to(x))
        space = x.ndim - 2
        time = time[:, None, :] if self.channels_last else time.reshape(*time.shape, *(1,) * space)
        h = self.layers[0](nn.functional.silu(self.norms[0](x))) + time
        return x + self.layers[1](nn.functional.silu(self.norms[1](h)))


def _norm(width: int, layout: str) -> nn.Module:
    # of vectors and tokens each row alone; a map by groups of channels, as diffusion networks do
    return nn.GroupNorm(math.gcd(32, width), width) if layout == "spatial" else nn.LayerNorm(width)


def _linear(wide_in: int, wide_out: int, layout: str, space: int, kernel: int) -> Any:
    if layout != "spatial":
        return nn.Linear(wide_in, wide_out)
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    if space not in kinds:
        raise InvalidInput(f"an event must be [dim] or [channel, *space] with at most 3 axes of space, got {space}")
    return kinds[space](wide_in, wide_out, kernel, padding=kernel // 2)


def _width(layer: nn.Module) -> int | None:
    for name in ("num_channels", "in_channels", "in_features"):
        if isinstance(found := getattr(layer, name, None), int):
            return found
    shape = getattr(layer, "normalized_shape", None)
    return int(shape[-1]) if shape else None

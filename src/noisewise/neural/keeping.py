"""Saving and loading a fitted `DiKLSampler`: settings and numbers, never code or pickles."""

from pathlib import Path
from typing import Any

from torch import nn

from noisewise.errors import RunFolderError
from noisewise.neural.posterior import PosteriorSampler
from noisewise.neural.standard import Standardised
from noisewise.neural.training import Rates
from noisewise.noise import Corruption, NoiseSchedule
from noisewise.pretrained import read_pretrained, write_pretrained
from noisewise.typing import Cost

__all__ = ["load", "save"]

_NAME = "DiKLSampler"


def save(fitted: Any, folder: str | Path) -> Path:
    """Write a fitted sampler; a generator of the user's own is named, and must be given again when it is loaded."""
    standard, net = fitted.fitted()
    config = fitted.config() | {
        "skip": getattr(net, "skip", False),
        "cost": vars(fitted.cost),
        "history": fitted.history_,
        "steps": fitted.steps_,
        "warnings": list(fitted.warnings_),
        "interrupted": fitted.interrupted_,
    }
    tensors = {f"generator.{name}": value for name, value in net.state_dict().items()}
    if fitted.chain_draws_ is not None:
        tensors["chain_draws"] = fitted.chain_draws_
    return write_pretrained(folder, _NAME, config, tensors | {"mean": standard.mean, "scale": standard.scale})


def load(cls: Any, folder: str | Path, target: Any, generator: nn.Module | None, dim: int | None) -> Any:
    """Read what `save` wrote into a new object of `cls`, on `target`."""
    config, tensors = read_pretrained(folder, _NAME)
    try:
        if config["own_generator"] != (generator is not None):
            what = (
                f"a {config['generator']} of your own: give it as generator=" if generator is None else "a built-in one"
            )
            raise RunFolderError(f"this sampler was saved with {what}")
        own = {"generator": config["generator"] if generator is None else generator, "dim": dim}
        names = ("preset", "latent", "categories", "hidden", "depth", "weight", "standardize", "estimator", "seed")
        options = {name: config[name] for name in names}
        levels, posterior = config["schedule"], config["posterior"]
        options["schedule"] = None if levels is None else NoiseSchedule([Corruption(a, s) for a, s in levels])
        options["rates"] = Rates(**config["rates"])
        # a source of scores of the user's own is only named
        options["posterior"] = PosteriorSampler(**posterior) if isinstance(posterior, dict) else "chains"
        made = cls(target, **own, **options)
        if made.target.dim != config["dim"]:
            raise RunFolderError(
                f"{folder} holds a sampler of dim {config['dim']}, the target has dim {made.target.dim}"
            )
        net = made.make_generator(config["skip"])
        prefix = "generator."
        net.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        made.net_ = net.eval().requires_grad_(False)
        made.standard_ = Standardised(made.target, tensors["mean"], tensors["scale"], made.particles)
        made.cost, made.history_, made.steps_ = Cost(**config["cost"]), config["history"], config["steps"]
        made.chain_draws_ = tensors.get("chain_draws")
        made.warnings_, made.interrupted_ = tuple(config["warnings"]), config["interrupted"]
    except (KeyError, TypeError, RuntimeError) as error:
        which = (
            f"this version of {_NAME}" if generator is None else f"the {type(generator).__name__} given as generator="
        )
        raise RunFolderError(f"{folder} does not fit {which}: {error!r}") from error
    return made

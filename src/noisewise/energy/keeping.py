"""Saving and loading a fitted `MixtureScoreMatching`: settings and numbers, never code or pickles."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from noisewise.energy.bridged import Bridged, ResidualEnergy
from noisewise.energy.gaps import Clusters, Gap
from noisewise.energy.network import EnergyNet
from noisewise.energy.normalizer import LogNormalizer
from noisewise.energy.reference import Rescaled, StudentT, as_reference
from noisewise.errors import RunFolderError
from noisewise.metrics.modes import ModeWeights
from noisewise.pretrained import read_pretrained, write_pretrained
from noisewise.typing import Cost

__all__ = ["load", "save"]

_NAME = "MixtureScoreMatching"
# what a loaded model gets anew, or not at all
_LEFT_OUT = ("energy", "reference", "checkpoint", "progress", "max_seconds")


def save(fitted: Any, folder: str | Path) -> Path:
    """Write a fitted model. A module or density of the user's own is named, and must be given again when it is loaded."""
    bridge = fitted.bridged
    residual = isinstance(bridge.energy, ResidualEnergy)
    net = bridge.energy.net if residual else bridge.energy
    rescaled = isinstance(bridge.reference, Rescaled)
    inner = bridge.reference.inner if rescaled else bridge.reference
    known = isinstance(inner, StudentT)
    config = {
        "settings": {name: value for name, value in fitted.get_params().items() if name not in _LEFT_OUT},
        "energy": net.to_config() if isinstance(net, EnergyNet) else {"net": type(net).__name__},
        "own_energy": fitted.energy is not None,
        "residual": residual,
        "reference": fitted.reference if isinstance(fitted.reference, str) else type(inner).__name__,
        "rescaled": rescaled,
        "degrees": inner.degrees if known and math.isfinite(inner.degrees) else None,
        "normalizer": bridge.normalizer._asdict(),
        "total": bridge.total,
        "negative_mass": [fitted.negative_mass_, fitted.negative_mass_se_],
        "reach": fitted.clusters_.reach,
        "gaps": [list(gap) for gap in fitted.gaps_],
        "history": fitted.history_,
        "best_step": fitted.best_step_,
        "n_iter": fitted.n_iter_,
        "interrupted": fitted.interrupted_,
        "cost": vars(fitted.cost_),
        "rows": fitted.cluster_shares_.n,
        "draws": fitted.cluster_weights_.n,
        "warnings": list(fitted.warnings_),
    }
    tensors = {f"energy.{name}": value for name, value in net.state_dict().items()}
    tensors |= {"mean": fitted.mean_, "scale": fitted.scale_}
    tensors |= {"clusters.rows": fitted.clusters_.rows, "clusters.labels": fitted.clusters_.labels}
    for name, found in (("weights", fitted.cluster_weights_), ("shares", fitted.cluster_shares_)):
        tensors |= {f"clusters.{name}": found.weights, f"clusters.{name}.se": found.se}
    tensors["clusters.centres"] = fitted.cluster_centres_
    if known:
        tensors |= {"reference.mean": inner.mean, "reference.factor": inner.factor}
    return write_pretrained(folder, _NAME, config, tensors)


def load(cls: Any, folder: str | Path, energy: nn.Module | None, reference: Any) -> Any:
    """Read what `save` wrote into a new object of `cls`."""
    config, tensors = read_pretrained(folder, _NAME)
    try:
        made = cls(**config["settings"])
        net = _load_energy(config["energy"], tensors, energy)
        made.energy = net if config["own_energy"] else None
        made.mean_, made.scale_ = tensors["mean"], tensors["scale"]
        inner = _load_reference(config, tensors, reference)
        made.reference = config["reference"] if isinstance(inner, StudentT) and not config["rescaled"] else inner
        m = Rescaled(inner, made.mean_, made.scale_) if config["rescaled"] else inner
        whole = (ResidualEnergy(net, m) if config["residual"] else net).double().requires_grad_(False)
        made.clusters_ = Clusters(tensors["clusters.rows"], tensors["clusters.labels"], config["reach"])
        made.gaps_ = [Gap(*gap) for gap in config["gaps"]]
        made.history_, made.best_step_ = config["history"], config["best_step"]
        made.cost_, made.warnings_ = Cost(**config["cost"]), tuple(config["warnings"])
        made.n_iter_, made.interrupted_ = config["n_iter"], config["interrupted"]
        made.cluster_centres_ = tensors["clusters.centres"]
        made.cluster_weights_, made.cluster_shares_ = (
            ModeWeights(tensors[f"clusters.{name}"], tensors[f"clusters.{name}.se"], config[n])
            for name, n in (("weights", "draws"), ("shares", "rows"))
        )
        bridge = Bridged(whole, m, made.beta, LogNormalizer(**config["normalizer"]), float(made.floor), config["total"])
        made._set_fitted(bridge, *config["negative_mass"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise RunFolderError(f"{folder} does not fit this version of {_NAME}: {error!r}") from error
    return made


def _load_energy(config: dict[str, Any], tensors: dict[str, Tensor], given: nn.Module | None) -> nn.Module:
    weights = {name.removeprefix("energy."): value for name, value in tensors.items() if name.startswith("energy.")}
    if config["net"] is None:
        if given is not None:
            raise RunFolderError("this model was saved with a built-in network: leave energy out")
        return EnergyNet.from_config(config, weights)
    if given is None:
        raise RunFolderError(f"this model was fitted with a {config['net']} of your own: give it as energy=")
    # the copy is overwritten, the given one left alone
    given = EnergyNet.from_config(config, weights, net=_copied(given)) if "head" in config else _copied(given)
    given.load_state_dict(weights)
    return given


def _copied(module: nn.Module) -> nn.Module:
    import copy

    inner = module.net if isinstance(module, EnergyNet) else module
    return copy.deepcopy(inner)


def _load_reference(config: dict[str, Any], tensors: dict[str, Tensor], given: Any) -> Any:
    if "reference.mean" in tensors:
        if given is not None:
            raise RunFolderError(f"this model holds its reference ({config['reference']}): leave reference out")
        degrees = math.inf if config["degrees"] is None else config["degrees"]
        return StudentT(tensors["reference.mean"], tensors["reference.factor"], degrees)
    if given is None:
        raise RunFolderError(f"this model was fitted with a {config['reference']} of your own: give it as reference=")
    return as_reference(given)

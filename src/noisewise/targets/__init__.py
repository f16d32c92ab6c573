"""Targets to sample: the protocol, bridges from other libraries' models, and a zoo with known answers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "target": ["Target", "TorchTarget", "as_target", "check_start", "check_target"],
        "tilted": ["Tilt"],
        "gaussian_mixture": ["GaussianMixture", "gmm40", "two_modes"],
        "bananas": ["two_bananas"],
        # no file is named as the function it holds: importing the file would hide the function
        "double_wells": ["many_well"],
        "particles": ["double_well_4", "lennard_jones"],
        "neal_funnel": ["funnel"],
        "bayesian_network": ["bnn"],
        "posteriordb": ["posteriordb_mixture"],
        "numpy": ["from_numpy"],
        "jax": ["from_jax"],
        "numpyro": ["from_numpyro"],
        "pymc": ["from_pymc"],
    },
)

"""Neural samplers: networks trained on an unnormalised density alone, the posterior draws they learn from, what is measured."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dikl": ["DiKLSampler"],
        "evaluate": ["evaluate"],
        "pictures": ["distance_plot", "energy_plot", "sample_plot", "training_plot"],
        "posterior": ["PosteriorDraws", "PosteriorSampler", "fitted_variance"],
        "steps": ["StepSizes"],
        "training": ["Rates"],
    },
)

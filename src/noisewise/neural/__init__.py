"""Neural samplers: networks trained on an unnormalised density alone, and the posterior sampling they learn from."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "posterior": ["PosteriorDraws", "PosteriorSampler", "fitted_variance"],
        "steps": ["StepSizes"],
    },
)

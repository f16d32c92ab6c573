"""Neural samplers: what is measured of their samples."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "evaluate": ["evaluate"],
        "pictures": ["distance_plot", "energy_plot", "sample_plot"],
    },
)

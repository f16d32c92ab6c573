"""The few networks that several slices share."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"egnn": ["EGNN"], "mlp": ["MLP", "check_smooth"]}
)

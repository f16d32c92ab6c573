"""What `noisewise compare digs` runs: protocols A to D, every system at the same bill, each finished row kept at once."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "comparison": ["run"],
        "problem": ["Outcome", "Problem", "System"],
    },
)

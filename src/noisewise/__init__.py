"""noisewise: published methods for work where the ideal signal is missing, each measured against honest baselines."""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "comparison",
        "denoising",
        "diffusion",
        "energy",
        "errors",
        "metrics",
        "networks",
        "neural",
        "noise",
        "report",
        "retrieval",
        "runs",
        "sampling",
        "sequence",
        "targets",
        "typing",
    ],
    submod_attrs={
        # diffusers looks for the classes of a saved pipeline, and for their bases, in the top namespace
        "diffusion.head": ["CovarianceHead", "ModelMixin"],
        "diffusion.scheduler": ["CovarianceScheduler", "SchedulerMixin"],
        "errors": ["NoisewiseError", "NoisewiseWarning"],
        "sampling": ["sample"],
        "targets": ["as_target"],
    },
)

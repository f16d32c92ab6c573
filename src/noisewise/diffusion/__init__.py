"""Diffusion models: the optimal covariance of x0, few-step sampling and likelihood bounds with it, on diffusers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "fitting": ["fit_covariance"],
        "generate": ["generate"],
        "head": ["CovarianceHead"],
        "images": ["contact_sheet", "read_images", "write_images"],
        "levels": ["NoiseLevels"],
        "likelihood": ["vlb_bits_per_dim", "vlb_terms"],
        "pipeline": ["Attachment", "attach"],
        "scheduler": ["CovarianceScheduler"],
        "steps": ["step_schedule"],
        "sources": ["DctCovariance", "DctSource", "HeadSource", "LanczosSource", "ProbeSource", "fit_spectrum"],
        "uncertainty": ["Calibration", "calibration", "posterior_variance"],
    },
)

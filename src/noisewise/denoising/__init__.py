"""The denoising posterior p(x | x_t): as a target, through its score identities, and as the Gaussian of equal moments."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "covariance": ["Covariance", "DiagonalCovariance", "FullCovariance", "IsotropicCovariance"],
        "lanczos": ["KrylovCovariance"],
        "models": ["Denoiser", "Energy", "Score", "as_model"],
        "moments": ["GaussianPosterior", "gaussian_posterior", "isotropic_variance"],
        "posterior": ["DenoisingPosterior", "denoising_tilt"],
        "score": ["ScoreEstimate", "denoising_score", "mixed_score", "target_score"],
    },
)

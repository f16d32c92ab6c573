"""Energy-based models: networks, score matching, the mixture Fisher divergence that sees mode weights."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "divergence": ["fisher_divergence", "mixture_fisher_divergence"],
        "losses": ["dsm_loss", "mixture_fisher_loss", "score_matching_loss"],
        "mixture": ["MixtureScoreMatching"],
        "network": ["EnergyNet"],
        "normalizer": ["LogNormalizer", "bridge_sampling", "importance_sampling", "reverse_importance_sampling"],
        "reference": ["gaussian_reference", "student_t_reference"],
        "training": ["fit_energy"],
    },
)

"""What is measured and how comparisons are recorded: sample distances, mode weights, paired differences, results."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "distances": ["energy_distance", "mmd2", "wasserstein2"],
        "floors": ["Floor", "sample_floor"],
        "frechet": ["frechet_distance"],
        "measurement": ["Measurement", "format_value"],
        "modes": [
            "ModeWeights",
            "assign_modes",
            "histogram_total_variation",
            "label_ess",
            "mode_flips",
            "mode_weights",
            "modes_found",
            "total_variation",
        ],
        "particles": [
            "distance_tvd",
            "energy_quantiles",
            "energy_tvd",
            "energy_wasserstein",
            "symmetrised",
            "wasserstein2_modulo",
        ],
        "paired": ["PairedDifference", "paired_difference"],
        "precision_recall": ["PrecisionRecall", "precision_recall"],
        "results": ["Results", "Row", "SystemSummary", "describe_environment"],
    },
)

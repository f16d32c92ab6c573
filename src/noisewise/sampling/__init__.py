"""Markov chain samplers for unnormalised densities: DiGS, its fitted variant, and the peers they are measured against."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "denoising_gibbs": ["DenoisingGibbs"],
        "diagnostics": ["Modes", "find_modes"],
        "digs": ["DiGS"],
        "draws": ["Draws"],
        "fitted": ["FittedDiGS"],
        "hmc": ["HMC"],
        "kernel": ["ChainState", "Kernel"],
        "mala": ["MALA", "ULA"],
        "loop": ["sample"],
        "plan": ["Budget"],
        "smc": ["TemperedSMC"],
        "tempering": ["ParallelTempering"],
        "walk_jump": ["NoisyLangevin", "WalkJump"],
    },
)

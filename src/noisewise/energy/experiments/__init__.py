"""What `noisewise compare` runs for MFD, and for MM-Gibbs, whose energies are trained here; a folder each."""

__all__: list[str] = []

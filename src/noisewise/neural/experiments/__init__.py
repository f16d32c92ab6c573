"""What `noisewise compare` runs for DiKL, in a folder."""

__all__: list[str] = []

"""What `noisewise compare` runs for diffusion models, a method to a folder."""

__all__: list[str] = []

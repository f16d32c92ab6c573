"""What `noisewise compare` runs for sequence models, a method to a folder."""

__all__: list[str] = []

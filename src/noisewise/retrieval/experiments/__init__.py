"""What `noisewise compare` runs for retrieval, a method to a folder."""

__all__: list[str] = []

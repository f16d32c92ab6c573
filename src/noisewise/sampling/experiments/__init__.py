"""What `noisewise compare` runs for the methods of this slice, a folder each."""

__all__: list[str] = []

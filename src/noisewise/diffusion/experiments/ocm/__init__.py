"""What `noisewise compare ocm` runs."""

__all__: list[str] = []

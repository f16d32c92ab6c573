"""Diffusion models: what a pretrained one lacks."""

__all__: list[str] = []

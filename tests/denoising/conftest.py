"""Fixtures of the denoising tests."""

import jaxtyping
import pytest


@pytest.fixture
def shapes_unchecked(monkeypatch):
    """Long statistical runs go without the run-time shape checks, which more than double their time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

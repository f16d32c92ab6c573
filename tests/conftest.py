"""Threads are set here, so that no test depends on how many cores a machine has; gpu tests skip without a GPU."""

import os
import signal

import jaxtyping
import pytest
import torch

# a floating-point sum depends on how it is cut into threads; 2 at most, as on the smallest machine that runs the tests
torch.set_num_threads(max(1, min(2, int(os.environ.get("OMP_NUM_THREADS") or 2))))


def pytest_configure(config: pytest.Config) -> None:
    # not in pyproject.toml: pytest would import noisewise for the category before jaxtyping can hook its import
    config.addinivalue_line("filterwarnings", "error::noisewise.errors.NoisewiseWarning")
    # a job in the background ignores Ctrl-C, which tests send
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def shapes_unchecked(monkeypatch):
    """Long statistical runs go without the run-time shape checks, which more than double their time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

"""Speed and size of Gaussian denoising posteriors: a batch against one point at a time, and Lanczos against a matrix."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interleaved import compared, environment, interleaved
from torch.utils._python_dispatch import TorchDispatchMode

from noisewise.denoising import Energy, gaussian_posterior
from noisewise.energy import EnergyNet
from noisewise.files import write_atomically
from noisewise.noise import Corruption

NOISE = Corruption(1.0, 0.3)
RESULTS = Path(__file__).parent / "results" / "denoising.json"
ROUNDS = 5
BATCH, ONE_BY_ONE = "1000 chains in one batch", "one chain at a time"


class Counted(torch.nn.Module):
    """An energy that counts its evaluations."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = EnergyNet(dim, hidden=hidden)
        # eigenvalues of the covariance from nearly none of the noise to all of it
        self.curvature = torch.linspace(0.1, 11.0, dim)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(x) + 0.5 * (self.curvature * x.square()).sum(-1)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def results(pytestconfig):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    yield found
    torch.set_num_threads(before)
    if len(found) == 2:
        write_atomically(
            RESULTS, json.dumps({"command": "make bench", "environment": environment(), **found}, indent=2) + "\n"
        )
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + json.dumps(found, indent=2))


def test_full_covariances_of_a_batch_against_one_point_at_a_time(results):
    model, x_t = Energy(EnergyNet(2, hidden=64)), torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))

    def draw(points: torch.Tensor) -> torch.Tensor:
        return gaussian_posterior(model, points, NOISE).sample(torch.Generator().manual_seed(1))

    together = gaussian_posterior(model, x_t, NOISE)
    alone = [gaussian_posterior(model, row, NOISE) for row in x_t[:50].split(1)]
    torch.testing.assert_close(together.mean[:50], torch.cat([one.mean for one in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        together.covariance.dense()[:50], torch.cat([one.covariance.dense() for one in alone]), rtol=1e-3, atol=1e-6
    )
    seconds = interleaved({BATCH: lambda: draw(x_t), ONE_BY_ONE: lambda: [draw(row) for row in x_t.split(1)]}, ROUNDS)
    results["full covariance, d = 2, 1000 chains"] = compared(seconds, BATCH, ONE_BY_ONE)


def test_a_krylov_draw_makes_few_products_and_no_matrix(results):
    dim, rank, batch = 4096, 8, 4
    energy = Counted(dim, 256)
    x_t = torch.randn(batch, dim, generator=torch.Generator().manual_seed(0))
    evaluations = 0
    original = torch.autograd.grad

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal evaluations
        evaluations += 1
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, Largest() as largest:
        patch.setattr(torch.autograd, "grad", counted)
        posterior = gaussian_posterior(Energy(energy), x_t, NOISE, covariance="krylov", rank=rank)
        posterior.sample(torch.Generator().manual_seed(1))
    matrix = dim * dim * x_t.element_size()
    results["krylov, rank 8, d = 4096"] = {
        "energy evaluations": energy.calls,
        "derivatives (one score, then products)": evaluations,
        "largest tensor in bytes": largest.bytes,
        "one d x d matrix in bytes": matrix,
    }
    assert energy.calls == 1
    assert evaluations <= 1 + rank
    assert largest.bytes < matrix

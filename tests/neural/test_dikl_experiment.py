"""`noisewise compare dikl` at quick scale, and the ceiling that its table shows."""

import pytest
import torch

from noisewise.neural.experiments import dikl
from noisewise.neural.experiments.dikl.problems import forty_modes_in
from noisewise.neural.experiments.dikl.systems import ExactScore
from noisewise.neural.standard import Standardised
from noisewise.targets import GaussianMixture, gmm40


@pytest.mark.slow
def test_dikl_at_quick_scale_covers_more_modes_than_reverse_kl(tmp_path, shapes_unchecked):
    results = dikl.run("quick", out=tmp_path, progress=False)
    rows = {row.system: row.measurements for row in results.rows}
    assert list(rows) == ["DiKL", "reverse KL", "parallel tempering"]
    covered = {name: row["modes covered"].value for name, row in rows.items()}
    assert covered["DiKL"] > covered["reverse KL"]
    # parallel tempering has as many calls, and no network between it and the density
    assert rows["parallel tempering"]["TV of mode weights"].value < rows["DiKL"]["TV of mode weights"].value
    assert "<figure>" in (tmp_path / "report.html").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    dikl.run("quick", out=tmp_path, progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()} == stamps


@pytest.mark.parametrize("make", [gmm40, lambda: forty_modes_in(8)])
def test_the_exact_noisy_score_is_that_of_the_widened_mixture(make):
    # the noise is isotropic on the standardised scale, so anisotropic on the target's
    target = make()
    scale = torch.linspace(15.0, 25.0, target.dim)
    standard = Standardised(target, torch.ones(target.dim), scale)
    noisy, sigma = torch.randn(6, target.dim, generator=torch.Generator().manual_seed(0)), torch.full((6,), 0.3)
    found = ExactScore().draw(standard, noisy, sigma, None, torch.Generator()).noisy_score("denoising")
    widened = GaussianMixture(target.means, target.full_covariances + torch.diag((0.3 * scale) ** 2), target.weights)
    assert torch.allclose(found, scale * widened.score(standard.to_x(noisy)), atol=1e-4)

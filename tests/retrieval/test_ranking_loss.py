"""The loss is log K of K equals, InfoNCE of one positive, the mean of two for two, and a bound of information."""

import itertools
import math

import numpy as np
import pytest
import torch
from lookup_augment import Lookup

from noisewise.errors import InvalidInput
from noisewise.retrieval.joint import JointEncoder
from noisewise.retrieval.loss import LogitScale, information_bound, ranking_loss


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_positive(queries, candidates):
    return torch.eye(queries, candidates, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 50])
def test_equal_candidates_cost_log_k(k):
    target = torch.rand(3, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    for smoothing in (0.0, 0.2):
        loss = ranking_loss(torch.full((3, k), 0.7, dtype=torch.float64), target, smoothing=smoothing)
        assert float(loss) == pytest.approx(math.log(k), abs=1e-12)


def test_without_the_small_part_it_is_the_black_boxes_infonce():
    model = JointEncoder(Lookup(12, 3), 8, weighting=0.0)
    black = drawn(12, 8)
    e = model.encode([str(i) for i in range(12)], black, "query")
    scale = LogitScale(20.0)
    loss = ranking_loss(scale(e[:5] @ e[5:].T), one_positive(5, 7))
    unit = black.numpy() / np.linalg.norm(black.numpy(), axis=1, keepdims=True)
    s = 20 * unit[:5] @ unit[5:].T
    expected = np.mean(np.log(np.exp(s).sum(1)) - np.diag(s))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_two_equal_positives_are_the_mean_of_both_also_in_the_gradient():
    scores = drawn(4, 9).requires_grad_()
    both = torch.zeros(4, 9, dtype=torch.float64)
    first, second = both.clone(), both.clone()
    first[:, 2], second[:, 5] = 1, 1
    loss = ranking_loss(scores, 3 * (first + second))
    mean = (ranking_loss(scores, first) + ranking_loss(scores, second)) / 2
    assert float(loss.detach()) == pytest.approx(float(mean.detach()), abs=1e-12)
    grads = [torch.autograd.grad(value, scores)[0] for value in (loss, mean)]
    assert torch.allclose(*grads, atol=1e-14)
    assert torch.autograd.gradcheck(lambda s: ranking_loss(s, first + second, smoothing=0.1), scores)


def test_it_is_least_where_the_model_is_the_target():
    target = torch.rand(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    share = target / target.sum(1, keepdim=True)
    entropy = -(share * share.log()).sum(1).mean()
    scores = (target.log() + 5).requires_grad_()
    loss = ranking_loss(scores, target)
    assert float(loss.detach()) == pytest.approx(float(entropy), abs=1e-12)
    assert float(torch.autograd.grad(loss, scores)[0].abs().max()) < 1e-12


def test_what_is_not_allowed_might_as_well_not_be_there():
    scores, target = drawn(4, 9).requires_grad_(), one_positive(4, 9)
    allowed = torch.rand(4, 9, generator=torch.Generator().manual_seed(5)) < 0.6
    allowed |= target > 0
    loss = ranking_loss(scores, target, allowed, smoothing=0.1)
    rows = [ranking_loss(s[a].unsqueeze(0), t[a].unsqueeze(0), smoothing=0.1)
            for s, t, a in zip(scores, target, allowed, strict=True)]  # fmt: skip
    assert float(loss.detach()) == pytest.approx(float(torch.stack(rows).mean().detach()), abs=1e-12)
    grad = torch.autograd.grad(loss, scores)[0]
    assert bool((grad[~allowed] == 0).all())
    assert bool(grad.isfinite().all())


def test_sampled_candidates_approach_the_whole_sum_from_below():
    n, rows, batches = 256, 100, 40
    scores = 2 * drawn(n)
    full = float(scores.logsumexp(0))
    generator = torch.Generator().manual_seed(3)
    means, errors = [], []
    for k in (4, 16, 64, n):
        first = torch.zeros(rows, k, dtype=torch.float64)
        first[:, 0] = 1
        found = []
        for _ in range(batches):
            sampled = scores[torch.rand(rows, n, generator=generator).argsort(1)[:, :k]]
            # a row's loss is its log-sum-exp without the score of its positive, here the first
            found.append(float(ranking_loss(sampled, first) + sampled[:, 0].mean()) + math.log(n / k))
        means.append(float(np.mean(found)))
        errors.append(float(np.std(found, ddof=1)) / math.sqrt(batches))
    assert means[-1] == pytest.approx(full, abs=1e-9)
    for (low, high), (a, b) in zip(itertools.pairwise(means), itertools.pairwise(errors), strict=True):
        assert low < high + 3 * math.hypot(a, b)
    assert full - means[0] > 3 * errors[0]


def test_the_information_of_gaussians_is_bounded_and_nearly_reached():
    k, dims, information, batches = 512, 4, 2.0, 12
    r = math.sqrt(1 - math.exp(-2 * information / dims))
    bounds = []
    for seed in range(batches):
        q = drawn(k, dims, seed=2 * seed)
        d = r * q + math.sqrt(1 - r * r) * drawn(k, dims, seed=2 * seed + 1)
        # the critic that is best: log p(d|q) - log p(d)
        difference = (d.unsqueeze(0) - r * q.unsqueeze(1)).square().sum(2)
        critic = -difference / (2 * (1 - r * r)) + d.square().sum(1) / 2
        bounds.append(information_bound(float(ranking_loss(critic, one_positive(k, k))), k))
    bounds = np.array(bounds)
    error = bounds.std(ddof=1) / math.sqrt(batches)
    assert bounds.max() <= math.log(k)
    assert bounds.mean() <= information + 4 * error
    assert bounds.mean() > information - 0.1


def test_the_learned_scale_stays_below_a_hundred():
    scale = LogitScale(90.0, learned=True)
    assert scale.log_scale.requires_grad
    assert not LogitScale().log_scale.requires_grad
    with torch.no_grad():
        scale.log_scale += 1
    assert float(scale(torch.ones(1, 1)).detach()) == pytest.approx(100)


def test_queries_without_a_positive_and_bad_settings_are_refused():
    target = one_positive(4, 9)
    target[2] = 0
    with pytest.raises(InvalidInput, match="query 2"):
        ranking_loss(drawn(4, 9), target)
    target[2, 1], target[2, 3] = 1, -1
    with pytest.raises(InvalidInput, match="query 2"):
        ranking_loss(drawn(4, 9), target)
    with pytest.raises(InvalidInput, match="smoothing"):
        ranking_loss(drawn(4, 9), one_positive(4, 9), smoothing=1.0)
    for scale in (0, 101):
        with pytest.raises(InvalidInput, match=str(scale)):
            LogitScale(scale)

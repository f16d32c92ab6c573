"""from_jax: precision follows the tensor, the user's configuration stays, errors come before any sampling."""

import sys

import numpy as np
import pytest
import torch

from noisewise.errors import InvalidInput, MissingExtra
from noisewise.targets import jax as bridge
from noisewise.targets.jax import from_jax

jax = pytest.importorskip("jax")
jnp = jax.numpy


def quartic(x):
    return -(x**4).sum(-1) + jnp.cos(x).sum(-1)


@pytest.fixture
def points():
    return torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batched", [False, True])
def test_float64_is_exact_and_the_configuration_is_untouched(points, batched):
    before = jax.config.jax_enable_x64
    value, score = from_jax(quartic, 3, batched=batched).log_prob_and_score(points)
    torch.testing.assert_close(value, -(points**4).sum(-1) + points.cos().sum(-1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(score, -4 * points**3 - points.sin(), rtol=1e-13, atol=1e-13)
    assert jax.config.jax_enable_x64 == before
    assert jnp.ones(2).dtype == (jnp.float64 if before else jnp.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32(points, dtype):
    x = points.to(dtype)
    value, score = from_jax(quartic, 3).log_prob_and_score(x)
    assert value.dtype == score.dtype == dtype
    torch.testing.assert_close(score, (-4 * x.float() ** 3 - x.float().sin()).to(dtype))


def test_a_score_that_jax_forwards_from_its_input_is_a_copy(points):
    target = from_jax(lambda x: (x * jax.lax.stop_gradient(x)).sum(), 3)
    kept = points.clone()
    score = target.log_prob_and_score(points)[1]
    score.fill_(9)
    torch.testing.assert_close(points, kept, rtol=0, atol=0)


def test_each_batch_shape_is_compiled_once(points):
    traces = []

    def counted(x):
        traces.append(x.dtype)
        return quartic(x)

    target = from_jax(counted, 3)
    target.log_prob_and_score(points)
    after_first = len(traces)
    for _ in range(3):
        target.log_prob_and_score(points)
    assert len(traces) == after_first
    target.log_prob_and_score(points[:2])
    assert len(traces) > after_first


def test_the_dlpack_road_gives_the_same_tree(points):
    compiled = jax.jit(lambda x: {"value": quartic(x), "input": x})
    x = points.float().T.contiguous().T
    expected, got = bridge.call_jax(compiled, x), bridge.over_dlpack(compiled, x)
    assert set(got) == {"value", "input"}
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    got["input"].fill_(9)
    torch.testing.assert_close(x, points.float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (lambda x: -(x**2), {}, r"log_prob must have shape \[5\].*got \[5, 3\]"),
        (lambda x: -(x**2).sum(), {"batched": True}, r"log_prob must have shape \[5\].*got \[\]"),
        (lambda x: -(x**2).sum(0), {"batched": True}, r"log_prob must have shape \[5\].*got \[3\]"),
        (lambda x: torch.as_tensor(x).sum(), {}, r"could not evaluate the function at x of shape \[5, 3\]"),
        (lambda x: 0.0 if x[0] > 0 else 1.0, {}, "TracerBoolConversionError.*jax.numpy operations"),
    ],
)
def test_functions_that_cannot_work_are_refused_at_the_first_call(points, fn, options, message):
    target = from_jax(fn, 3, **options)
    for call in (target.log_prob, target.log_prob_and_score):
        with pytest.raises(InvalidInput, match=message):
            call(points)


def test_numpy_data_serves_both_precisions_through_asarray(points):
    data = np.array([0.3, -0.2, 0.9])
    both = from_jax(lambda x: -((x - jnp.asarray(data, x.dtype)) ** 2).sum(), 3)
    for dtype in (torch.float32, torch.float64, torch.float32):
        value = both.log_prob(points.to(dtype))
        torch.testing.assert_close(value, -((points - torch.as_tensor(data)) ** 2).sum(-1).to(dtype))


@pytest.mark.skipif(not jax.__version__.startswith("0.10."), reason="a trait of JAX 0.10 that others may not have")
def test_numpy_data_fixed_to_another_precision_names_the_remedy(points):
    held = np.array([0.3, -0.2, 0.9])
    one = from_jax(lambda x: -((x - held) ** 2).sum(), 3)
    one.log_prob(points.float())
    with pytest.raises(InvalidInput, match=r"write jnp\.asarray\(data, x\.dtype\) inside"):
        one.log_prob(points)


def test_missing_jax_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(MissingExtra, match=r"pip install 'noisewise\[jax\]'"):
        from_jax(quartic, 3)

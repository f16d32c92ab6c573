"""Sampling and fitting hold no more tensors after many steps than after few."""

import gc

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from tiny_networks import head_for, schedule, unet

from noisewise.diffusion import CovarianceHead, attach, fit_covariance, generate

# a network of random weights knows nothing of x0, which is cut, with a warning
pytestmark = [
    pytest.mark.filterwarnings("ignore::noisewise.errors.NoisewiseWarning"),
    pytest.mark.usefixtures("shapes_unchecked"),
]


@pytest.fixture(autouse=True)
def _only_new_objects():
    # the millions that the libraries made need not be walked through at each count
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive():
    """Live tensors, and how many of them hold on to a graph."""
    gc.collect()
    # by type alone: isinstance asks the objects, of which lazy modules then import what they stand for
    found = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return len(found), sum(one.grad_fn is not None for one in found)


def during(network, call, first, last):
    """Live tensors at the network's calls of number `first` and `last`, on entry."""
    counts, calls = [], 0

    def look(module, inputs):
        nonlocal calls
        calls += 1
        if calls in (first, last):
            counts.append(alive())

    hook = network.register_forward_pre_hook(look)
    try:
        call()
    finally:
        hook.remove()
    assert len(counts) == 2
    return counts


@pytest.mark.parametrize("covariance", ["head", "probes", "lanczos"])
def test_generate_lets_go_of_each_step(covariance):
    net, scheduler = unet(), schedule()
    source = head_for(net, scheduler) if covariance == "head" else covariance
    draw = lambda: generate(net, scheduler, (2, 1, 8, 8), 50, source, probes=2, rank=2)  # noqa: E731
    early, late = during(net, draw, 5, 50)
    assert late == early
    before = alive()
    draw()
    assert alive() == before


@pytest.mark.parametrize("covariance", ["head", "lanczos"])
def test_a_pipeline_lets_go_of_each_step(covariance):
    net, scheduler = unet(), schedule()
    pipeline = DDPMPipeline(net, DDPMScheduler(num_train_timesteps=50, beta_end=0.2))
    pipeline.set_progress_bar_config(disable=True)
    attachment = attach(pipeline, head_for(net, scheduler) if covariance == "head" else covariance, rank=2)

    def draw():
        pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=50, output_type="np")

    # "lanczos" calls the network twice a step
    early, late = during(net, draw, 5, 49)
    assert late == early
    before = alive()
    draw()
    assert alive() == before
    attachment.detach()


@pytest.mark.parametrize("objective", ["ocm", "residual_nll"])
def test_a_fit_lets_go_of_each_step(objective):
    net, scheduler = unet(), schedule()
    head = CovarianceHead.for_model(net, noise_schedule=scheduler)
    rows = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def fit():
        return fit_covariance(
            net, head, rows, objective, noise_schedule=scheduler, steps=50, batch_size=8, validation=0.0
        )

    assert fit().steps == 50
    before = alive()
    # one call of the network at each of the 50 levels of the tables, then one a step
    early, late = during(net, fit, 50 + 5, 50 + 50)
    assert late == early
    assert alive() == before

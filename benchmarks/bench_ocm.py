"""OCM on a UNet of the digits: a training step in forward passes of the network, and what a head adds to a sampling step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interleaved import environment, interleaved

from noisewise.diffusion import CovarianceHead, CovarianceScheduler
from noisewise.diffusion.experiments.ocm.digit_images import digit_images, image_unet
from noisewise.diffusion.fitting import fit_covariance, frozen, noised
from noisewise.diffusion.model import DiffusionModel
from noisewise.diffusion.rows import Rows
from noisewise.diffusion.sources import HeadSource
from noisewise.diffusion.targets import npr_target, ocm_target
from noisewise.files import write_atomically

RESULTS = Path(__file__).parent / "results" / "ocm.json"
BATCH = 32
# as many images as one draws at once
DRAWN = 128

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


def _ready(kind: str) -> tuple[DiffusionModel, CovarianceHead, torch.Tensor]:
    torch.manual_seed(0)
    net = image_unet(8, (32, 64)).eval()
    x = digit_images()[0]
    schedule = CovarianceScheduler()
    head = CovarianceHead.for_model(net, kind, noise_schedule=schedule)
    fit_covariance(net, head, x[:64], noise_schedule=schedule, steps=1)
    return DiffusionModel(net, schedule.levels, head.config.site), head, x[:BATCH]


def _ratios(variants: dict[str, Any], base: str) -> dict[str, Any]:
    times = interleaved(variants, 60)
    return {name: _spread(times[name], times[base]) for name in variants}


def _spread(times: list[float], base: list[float]) -> dict[str, float]:
    ratios = sorted(t / b for t, b in zip(times, base, strict=True))
    n = len(ratios)
    return {"median": ratios[n // 2], "low": ratios[n // 10], "high": ratios[-1 - n // 10]}


@pytest.mark.parametrize("kind", ["simple"])
def test_a_training_step_in_forward_passes(results, kind):
    model, head, x = _ready(kind)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(head.parameters())

    def forward() -> None:
        with torch.no_grad():
            model.predict(x, 300)

    def train(target: str, probes: int = 1) -> None:
        prediction, _, eps = noised(model, Rows(x), generator, target == "ocm")
        aim = ocm_target(prediction, probes, generator) if target == "ocm" else npr_target(prediction, eps)
        prediction.free()
        loss = (head.output(prediction) - aim).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def authors() -> None:
        # the published loop: x_t in the graph of the head's features and of the constant denoising loss
        index = torch.randint(1000, (len(x),), generator=generator)
        a, s = model.levels.at(index, x)
        eps = torch.randn(x.shape, generator=generator)
        x_t = (a * x + s * eps).requires_grad_(True)
        kept: list[torch.Tensor] = []
        site = model.network.get_submodule(str(model.site))
        hook = site.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
        output = model.network(x_t, index).sample
        hook.remove()
        v = torch.randint(2, x.shape, generator=generator).float() * 2 - 1
        (pulled,) = torch.autograd.grad((output * v).sum(), x_t, retain_graph=True)
        aim = (-s * v * pulled).detach()
        loss = (head(kept[0], index) - aim).square().sum() + (output - eps).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with frozen(model.network):
        results["training_step_over_forward"] = _ratios(
            {
                "forward": forward,
                "OCM, one probe": lambda: train("ocm"),
                "OCM, two probes": lambda: train("ocm", 2),
                "residuals": lambda: train("npr"),
                "OCM, published loop": authors,
            },
            "forward",
        )


def test_a_sampling_step_with_a_head(results):
    x = torch.randn(DRAWN, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    variants: dict[str, Any] = {}
    for kind in ("simple", "complex"):
        model, head, _ = _ready(kind)
        scheduler = CovarianceScheduler()
        scheduler.set_timesteps(20)
        t = int(scheduler.timesteps[3])
        source = HeadSource(head)

        with torch.no_grad():
            prediction = model.predict(x, t)

        def plain(model: Any = model, scheduler: Any = scheduler, t: int = t) -> None:
            with torch.no_grad():
                scheduler.move(model.predict(x, t), None, torch.Generator().manual_seed(0))

        # the difference of two steps drowns in the noise of either
        def covariance(
            scheduler: Any = scheduler, source: Any = source, t: int = t, prediction: Any = prediction
        ) -> None:
            scheduler._scaled(source(prediction), t)

        variants |= {f"no head, {kind}": plain, f"head, {kind}": covariance}
    times = interleaved(variants, 60)
    results["head_over_sampling_step"] = {
        kind: _spread(times[f"head, {kind}"], times[f"no head, {kind}"]) for kind in ("simple", "complex")
    }

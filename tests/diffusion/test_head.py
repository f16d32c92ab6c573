"""The head: where it starts, what it reads, what it refuses, and what survives saving."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from tiny_networks import conditional_unet, dit, fitted, head_for, schedule, unet
from torch import nn

from noisewise.diffusion import CovarianceHead, NoiseLevels
from noisewise.diffusion.model import as_diffusion_model, first_channels
from noisewise.diffusion.reverse import reverse_step
from noisewise.errors import InvalidInput, RunFolderError


def noisy(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predicted(net, scheduler, head, x, t, **conditions):
    return as_diffusion_model(net, scheduler, head.config.site).predict(x, t, **conditions)


class Vectors(nn.Module):
    """Noise of events [dim], features of width 5 before `last`."""

    def __init__(self, dim=3):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(dim, 5), nn.Linear(5, dim)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x)))


class Films(nn.Module):
    """Noise of events [channel, frame, height, width]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv3d(2, 6, 3, padding=1), nn.Conv3d(6, 2, 3, padding=1)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x)))


def test_a_fresh_head_gives_the_mean_of_each_level_and_is_never_zero():
    scheduler, net = schedule(), unet()
    head = CovarianceHead.for_model(net, noise_schedule=scheduler)
    head.residual.copy_(torch.linspace(0.01, 0.4, 50))
    levels = scheduler.levels
    x, t = noisy(4, 1, 8, 8), torch.tensor([0, 10, 30, 49])
    prediction = predicted(net, scheduler, head, x, t)
    mean = (head.residual * (levels.a / levels.s) ** 2)[t].float().reshape(-1, 1, 1, 1)
    wanted = (1 + 1e-3) * mean.expand_as(x)
    torch.testing.assert_close(head.relative_variance(prediction), wanted, rtol=1e-6, atol=0)
    clean = (1 + 1e-3) * head.residual[t].float().reshape(-1, 1, 1, 1).expand_as(x)
    torch.testing.assert_close(head.clean_variance(prediction), clean, rtol=1e-6, atol=0)
    with torch.no_grad():
        head.out.bias.fill_(-1e6)  # whatever was learned
    torch.testing.assert_close(head.relative_variance(prediction), 1e-3 * mean.expand_as(x), rtol=1e-5, atol=0)


def test_variance_of_x0_is_r_in_other_units_and_finite_from_pure_noise():
    net = unet()
    scheduler = schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    x = noisy(2, 1, 8, 8)
    for parity in (False, True):
        head = head_for(net, scheduler, parity=parity)
        for t in (1, 25, 49):
            prediction = predicted(net, scheduler, head, x, t)
            a, s = scheduler.levels.pair(t)
            found = head.clean_variance(prediction)
            assert bool(torch.isfinite(found).all())
            if a > 0:
                r = head.relative_variance(prediction)
                torch.testing.assert_close(found, r * (s / a) ** 2, rtol=1e-5, atol=1e-6)
            elif parity:
                torch.testing.assert_close(found, torch.full_like(found, float(head.residual[t])))


def test_the_authors_map_is_one_plus_the_output():
    scheduler, net = schedule(), unet()
    fresh = CovarianceHead.for_model(net, noise_schedule=scheduler, parity=True)
    head = fitted(CovarianceHead.for_model(net, noise_schedule=scheduler, parity=True))
    x = noisy(2, 1, 8, 8)
    prediction = predicted(net, scheduler, head, x, 20)
    assert torch.equal(fresh.relative_variance(prediction), torch.ones_like(x))
    o = head(prediction.features, prediction.t)
    assert torch.equal(head.relative_variance(prediction), 1 + o)
    # the baselines' readings of the same output
    head.register_to_config(objective="sn")
    torch.testing.assert_close(head.relative_variance(prediction), 1 + o - prediction.eps.square())
    head.register_to_config(objective="analytic")
    torch.testing.assert_close(head.relative_variance(prediction), torch.full_like(x, 0.5))


def test_a_range_head_has_its_variance_between_the_two_fixed_ones():
    scheduler, net = schedule(), unet()
    head = head_for(net, scheduler)
    head.register_to_config(objective="vlb")
    prediction = predicted(net, scheduler, head, noisy(2, 1, 8, 8), 30)
    with pytest.raises(InvalidInput, match="implied_variance"):
        head.relative_variance(prediction)
    for previous in (29, 12, 0):
        step = reverse_step(scheduler.levels.pair(30), scheduler.levels.pair(previous))
        total = step.variance + step.gain**2 * head.implied_variance(prediction, previous)
        share = (total.log() - math.log(step.variance)) / (math.log(step.large) - math.log(step.variance))
        torch.testing.assert_close(share, head(prediction.features, prediction.t).sigmoid(), rtol=1e-3, atol=1e-4)
    with pytest.raises(InvalidInput, match="no last step"):
        head.implied_variance(prediction, None)


@pytest.mark.parametrize("kind", ["simple", "complex"])
def test_features_are_the_input_of_the_last_norm_and_the_network_is_not_changed(kind):
    scheduler = schedule()
    x = noisy(2, 4, 8, 8)
    cases = [
        (unet(channels=4), {}),
        (conditional_unet(), {"encoder_hidden_states": noisy(2, 3, 8)}),
        (dit(), {"class_labels": torch.tensor([1, 2])}),
    ]
    for net, conditions in cases:
        before = {name: value.clone() for name, value in net.state_dict().items()}
        head = head_for(net, scheduler, kind=kind)
        prediction = predicted(net, scheduler, head, x, 20, **conditions)
        r = head.relative_variance(prediction)
        assert r.shape == x.shape
        assert float(r.detach().std()) > 0
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        if hasattr(net, "conv_norm_out"):
            last = net.conv_out(net.conv_act(net.conv_norm_out(prediction.features)))
            torch.testing.assert_close(last, prediction.eps)
        # only the complex head knows the time beside what the features say
        other = head(prediction.features, prediction.t + 9)
        assert torch.equal(other, head(prediction.features, prediction.t)) == (kind == "simple")


def test_tokens_are_put_where_the_network_puts_its_own():
    net, scheduler = dit(out_channels=4), schedule()
    head = head_for(net, scheduler)
    seen = []
    hook = net.norm_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    x, t, label = noisy(2, 4, 8, 8), torch.tensor([7, 40]), torch.tensor([1, 2])
    net(x, t, label)
    hook.remove()
    # the network's own last part, with the head's layers in it
    net.norm_out, net.proj_out_2 = nn.Sequential(head.norm, nn.SiLU()), head.out
    nn.init.zeros_(net.proj_out_1.weight)
    nn.init.zeros_(net.proj_out_1.bias)
    torch.testing.assert_close(head(seen[0], t), net(x, t, label).sample)


def test_other_networks_say_where_their_features_are():
    scheduler = schedule()
    for net, options, x in (
        (Vectors(), {"event": (3,)}, noisy(5, 3)),
        (Films(), {"event": (2, 3, 4, 4)}, noisy(2, 2, 3, 4, 4)),
    ):
        for kind in ("simple", "complex"):
            head = head_for(net, scheduler, kind=kind, site="last", **options)
            prediction = predicted(net, scheduler, head, x, 20)
            torch.testing.assert_close(net.last(prediction.features), prediction.eps)
            r = head.relative_variance(prediction)
            assert r.shape == x.shape
            # rows do not mix
            alone = head.relative_variance(predicted(net, scheduler, head, x[1:2], 20))
            torch.testing.assert_close(alone, r[1:2], rtol=1e-5, atol=1e-6)
        with pytest.raises(InvalidInput, match="feature sites"):
            CovarianceHead.for_model(net, noise_schedule=scheduler)
        with pytest.raises(InvalidInput, match="has no module 'lst'; the last of its own: first, last"):
            CovarianceHead.for_model(net, noise_schedule=scheduler, site="lst", **options)
        with pytest.raises(InvalidInput, match="event="):
            CovarianceHead.for_model(net, noise_schedule=scheduler, site="last")
    unused = Vectors()
    unused.spare = nn.Linear(5, 3)
    with pytest.raises(InvalidInput, match="did not call its module 'spare'"):
        as_diffusion_model(unused, scheduler, "spare").predict(noisy(5, 3), 20)
    odd = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(InvalidInput, match="features="):
        CovarianceHead.for_model(odd, noise_schedule=scheduler, site="1", event=(3,))
    assert (
        CovarianceHead.for_model(odd, noise_schedule=scheduler, site="1", event=(3,), features=5).out.in_features == 5
    )
    with pytest.raises(InvalidInput, match="3 axes"):
        CovarianceHead.for_model(Films(), noise_schedule=scheduler, site="last", event=(2, 3, 4, 4, 4))


def test_the_same_seed_gives_the_same_head_and_the_global_generator_stays():
    scheduler, net = schedule(), unet()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = (
        CovarianceHead.for_model(net, "complex", noise_schedule=scheduler, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    weights = [head.before.layers[0].weight for head in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("options", [{}, {"kind": "complex"}, {"parity": True}])
def test_a_loaded_head_says_the_same(options, tmp_path):
    scheduler, net = schedule(), unet()
    head = head_for(net, scheduler, **options)
    head.register_to_config(objective="npr")
    head.save_pretrained(tmp_path)
    loaded = CovarianceHead.from_pretrained(tmp_path)
    prediction = predicted(net, scheduler, head, noisy(2, 1, 8, 8), 20)
    assert torch.equal(loaded.clean_variance(prediction), head.clean_variance(prediction))
    assert loaded.config.objective == "npr"
    assert loaded.a.dtype == loaded.residual.dtype == torch.float64
    assert not loaded.training
    loaded.check_model(net, scheduler.levels)


def test_a_folder_of_something_else_is_refused(tmp_path):
    unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(RunFolderError, match="UNet2DModel"):
        CovarianceHead.from_pretrained(tmp_path / "unet")
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere"):
        with pytest.raises(RunFolderError, match="no saved CovarianceHead"):
            CovarianceHead.from_pretrained(tmp_path / missing)
    head_for(unet(), schedule()).save_pretrained(tmp_path / "head")
    # a folder that a save left half written
    (tmp_path / "head" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RunFolderError):
        CovarianceHead.from_pretrained(tmp_path / "head")


def test_a_head_that_was_not_fitted_or_reads_nothing_says_so():
    scheduler, net = schedule(), unet()
    head = CovarianceHead.for_model(net, noise_schedule=scheduler)
    x = noisy(2, 1, 8, 8)
    with pytest.raises(InvalidInput, match="not fitted"):
        head.relative_variance(predicted(net, scheduler, head, x, 20))
    with pytest.raises(InvalidInput, match="not fitted"):
        head.clean_variance(predicted(net, scheduler, head, x, 20))
    with pytest.raises(InvalidInput, match="no features"):
        fitted(head).relative_variance(as_diffusion_model(net, scheduler).predict(x, 20))
    wide = unet(channels=3)
    with pytest.raises(InvalidInput, match="another event"):
        head.relative_variance(predicted(wide, scheduler, head, noisy(2, 3, 8, 8), 20))


def test_a_head_knows_its_network_and_its_schedule():
    scheduler, net = schedule(), unet()
    head = head_for(net, scheduler)
    head.check_model(net, scheduler.levels)
    with pytest.raises(InvalidInput, match="made for a UNet2DModel, got a UNet2DConditionModel"):
        head.check_model(conditional_unet(), scheduler.levels)
    for other in (schedule(beta_end=0.19), schedule(49), schedule(prediction_type="v_prediction")):
        with pytest.raises(InvalidInput, match="another noise schedule"):
            head.check_model(net, other.levels)
    # of the same schedule under another class of scheduler
    head.check_model(net, NoiseLevels.from_scheduler(DDPMScheduler(num_train_timesteps=50, beta_end=0.2)))
    # of tables that another machine has rounded otherwise
    abar = scheduler.alphas_cumprod.double()
    rounded = abar * (1 + 1e-7 * torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    head.check_model(net, NoiseLevels.from_alphas_cumprod(rounded))
    torch.manual_seed(0)
    broad = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    with pytest.raises(InvalidInput, match="reads 8 channels"):
        head.check_model(broad, scheduler.levels)
    with pytest.raises(InvalidInput, match="kind"):
        CovarianceHead.for_model(net, "large", noise_schedule=scheduler)


def test_two_halves_of_channels_are_a_variance_where_the_network_says_so():
    x = noisy(2, 4, 8, 8)
    net, scheduler = dit(), schedule()
    label = torch.tensor([1, 2])
    prediction = as_diffusion_model(net, scheduler).predict(x, 20, class_labels=label)
    assert torch.equal(prediction.eps, net(x, torch.tensor([20, 20]), label).sample[:, :4])
    with pytest.raises(InvalidInput, match="learned_range"):
        first_channels(torch.cat([x, x], 1), x, False)
    with pytest.raises(InvalidInput, match="must give the shape"):
        first_channels(x[:, :3], x, True)


def test_a_schedule_is_needed_and_known():
    with pytest.raises(InvalidInput, match="noise_schedule"):
        as_diffusion_model(unet(), None)
    with pytest.raises(InvalidInput, match="no alphas_cumprod"):
        as_diffusion_model(unet(), object())
    with pytest.raises(InvalidInput, match=r"torch\.nn\.Module"):
        as_diffusion_model(lambda x, t: x, schedule())


def test_products_need_a_graph_and_a_network_that_has_a_derivative():
    x, scheduler = noisy(2, 3), schedule()
    net = Vectors()
    with pytest.raises(InvalidInput, match="graph=True"):
        as_diffusion_model(net, scheduler).predict(x, 20).product(x)
    prediction = as_diffusion_model(net, scheduler).predict(x, 20, True)
    prediction.free()
    with pytest.raises(InvalidInput, match="graph=True"):
        prediction.product(x)

    class Cut(Vectors):
        def forward(self, x, t):
            return self.last(self.first(x.detach()))

    cut = schedule(prediction_type="sample")
    with pytest.raises(InvalidInput, match="no derivative"):
        as_diffusion_model(Cut(), cut).predict(x, 20, True).product(x)
    with torch.inference_mode():
        inner = as_diffusion_model(net, scheduler).predict(noisy(2, 3), torch.tensor([20, 20]), True)
        wanted = inner.product(torch.ones(2, 3))
    torch.testing.assert_close(
        as_diffusion_model(net, scheduler).predict(x, 20, True).product(torch.ones(2, 3)), wanted
    )

"""Heads and Lanczos' process in diffusers' own pipelines: what is called, what is drawn, what is refused, what is saved."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline
from tiny_networks import GaussianNoise, conditional_unet, dit, head_for, schedule, unet
from torch import nn

from noisewise.diffusion import CovarianceHead, CovarianceScheduler, HeadSource, LanczosSource, attach, generate
from noisewise.diffusion.model import as_diffusion_model
from noisewise.errors import InvalidInput

# states and networks at random are no images: their x0 is rightly cut, with a warning
pytestmark = pytest.mark.filterwarnings("ignore:x0 was cut:noisewise.errors.NoisewiseWarning")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(pipeline, steps=4, seed=0, **options):
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, num_inference_steps=steps, generator=seeded(seed), output_type="np", **options
    ).images
    return torch.as_tensor(images).permute(0, 3, 1, 2)


def shown(x):
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("eta", [None, 0, 1])
def test_a_pipeline_draws_what_generate_draws_with_one_network_call_a_step(eta):
    net, scheduler = unet(), schedule(eta=eta)
    head = head_for(net, scheduler)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pipeline = DDPMPipeline(net, DDPMScheduler(num_train_timesteps=50, beta_end=0.2))
    attachment = attach(pipeline, head, scheduler)
    calls = []
    counter = net.register_forward_hook(lambda *unused: calls.append(1))
    found = drawn(pipeline)
    counter.remove()
    assert len(calls) == 4
    attachment.detach()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    wanted = shown(generate(net, scheduler, (2, 1, 8, 8), 4, head))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    without = shown(generate(net, schedule(eta=eta), (2, 1, 8, 8), 4))
    assert float((found - without).abs().max()) > 0.01
    with pytest.raises(InvalidInput, match="none is attached"):
        drawn(pipeline)


def test_a_half_precision_pipeline_draws_what_generate_draws():
    net, scheduler = unet().to(torch.bfloat16), schedule()
    head = head_for(net, scheduler)
    assert head.dtype == torch.float32
    pipeline = DDPMPipeline(net, scheduler)
    attachment = attach(pipeline, head, scheduler)
    pipeline.scheduler.set_timesteps(4)
    generator = seeded()
    x = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.bfloat16)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t).sample, t, x, generator=generator).prev_sample
    attachment.detach()
    assert torch.equal(x, generate(net, scheduler, (2, 1, 8, 8), 4, head))


def test_the_default_scheduler_reads_the_pipelines_own():
    pipeline = DDPMPipeline(unet(), DDPMScheduler(num_train_timesteps=50, beta_end=0.2, clip_sample=False))
    head = head_for(pipeline.unet, schedule())
    attach(pipeline, head)
    assert isinstance(pipeline.scheduler, CovarianceScheduler)
    assert (pipeline.scheduler.config.beta_end, pipeline.scheduler.config.clip_sample) == (0.2, False)
    assert bool(torch.isfinite(drawn(pipeline)).all())


def test_ddims_pipeline_replaces_its_scheduler_and_takes_it_back():
    net, scheduler = unet(), schedule()
    head = head_for(net, scheduler)
    pipeline = DDIMPipeline(net, DDIMScheduler(num_train_timesteps=50, beta_end=0.2))
    assert type(pipeline.scheduler) is DDIMScheduler
    attachment = attach(pipeline, head, scheduler)
    # the pipeline's own call gives eta = 0: still stochastic, through the covariance
    found = drawn(pipeline, eta=0.0)
    attachment.detach()
    wanted = shown(generate(net, schedule(eta=0), (2, 1, 8, 8), 4, head))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_attaching_again_after_detaching_and_to_other_weights():
    net, scheduler = unet(), schedule()
    first, second = head_for(net, scheduler), head_for(net, scheduler, kind="complex")
    pipeline = DDPMPipeline(net, scheduler)
    a = attach(pipeline, first, scheduler)
    wanted = drawn(pipeline)
    a.detach()
    b = attach(pipeline, second, scheduler)
    assert not torch.equal(drawn(pipeline), wanted)
    # the older one has nothing more to take off
    a.detach()
    drawn(pipeline)
    b.detach()
    c = attach(pipeline, first, scheduler)
    assert torch.equal(drawn(pipeline), wanted)
    c.detach()


def test_lanczos_in_a_pipeline_draws_the_moments_of_gaussian_data(shapes_unchecked):
    # two pixels, which pipelines of images take as any other
    class Net(GaussianNoise):
        def forward(self, sample, timestep, return_dict=True):
            index = torch.as_tensor(timestep).reshape(-1).expand(len(sample))
            return SimpleNamespace(sample=super().forward(sample, index))

    covariance = torch.tensor([[0.05, 0.04], [0.04, 0.05]], dtype=torch.float64)
    scheduler = schedule(1000, beta_end=0.02, clip_sample=False)
    net = Net(scheduler.levels, torch.zeros(2), covariance).eval()
    holder = SimpleNamespace(unet=net, scheduler=scheduler)
    attachment = attach(holder, "lanczos", rank=2)
    n = 3000
    holder.scheduler.set_timesteps(4)
    generator = seeded(3)
    x = torch.randn(n, 1, 1, 2, generator=generator, dtype=torch.float64)
    for mode in (torch.no_grad, torch.inference_mode):
        y = x
        with mode():
            for t in holder.scheduler.timesteps:
                y = holder.scheduler.step(net(y, t).sample, t, y, generator=generator).prev_sample
        found = torch.cov(y.flatten(1).T)
        se = ((covariance.square() + covariance.diagonal()[:, None] * covariance.diagonal()) / n).sqrt()
        assert bool(((found - covariance).abs() < 4 * se).all())
    attachment.detach()


def test_lanczos_calls_a_real_network_twice_a_step_and_repeats_itself():
    net = unet()
    found = []
    for _ in range(2):
        pipeline = DDPMPipeline(net, schedule())
        attachment = attach(pipeline, "lanczos", rank=2, seed=5)
        calls = []
        counter = net.register_forward_hook(lambda *unused, calls=calls: calls.append(1))
        found.append(drawn(pipeline))
        counter.remove()
        attachment.detach()
        assert len(calls) == 4 + 3  # the last step has no noise
    assert bool(torch.isfinite(found[0]).all())
    assert torch.equal(*found)
    assert all(weight.grad is None for weight in net.parameters())


# --- guidance


def variances(net, scheduler, head, x, t, **conditions):
    prediction = as_diffusion_model(net, scheduler, head.config.site).predict(x, t, **conditions)
    return head.clean_variance(prediction).detach()


@pytest.mark.parametrize("scale", [None, 3])
def test_guidance_that_doubles_the_rows_has_the_variance_of_the_condition_or_the_extrapolated_one(scale):
    net, scheduler = conditional_unet(), schedule(clip_sample=False)
    head = head_for(net, scheduler)
    options = {} if scale is None else {"guidance": "extrapolate", "guidance_scale": scale}
    attachment = attach(SimpleNamespace(unet=net, scheduler=scheduler), head, scheduler, **options)
    scheduler.set_timesteps(4)
    x = torch.randn(2, 4, 8, 8, generator=seeded())
    nothing, text = torch.randn(2, 2, 3, 8, generator=seeded(1)).unbind()
    t = scheduler.timesteps[1]
    with torch.no_grad():
        both = net(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([nothing, text])).sample
        free, conditional = both.chunk(2)
        found = scheduler.step(free + 3 * (conditional - free), t, x, generator=seeded()).variance
        # pipelines that keep both branches in the sample, as DiT's, have the conditional one first
        pair = net(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([text, nothing])).sample
        kept = scheduler.step(pair, t, torch.cat([x, x]), generator=seeded()).variance
        torch.testing.assert_close(kept[:2], found, rtol=1e-4, atol=1e-6)
        attachment.detach()
        v_u, v_c = (variances(net, scheduler, head, x, t, encoder_hidden_states=h) for h in (nothing, text))
    wanted = v_c if scale is None else (-2 * v_u + 3 * v_c).clamp(min=0)
    a, s = scheduler.levels.pair(int(t))
    r = (a / s) ** 2 * wanted
    scheduler.register_to_config(needs_covariance=False)
    direct = scheduler.step(both[:2], t, x, covariance=r, generator=seeded()).variance
    torch.testing.assert_close(found, direct, rtol=1e-4, atol=1e-6)


def test_dits_pipeline_runs_with_a_head_that_its_own_output_has_no_room_for():
    net = dit()
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4, latent_channels=4, sample_size=8,
    ).eval()  # fmt: skip
    base = DDIMScheduler(num_train_timesteps=50, beta_end=0.2, clip_sample=False)
    pipeline = DiTPipeline(net, vae, base)
    pipeline.set_progress_bar_config(disable=True)
    head = head_for(net, schedule(clip_sample=False))

    def images(guidance_scale):
        return torch.as_tensor(
            pipeline([1, 2], guidance_scale, seeded(), num_inference_steps=3, output_type="np").images
        )

    plain = images(4.0)
    for options in ({}, {"guidance": "extrapolate", "guidance_scale": 4}):
        attachment = attach(pipeline, head, **options)
        found = images(4.0)
        attachment.detach()
        assert bool(torch.isfinite(found).all())
        assert float((found - plain).abs().max()) > 1e-3
    attach(pipeline, head, guidance="extrapolate", guidance_scale=4)
    with pytest.raises(InvalidInput, match="guidance"):
        images(1.0)  # without guidance there is only one branch


def test_rows_that_no_guidance_explains_are_refused():
    net, scheduler = unet(), schedule()
    head = head_for(net, scheduler)
    x = torch.randn(2, 1, 8, 8, generator=seeded())
    scheduler.set_timesteps(4)
    attachment = attach(SimpleNamespace(unet=net, scheduler=scheduler), head, scheduler)
    with pytest.raises(InvalidInput, match="before the pipeline's network was called"):
        scheduler.step(x, 49, x)
    out = net(torch.cat([x, x, x]), 49).sample.detach()
    with pytest.raises(InvalidInput, match="6 rows for 2 samples"):
        scheduler.step(out[:2], 49, x)
    attachment.detach()
    attachment = attach(SimpleNamespace(unet=net, scheduler=scheduler), "lanczos", scheduler)
    out = net(torch.cat([x, x]), 49).sample.detach()
    with pytest.raises(InvalidInput, match="4 rows for 2 samples"):
        scheduler.step(out[:2], 49, x)
    attachment.detach()
    attachment = attach(
        SimpleNamespace(unet=net, scheduler=scheduler), "lanczos", scheduler, guidance="extrapolate", guidance_scale=2
    )
    net(torch.cat([x, x]), 49)
    with pytest.raises(InvalidInput, match="needs a head"):
        scheduler.step(out[:2], 49, x)
    attachment.detach()


# --- what is refused


def test_pipelines_and_options_that_do_not_fit_are_refused(shapes_unchecked):
    net, scheduler = unet(), schedule()
    head = head_for(net, scheduler)
    pipeline = DDPMPipeline(net, scheduler)
    for options, match in (
        ({"guidance": "both"}, "guidance must be"),
        ({"guidance_scale": 3}, "belongs to"),
        ({"guidance": "extrapolate"}, "belongs to"),
        ({"scheduler": DDPMScheduler()}, "from_config"),
        ({"scheduler": schedule(beta_end=0.1)}, "another noise schedule"),
        ({"rank": 0, "covariance": "lanczos"}, "rank"),
        ({"seed": -1}, "seed"),
        ({"covariance": None}, "nothing to attach"),
        ({"covariance": "diagonal"}, "covariance must be"),
    ):
        with pytest.raises(InvalidInput, match=match):
            attach(pipeline, **{"covariance": head, **options})
    assert pipeline.scheduler.config.needs_covariance is False  # nothing was attached
    with pytest.raises(InvalidInput, match="neither of"):
        attach(SimpleNamespace(prior=net, scheduler=scheduler), head)
    with pytest.raises(InvalidInput, match="made for a UNet2DModel"):
        attach(SimpleNamespace(unet=conditional_unet(), scheduler=scheduler), head)
    latent = SimpleNamespace(unet=net, scheduler=scheduler, vae=nn.Identity())
    with pytest.raises(InvalidInput, match="latents do not lie"):
        attach(latent, head)
    unfitted = CovarianceHead.for_model(net, noise_schedule=scheduler)
    attachment = attach(pipeline, unfitted)
    with pytest.raises(InvalidInput, match="not fitted"):
        drawn(pipeline)
    attachment.detach()


def test_a_network_in_training_mode_is_refused():
    net, scheduler = unet(), schedule()
    attachment = attach(pipeline := DDPMPipeline(net, scheduler), head_for(net, scheduler))
    net.train()
    with pytest.raises(InvalidInput, match="training mode"):
        drawn(pipeline)
    net.eval()
    drawn(pipeline)
    attachment.detach()


def test_sources_attach_like_what_they_are_made_of():
    net, scheduler = unet(), schedule()
    head = head_for(net, scheduler)
    pipeline = DDPMPipeline(net, scheduler)
    found = []
    for covariance in (head, HeadSource(head)):
        attachment = attach(pipeline, covariance, scheduler)
        found.append(drawn(pipeline))
        attachment.detach()
    assert torch.equal(*found)
    attachment = attach(pipeline, LanczosSource(2, seeded()), scheduler)
    assert not torch.equal(drawn(pipeline), found[0])
    attachment.detach()


# --- saving

AGAIN = """
import json, sys
import torch
import noisewise
from diffusers import DiffusionPipeline

folder = sys.argv[1]
pipeline = DiffusionPipeline.from_pretrained(folder + "/pipeline")
pipeline.set_progress_bar_config(disable=True)
draw = lambda: pipeline(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np")
try:
    draw()
    refused = ""
except Exception as error:
    refused = str(error)
from noisewise.diffusion import attach
attach(pipeline, noisewise.CovarianceHead.from_pretrained(folder + "/head"), pipeline.scheduler)
torch.save(torch.as_tensor(draw().images), folder + "/images.pt")
print(json.dumps({"class": type(pipeline.scheduler).__name__, "eta": pipeline.scheduler.config.eta, "refused": refused}))
"""


def test_a_saved_pipeline_draws_the_same_in_a_new_process_once_its_head_is_attached(tmp_path):
    net, scheduler = unet(), schedule(eta=0.5)
    head = head_for(net, scheduler)
    pipeline = DDPMPipeline(net, scheduler)
    attachment = attach(pipeline, head, scheduler)
    wanted = drawn(pipeline)
    pipeline.save_pretrained(tmp_path / "pipeline")
    head.save_pretrained(tmp_path / "head")
    attachment.detach()
    ran = subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["scheduler"] == ["noisewise", "CovarianceScheduler"]
    said = json.loads(ran.stdout.splitlines()[-1])
    assert (said["class"], said["eta"]) == ("CovarianceScheduler", 0.5)
    assert "none is attached" in said["refused"]
    assert torch.equal(torch.load(tmp_path / "images.pt").permute(0, 3, 1, 2), wanted)

"""A head in Stable Diffusion's own pipeline, of random weights: guidance, seeds, saving and loading."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from tiny_networks import conditional_unet, head_for
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from noisewise.diffusion import CovarianceHead, CovarianceScheduler, attach
from noisewise.diffusion.model import as_diffusion_model
from noisewise.errors import InvalidInput

PROMPTS = ["ab a", "b"]


def tokenizer(folder):
    """Two letters, and one merge of them."""
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>", "ab</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=6)


def text_encoder():
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=7, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=6, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


@pytest.fixture
def pipeline(tmp_path):
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4, sample_size=16,
    ).eval()  # fmt: skip
    (tmp_path / "tokenizer").mkdir()
    made = StableDiffusionPipeline(
        vae, text_encoder(), tokenizer(tmp_path / "tokenizer"), conditional_unet(),
        DDIMScheduler(num_train_timesteps=50, beta_end=0.2, clip_sample=False, steps_offset=1), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipeline, scale, seed=0, **options):
    return pipeline(
        PROMPTS, height=16, width=16, num_inference_steps=3, guidance_scale=scale, output_type="latent",
        generator=torch.Generator().manual_seed(seed), **options,
    ).images  # fmt: skip


def covariance_scheduler(pipeline, **options):
    return CovarianceScheduler.from_config(pipeline.scheduler.config, **options)


@pytest.mark.parametrize("eta", [None, 0.0])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_call_is_the_steps_of_the_scheduler_with_the_variance_of_the_prompt(pipeline, scale, eta):
    scheduler = covariance_scheduler(pipeline, eta=eta)
    head = head_for(pipeline.unet, scheduler)
    plain = latents(pipeline, scale)
    attachment = attach(pipeline, head, scheduler)
    found = latents(pipeline, scale)
    assert pipeline.scheduler is scheduler
    assert found.shape == (2, 4, 8, 8)
    assert torch.equal(found, latents(pipeline, scale))
    assert not torch.equal(found, latents(pipeline, scale, seed=1))
    # the configuration says the form, not the pipeline, whose eta is 0 unless its caller gives another
    assert not torch.equal(found, latents(pipeline, scale, eta=0.3))
    assert float((found - plain).abs().max()) > 0.01
    attachment.detach()
    # by hand: the network twice, guided noise, and the head on the conditional branch alone
    text, nothing = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    scheduler.register_to_config(needs_covariance=False)
    model = as_diffusion_model(pipeline.unet, scheduler, head.config.site)
    with torch.no_grad():
        for t in scheduler.timesteps:
            prompted = model.predict(x, t, encoder_hidden_states=text)
            free = pipeline.unet(x, t, encoder_hidden_states=nothing).sample
            noise = free + scale * (prompted.eps - free)
            r = head.relative_variance(prompted)
            x = scheduler.step(noise, t, x, covariance=r, generator=generator).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_both_branches_are_extrapolated_where_that_is_asked_for(pipeline):
    scheduler = covariance_scheduler(pipeline)
    head = head_for(pipeline.unet, scheduler)
    found = []
    for options in ({}, {"guidance": "extrapolate", "guidance_scale": 4}):
        attachment = attach(pipeline, head, scheduler, **options)
        found.append(latents(pipeline, 4.0))
        attachment.detach()
    assert bool(torch.isfinite(found[1]).all())
    assert not torch.equal(*found)


def test_latents_are_not_clipped(pipeline):
    head = head_for(pipeline.unet, covariance_scheduler(pipeline))
    with pytest.raises(InvalidInput, match="latents do not lie"):
        attach(pipeline, head, covariance_scheduler(pipeline, clip_sample=True))
    attach(pipeline, head)
    assert isinstance(pipeline.scheduler, CovarianceScheduler)
    assert pipeline.scheduler.config.clip_sample is False
    assert torch.isfinite(latents(pipeline, 4.0)).all()


def test_a_saved_pipeline_draws_the_same_once_its_head_is_attached(pipeline, tmp_path):
    scheduler = covariance_scheduler(pipeline, eta=0.0)
    head = head_for(pipeline.unet, scheduler)
    attach(pipeline, head, scheduler)
    wanted = latents(pipeline, 4.0)
    pipeline.save_pretrained(tmp_path / "pipeline")
    head.save_pretrained(tmp_path / "head")
    again = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    again.set_progress_bar_config(disable=True)
    assert type(again) is StableDiffusionPipeline
    assert type(again.scheduler) is CovarianceScheduler
    assert again.scheduler.config.eta == 0.0
    with pytest.raises(InvalidInput, match="none is attached"):
        latents(again, 4.0)
    attach(again, CovarianceHead.from_pretrained(tmp_path / "head"), again.scheduler)
    assert torch.equal(latents(again, 4.0), wanted)
    images = again("a", height=16, width=16, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)

"""Labels and other conditions that a network does not take are refused in words, wherever they are given."""

import pytest
import torch
from diffusers import UNet2DModel
from tiny_networks import conditional_unet, dit, head_for, schedule

from noisewise.diffusion import fit_covariance, generate, posterior_variance, vlb_bits_per_dim
from noisewise.errors import InvalidInput


def labelled():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False, num_class_embeds=10,
    ).eval()  # fmt: skip


X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
WRONG = (
    (
        {"class_labels": torch.tensor([3, 12])},
        r"class_labels=\[3, 12\] for 2 rows of x_t \(its 10 classes count from 0\)",
    ),
    ({"class_labels": torch.tensor([1, 2, 3])}, r"class_labels=\[1, 2, 3\] for 2 rows"),
    ({"class_labels": [1, 2]}, r"class_labels=\[1, 2\]"),
    ({"class_labels": torch.rand(2, 30)}, r"class_labels=a tensor \(2, 30\) of torch.float32 from 0"),
    ({"labels": torch.tensor([1, 2])}, r"UNet2DModel cannot take labels=\[1, 2\].*unexpected keyword"),
    ({}, r"cannot go without conditions for 2 rows of x_t \(its 10 classes"),
)


@pytest.mark.parametrize(("conditions", "said"), WRONG)
def test_every_function_quotes_conditions_that_do_not_fit(conditions, said):
    net, scheduler = labelled(), schedule(clip_sample=False)
    head = head_for(net, scheduler)
    calls = (
        lambda: posterior_variance(net, X, 10, head=head, noise_schedule=scheduler, **conditions),
        lambda: posterior_variance(net, X, 10, "probes", noise_schedule=scheduler, **conditions),
        lambda: vlb_bits_per_dim(net, X, head, 4, noise_schedule=scheduler, **conditions),
        lambda: generate(net, scheduler, (2, 1, 8, 8), 4, head, **conditions),
    )
    for call in calls:
        with pytest.raises(InvalidInput, match=said):
            call()


def test_a_fit_and_other_networks_do_so_too():
    net, scheduler = labelled(), schedule()
    head = head_for(net, scheduler)
    with pytest.raises(InvalidInput, match=r"cannot take class_labels=a tensor .* from 17 to 17 .*its 10 classes"):
        fit_covariance(net, head, (X.repeat(8, 1, 1, 1), torch.full((16,), 17)), noise_schedule=scheduler, steps=2)
    latents = torch.randn(2, 4, 8, 8)
    with pytest.raises(InvalidInput, match=r"DiTTransformer2DModel cannot take class_labels=\[5, 1005\]"):
        posterior_variance(dit(), latents, 10, "probes", noise_schedule=scheduler, class_labels=torch.tensor([5, 1005]))
    with pytest.raises(InvalidInput, match=r"cannot go without conditions .*encoder_hidden_states"):
        posterior_variance(conditional_unet(), latents, 10, "probes", noise_schedule=scheduler)


def test_what_a_network_without_conditions_says_is_left_alone():
    class Broken(torch.nn.Module):
        def forward(self, x, t):
            raise RuntimeError("its own affair")

    with pytest.raises(RuntimeError, match=r"^its own affair$"):
        posterior_variance(Broken(), X, 10, "probes", noise_schedule=schedule())

"""A block is its formula, whole or padded, at once or as a stream, and merged as it was trained."""

import itertools

import pytest
import torch
from torch import nn

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.sequence.block import MRConvBlock, merge_layers, parameter_groups
from noisewise.sequence.layer import MRConv
from noisewise.sequence.merged import LongConv

CASES = list(itertools.product([True, False], ["layer", "batch"]))


def signal(batch=3, channels=6, length=50, seed=0):
    return torch.randn(batch, channels, length, generator=torch.Generator().manual_seed(seed))


def settled(module, *inputs, batches=3, **options):
    """In eval mode, with running statistics of a few batches."""
    module.train()
    with torch.no_grad():
        for _ in range(batches):
            module(*inputs, **options)
    return module.eval()


@pytest.mark.parametrize(("prenorm", "block_norm"), CASES)
def test_block_is_the_formula(prenorm, block_norm):
    block = MRConvBlock(6, 50, prenorm=prenorm, block_norm=block_norm, kernel_size=8).double()
    x = signal().double()
    settled(block, x)
    norm = {"layer": lambda v: nn.functional.layer_norm(v.mT, (6,)).mT, "batch": lambda v: block.norm(v)}[block_norm]
    y = nn.functional.gelu(block.layer(norm(x) if prenorm else x))
    y = nn.functional.linear(y.mT, block.pointwise.weight.squeeze(-1), block.pointwise.bias).mT
    y = x + y[:, :6] * y[:, 6:].sigmoid()
    assert torch.allclose(block(x), y if prenorm else norm(y), atol=1e-12)


@pytest.mark.parametrize(("prenorm", "block_norm"), CASES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padded_rows_are_single_rows(prenorm, block_norm, bidirectional):
    options = {"kernel_size": 8, "bidirectional": bidirectional}
    block = MRConvBlock(6, 50, prenorm=prenorm, block_norm=block_norm, **options).double()
    x, lengths = signal().double(), torch.tensor([50, 17, 1])
    settled(block, x, lengths=lengths)
    padded = block(x, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        assert torch.allclose(padded[row : row + 1, :, :length], block(x[row : row + 1, :, :length]), atol=1e-10)
        assert not bool(padded[row, :, length:].any())


@pytest.mark.parametrize("prenorm", [True, False])
def test_padding_reaches_neither_statistics_nor_gradients(prenorm):
    lengths = torch.tensor([50, 17, 4])
    found = []
    for fill in (0.0, 1e6):
        block = MRConvBlock(6, 50, prenorm=prenorm, block_norm="batch", kernel_size=8).double()
        x = torch.where(torch.arange(50) < lengths.reshape(-1, 1, 1), signal().double(), fill).requires_grad_()
        block(x, lengths=lengths).square().sum().backward()
        found.append([x.grad, block.norm.running_var, *(p.grad for p in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_batch_norm_of_valid_steps_is_that_of_their_concatenation():
    norm = MRConvBlock(6, 50, block_norm="batch").norm
    x, lengths = signal(), torch.tensor([50, 17, 4])
    mask = (torch.arange(50) < lengths.unsqueeze(-1)).unsqueeze(1)
    joined = torch.cat([x[row, :, :n] for row, n in enumerate(lengths.tolist())], -1)
    normed = norm(x, mask)
    expected = (joined - joined.mean(-1, keepdim=True)) / (joined.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(
        torch.cat([normed[row, :, :n] for row, n in enumerate(lengths.tolist())], -1), expected, atol=1e-5
    )
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * joined.var(-1), atol=1e-6)


@pytest.mark.parametrize(("prenorm", "block_norm"), CASES)
@pytest.mark.parametrize("merged", [False, True])
def test_streaming_equals_offline(prenorm, block_norm, merged):
    block = settled(MRConvBlock(6, 50, prenorm=prenorm, block_norm=block_norm, kernel_size=8), signal())
    block = merge_layers(block) if merged else block
    x = signal(2, seed=1)
    offline = block(x)
    state, steps = block.init_state(2), []
    for t in range(20):
        y, state = block.step(x[..., t], state)
        steps.append(y)
    chunk, state = block(x[..., 20:45], state)
    rest, state = block(x[..., 45:], state)
    assert torch.allclose(torch.cat([torch.stack(steps, -1), chunk, rest], -1), offline, atol=1e-5)
    assert torch.allclose(block.prefill(x)[0], offline, atol=1e-5)


@pytest.mark.parametrize(("prenorm", "block_norm"), CASES)
def test_merged_equals_unmerged_and_leaves_the_block_alone(prenorm, block_norm):
    block = settled(MRConvBlock(6, 50, prenorm=prenorm, block_norm=block_norm, bidirectional=True), signal())
    before = {name: value.clone() for name, value in block.state_dict().items()}
    merged = merge_layers(block)
    x = signal(seed=2)
    assert isinstance(merged.layer, LongConv)
    assert torch.allclose(merged(x), block(x), atol=1e-5)
    with torch.no_grad():
        merged.pointwise.weight.zero_()
    assert isinstance(block.layer, MRConv)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_shared_layer_is_merged_once():
    shared = settled(MRConv(6, 50), signal())
    merged = merge_layers(nn.Sequential(shared, nn.GELU(), shared).eval())
    assert merged[0] is merged[2]
    assert isinstance(merge_layers(shared), LongConv)


def test_dropout_takes_whole_channels():
    block = MRConvBlock(64, 50, dropout=0.5).train()
    kept = []
    block.dropout.register_forward_hook(lambda module, inputs, output: kept.append((inputs[0], output)))
    block(signal(4, 64))
    before, after = kept[0]
    lost = (after == 0).all(-1, keepdim=True)
    assert torch.equal(after, torch.where(lost, 0.0, 2 * before))
    assert 0 < int(lost.sum()) < lost.numel()


def test_any_layer_takes_the_place_of_the_convolution():
    class Shift(nn.Module):
        def __init__(self, d_model, length):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(d_model, 1))

        def forward(self, u):
            return self.scale * nn.functional.pad(u[..., 1:], (0, 1))

    block = MRConvBlock(6, 50, layer=Shift, prenorm=True, block_norm="layer").eval()
    x, lengths = signal(), torch.tensor([50, 17, 2])
    padded = block(x, lengths=lengths)
    # it knows no lengths, and yet sees nothing behind the end
    for row, length in enumerate(lengths.tolist()):
        assert torch.allclose(padded[row : row + 1, :, :length], block(x[row : row + 1, :, :length]), atol=1e-6)
    with pytest.raises(InvalidInput, match="Shift has no stream"):
        block.init_state(1)
    with pytest.raises(InvalidInput, match="kernel_size would do nothing"):
        MRConvBlock(6, 50, layer=Shift, kernel_size=8)
    with pytest.raises(InvalidInput, match="keeps the shape"):
        MRConvBlock(6, 50, layer=lambda d, n: nn.AvgPool1d(2)).eval()(x)


def test_groups_hold_every_parameter_once_and_kernels_do_not_decay():
    block = MRConvBlock(6, 50, kind="fourier+sparse")
    block.pointwise.bias._optim = {"lr": 5e-4}
    block.gate.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    groups = parameter_groups(block, lr=1e-2, kernel_lr=2e-3, weight_decay=0.1)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(settings) == sum(len(g["params"]) for g in groups) == len(list(block.parameters())) - 1
    assert {settings[id(p)] for p in block.layer.kernels.parameters()} == {(2e-3, 0.0)}
    assert settings[id(block.pointwise.bias)] == (5e-4, 0.1)
    assert settings[id(block.layer.alpha)] == settings[id(block.norm.weight)] == (1e-2, 0.1)
    torch.optim.AdamW(groups)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = MRConvBlock(6, 50, seed=3)
    state = torch.get_rng_state()
    second, other = MRConvBlock(6, 50, seed=3), MRConvBlock(6, 50, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.pointwise.weight, other.pointwise.weight)


def test_bad_input_is_named():
    with pytest.raises(InvalidInput, match="got 'group'"):
        MRConvBlock(6, 50, block_norm="group")
    with pytest.raises(InvalidInput, match="dropout"):
        MRConvBlock(6, 50, dropout=1.0)
    with pytest.raises(NoisewiseError, match="train mode"):
        MRConvBlock(6, 50).init_state(1)
    with pytest.raises(InvalidInput, match="no MRConv"):
        merge_layers(nn.Linear(1, 1))
    with pytest.raises(NoisewiseError, match="no batch"):
        merge_layers(MRConvBlock(6, 50))

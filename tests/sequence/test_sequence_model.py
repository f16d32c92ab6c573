"""A model means the same whole, padded, merged, streamed and read back."""

import math
import warnings

import pytest
import torch
from torch import nn

from noisewise.errors import InvalidInput, NoisewiseError, NoisewiseWarning, RunFolderError
from noisewise.sequence import LongConv, MRConv, SequenceModel

SMALL = {"d_model": 8, "n_layers": 2, "kernel_size": 8}


def signal(batch=3, channels=2, length=50, seed=0):
    return torch.randn(batch, channels, length, generator=torch.Generator().manual_seed(seed))


def tokens(batch=3, length=50, seed=0):
    return torch.randint(7, (batch, length), generator=torch.Generator().manual_seed(seed))


def settled(model, x, lengths=None):
    """In eval mode, with running statistics of a few batches."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x, lengths=lengths)
    return model.eval()


INPUTS = pytest.mark.parametrize(
    ("x", "options"),
    [(signal(), {}), (signal(), {"patch": 4}), (tokens(), {"vocabulary": 7})],
    ids=["linear", "patch", "vocabulary"],
)
POOL = pytest.mark.parametrize("pool", ["mean", "last", None])


def build(x, pool="mean", **options):
    return SequenceModel(1 if x.ndim == 2 else 2, 5, 50, pool=pool, **SMALL, **options)


@INPUTS
@POOL
@pytest.mark.parametrize("block_norm", ["layer", "batch"])
def test_padded_rows_are_single_rows(x, options, pool, block_norm):
    model = build(x, pool, bidirectional=True, block_norm=block_norm, **options).double()
    x = x if x.ndim == 2 else x.double()
    lengths = torch.tensor([50, 18, 1])
    settled(model, x, lengths)
    beyond = torch.arange(50) >= lengths.reshape(-1, *[1] * (x.ndim - 1))
    padded = model(torch.where(beyond, 1_000_000, x), lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(x[row : row + 1, ..., :length])
        if pool is None:
            steps = math.ceil(length / model.patch)
            assert alone.shape == (1, 5, steps)
            assert not bool(padded[row, :, steps:].any())
            assert torch.allclose(padded[row, :, :steps], alone[0], atol=1e-10)
        else:
            assert torch.allclose(padded[row], alone[0], atol=1e-10)


@INPUTS
@POOL
@pytest.mark.parametrize("prenorm", [True, False])
def test_merged_equals_unmerged(x, options, pool, prenorm, tmp_path):
    model = settled(build(x, pool, bidirectional=True, prenorm=prenorm, block_norm="batch", **options), x)
    merged = model.merge()
    assert not any(isinstance(part, MRConv) for part in merged.modules())
    assert torch.allclose(merged(x), model(x), atol=1e-5)
    lengths = torch.tensor([50, 18, 1])
    assert torch.allclose(merged(x, lengths=lengths), model(x, lengths=lengths), atol=1e-5)
    for one in (model, merged):
        again = SequenceModel.from_pretrained(one.save_pretrained(tmp_path / str(one.merged)))
        assert torch.equal(again(x), one(x))
        assert again.merged == one.merged
        assert again.state_dict().keys() == one.state_dict().keys()
        # and what was read can be written
        assert torch.equal(SequenceModel.from_pretrained(again.save_pretrained(tmp_path / "again"))(x), one(x))


def test_merged_models_refuse_training_whole():
    model = settled(build(signal()), signal())
    merged = model.merge()
    with pytest.raises(NoisewiseError, match="cannot be trained"):
        merged.train()
    assert not any(part.training for part in merged.modules())
    assert merged.eval() is merged
    with pytest.raises(InvalidInput, match="merged already"):
        merged.merge()
    assert "merged=True" in repr(merged)
    assert "merged" not in repr(model)


@pytest.mark.filterwarnings("ignore:pool=None with norm:noisewise.errors.NoisewiseWarning")
@pytest.mark.parametrize("pool", [None, "last"])
@pytest.mark.parametrize(
    ("x", "options"), [(signal(), {}), (tokens(), {"vocabulary": 7})], ids=["linear", "vocabulary"]
)
@pytest.mark.parametrize("merged", [False, True])
def test_streaming_equals_offline(x, options, pool, merged):
    model = settled(build(x, pool, **options), x)
    model = model.merge() if merged else model
    # after each input, what the model says of all inputs so far
    offline = model(x) if pool is None else torch.stack([model(x[..., : t + 1]) for t in range(x.shape[-1])], -1)
    state, steps = model.init_state(len(x)), []
    for t in range(30):
        y, state = model.step(x[..., t], state)
        steps.append(y)
    assert torch.allclose(torch.stack(steps, -1), offline[..., :30], atol=1e-5)
    rest, state = model(x[..., 30:], state)
    assert torch.allclose(rest, offline[..., 30:] if pool is None else offline[..., -1], atol=1e-5)
    assert torch.allclose(model.prefill(x)[0], rest if pool else offline, atol=1e-5)


@pytest.mark.filterwarnings("ignore:pool=None with norm:noisewise.errors.NoisewiseWarning")
def test_streams_go_on_longer_than_the_model():
    model = settled(build(signal(), None), signal())
    x = signal(1, length=180, seed=4)
    y, state = model.prefill(x[..., :150])
    rest = []
    for t in range(150, 180):
        now, state = model.step(x[..., t], state)
        rest.append(now)
    whole, _ = model.prefill(x)
    assert torch.allclose(torch.cat([y, torch.stack(rest, -1)], -1), whole, atol=1e-5)


@pytest.mark.filterwarnings("ignore:pool=None with norm:noisewise.errors.NoisewiseWarning")
def test_causal_models_do_not_look_ahead_and_others_do():
    x, other = signal(1), signal(1)
    other[..., 30:] = 9.0
    for bidirectional in (False, True):
        model = settled(build(x, None, bidirectional=bidirectional), signal())
        same = torch.allclose(model(x)[..., :30], model(other)[..., :30], atol=1e-4)
        assert same is not bidirectional


def test_layers_differ_from_each_other_and_models_of_one_seed_do_not():
    model, same, other = (SequenceModel(2, 5, 50, seed=seed, **SMALL) for seed in (0, 0, 1))
    first, second = (block.layer.kernels.fourier_0 for block in model.blocks)
    assert not torch.equal(first, second)
    for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model.head.weight, other.head.weight)


def test_parameter_groups_of_the_model():
    model = SequenceModel(2, 5, 50, **SMALL)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in model.param_groups() for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == ((1e-3, 0.0) if ".kernels." in name else (1e-2, 0.05))


class Memory(nn.Module):
    """A recurrent layer, as one may want to compare with."""

    def __init__(self, d_model, length):
        super().__init__()
        self.gru = nn.GRU(d_model, d_model, batch_first=True)

    def forward(self, u):
        return self.gru(u.mT)[0].mT


def test_another_layer_is_built_seeded_and_given_again(tmp_path):
    models = [SequenceModel(2, 5, 50, d_model=8, n_layers=2, layer=Memory) for _ in range(2)]
    x = signal()
    assert torch.equal(models[0](x), models[1](x))
    folder = models[0].save_pretrained(tmp_path)
    assert torch.equal(SequenceModel.from_pretrained(folder, layer=Memory)(x), models[0](x))
    with pytest.raises(RunFolderError, match="layer=Memory"):
        SequenceModel.from_pretrained(folder)


@pytest.mark.skipif(not hasattr(MRConv, "at_rate"), reason="MRConv has no at_rate here")
def test_at_another_rate_every_layer_is_and_it_can_be_kept(tmp_path):
    model = settled(SequenceModel(1, 5, 64, **SMALL), signal(3, 1, 64))
    half = model.at_rate(0.5)
    assert half.length == 32
    assert all(isinstance(block.layer, LongConv) and block.layer.length == 32 for block in half.blocks)
    again = SequenceModel.from_pretrained(half.save_pretrained(tmp_path))
    x = signal(2, 1, 32)
    assert torch.equal(again(x), half(x))
    t = torch.linspace(0, 2 * math.pi, 65)[:-1]
    smooth = torch.stack([t.sin(), (2 * t).cos()]).unsqueeze(1)
    whole = model(smooth).detach()
    assert float((half(smooth[..., ::2]) - whole).norm() / whole.norm()) < 0.2


def test_rates_of_what_has_none():
    for options in ({"patch": 4}, {"vocabulary": 7}):
        with pytest.raises(InvalidInput, match=r"patch=4|vocabulary=7"):
            SequenceModel(1, 5, 64, **SMALL, **options).at_rate(0.5)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({}, "norm='kernel'"),
        ({"block_norm": "batch"}, "norm='kernel' and block_norm='layer'"),
        ({"norm": "kernel", "block_norm": "batch"}, "block_norm='layer'"),
    ],
)
def test_what_hears_the_future_in_training_is_warned_of_and_does(options, remedy, tmp_path):
    with pytest.warns(NoisewiseWarning, match=f"build it with {remedy}$") as found:
        model = SequenceModel(2, 5, 50, pool=None, **SMALL, **options)
    assert len(found) == 1
    x, other = signal(), signal()
    other[..., 30:] = 9.0
    assert not torch.allclose(model.train()(x)[..., :30], model(other)[..., :30], atol=1e-4)
    # it is said to who builds one, not again to who uses it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SequenceModel.from_pretrained(model.eval().save_pretrained(tmp_path)).merge()


@pytest.mark.filterwarnings("error")
def test_what_hears_no_future_or_shall_is_not_warned_of():
    model = SequenceModel(2, 5, 50, pool=None, norm="kernel", **SMALL).train()
    x, other = signal(), signal()
    other[..., 30:] = 9.0
    assert torch.allclose(model(x)[..., :30], model(other)[..., :30], atol=1e-4)
    SequenceModel(2, 5, 50, pool=None, bidirectional=True, block_norm="batch", **SMALL)
    SequenceModel(2, 5, 50, pool="last", block_norm="batch", **SMALL)
    SequenceModel(2, 5, 50, pool=None, block_norm="batch", d_model=8, n_layers=1, layer=Memory)


def test_bad_input_is_named(shapes_unchecked):
    model = SequenceModel(2, 5, 50, **SMALL).eval()
    words = SequenceModel(1, 5, 50, vocabulary=7, **SMALL).eval()
    cases = [
        (lambda: SequenceModel(2, 5, 50, pool="max"), "got 'max'"),
        (lambda: SequenceModel(2, 5, 50, vocabulary=7), "d_input and patch must be 1"),
        (lambda: SequenceModel(0, 5, 50), "d_input"),
        (lambda: SequenceModel(2, 5, 50, n_layers=0), "n_layers"),
        (
            lambda: SequenceModel(2, 5, 50, kernal_size=8),
            "kernal_size= is no option of MRConv: did you mean kernel_size",
        ),
        (lambda: SequenceModel(2, 5, 50, width=8), "width= is no option .* are kind, kernel_size, .*momentum$"),
        (lambda: SequenceModel(2, 5, 50, kind="wavelet"), "kind must be one of .*, got 'wavelet'"),
        (lambda: model(signal(channels=3)), r"\(3, 3, 50\)"),
        (lambda: model(signal(length=51)), "51 steps"),
        (lambda: model(tokens()), r"\(3, 50\)"),
        (lambda: model(signal(), lengths=torch.tensor([50, 0, 1])), "0 to 50"),
        (lambda: words(signal()), "whole numbers"),
        (lambda: words(tokens(length=51)), "51 steps"),
        (lambda: words(tokens() + 1), "1 to 7"),
        (lambda: words(tokens(), lengths=torch.tensor([1, 2])), "3 whole numbers"),
        (lambda: model.init_state(1), "pool='mean'"),
        (lambda: SequenceModel(2, 5, 50, patch=4, pool=None, norm="kernel").eval().init_state(1), "patch=4"),
        (lambda: SequenceModel(2, 5, 50, pool=None, bidirectional=True).eval().init_state(1), "bidirectional"),
        (lambda: SequenceModel(2, 5, 50, pool=None, norm="kernel").eval().step(signal()[:, 0], []), "expected"),
        (lambda: SequenceModel(2, 5, 50, pool=None, norm="kernel").train().init_state(1), "train mode"),
        (lambda: model.merge(), "no batch"),
    ]
    for call, message in cases:
        with pytest.raises(NoisewiseError, match=message):
            call()


def test_damaged_folders_are_named(tmp_path):
    model = SequenceModel(2, 5, 50, **SMALL)
    with pytest.raises(RunFolderError, match="no saved SequenceModel"):
        SequenceModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunFolderError, match="cut short"):
        SequenceModel.from_pretrained(tmp_path)

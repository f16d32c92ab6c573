"""What cannot work is refused where it is given, with the value and a remedy."""

import copy
import math

import pytest
import torch
from branches_by_torch import layer, signal

from noisewise.errors import InvalidInput, NoisewiseError, NoisewiseWarning
from noisewise.sequence import MRConv, merge_layers

FORMS = pytest.mark.parametrize("form", ["train", "eval", "merged"])


def in_form(form, **options):
    module = layer("fourier", 24, **options).train(form == "train")
    return module.merge() if form == "merged" else module


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "fourrier"}, r"one of dilated, fourier, sparse, fourier\+sparse, dense, got 'fourrier'"),
        ({"kind": "sparse+fourier"}, "kind must be one of"),
        ({"norm": "layer"}, "norm must be one of batch, kernel, got 'layer'"),
        ({"norm": None}, "norm must be one of"),
        ({"stats": "fast"}, "stats must be one of exact, full, branches, got 'fast'"),
        ({"kernel_size": 1}, "kernel_size must be at least 2, got 1"),
        ({"kernel_size": 7.5}, "kernel_size must be a whole number, got 7.5"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"modes": 18}, r"modes=18 .*kernel_size=32.* at most 17"),
        ({"modes": 0}, "modes must be at least 1"),
        ({"kind": "sparse", "taps": 33}, r"taps=33 .* at most kernel_size=32"),
        ({"kind": "fourier+sparse", "taps": 0}, "taps must be at least 1"),
        ({"kind": "fourier+sparse", "modes": 18}, "modes=18"),
        ({"causal": True, "bidirectional": True}, "causal=True and bidirectional=True contradict"),
        ({"causal": False, "bidirectional": False}, "causal=False and bidirectional=False contradict"),
        ({"eps": 0}, "eps must be a finite number above 0, got 0"),
        ({"eps": math.nan}, "eps must be a finite number above 0, got nan"),
        ({"momentum": 0.0}, "momentum must be a finite number above 0"),
        ({"momentum": 1.5}, "momentum"),
    ],
)
def test_an_argument_that_does_not_fit_is_quoted(arguments, message, shapes_unchecked):
    with pytest.raises(InvalidInput, match=message):
        MRConv(**{"d_model": 4, "length": 100, **arguments})


@pytest.mark.parametrize(
    ("arguments", "bidirectional"),
    [
        ({}, False),
        ({"causal": True}, False),
        ({"causal": False}, True),
        ({"bidirectional": True}, True),
        ({"causal": False, "bidirectional": True}, True),
        ({"causal": True, "bidirectional": False}, False),
    ],
)
def test_causal_and_bidirectional_are_each_other_s_opposite(arguments, bidirectional):
    module = MRConv(4, 100, **arguments)
    assert module.bidirectional == bidirectional
    assert module.alpha.shape[1] == 1 + bidirectional


# ---- signals


@pytest.mark.usefixtures("shapes_unchecked")
@FORMS
def test_a_signal_of_another_kind_is_refused_with_what_to_do(form):
    module, u = in_form(form), signal(2, 24)
    for bad, message in (
        (signal(2, 25), r"25 steps, the layer at most 24.*larger length"),
        (u.mT, r"expected \(batch, 3, length\).*look swapped: use u\.mT"),
        (u[:, :2], r"expected \(batch, 3, length\), got shape \(2, 2, 24\)"),
        (u[0], r"expected \(batch, 3, length\), got shape \(3, 24\)"),
        (u[:0], "needs a row and a step"),
        (u[..., :0], "needs a row and a step"),
        (u.long(), r"floating point, got torch\.int64.*\.float\(\)"),
    ):
        with pytest.raises(InvalidInput, match=message):
            module(bad)


@pytest.mark.usefixtures("shapes_unchecked")
@FORMS
def test_lengths_that_cannot_be_are_refused(form):
    module, u = in_form(form), signal(2, 24)
    for bad, message in (
        (torch.tensor([24, 0]), "1 to 24, got 0 to 24: leave empty rows out"),
        (torch.tensor([25, 3]), "1 to 24, got 3 to 25"),
        (torch.tensor([-1, 3]), "got -1 to 3"),
        (torch.tensor([24]), r"2 whole numbers, one for each row, got shape \(1,\)"),
        (torch.tensor([24.0, 3.0]), "whole numbers"),
    ):
        with pytest.raises(InvalidInput, match=message):
            module(u, lengths=bad)


@pytest.mark.parametrize("stats", ["exact", "full", "branches"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([1])])
def test_statistics_of_a_single_value_are_refused_and_leave_no_trace(stats, lengths):
    module = layer(stats=stats)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(InvalidInput, match="more than a single value"):
        module(signal(1, 1 if lengths is None else 5), lengths=lengths)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.eval()(signal(1, 1))


# ---- merging


def test_a_layer_that_has_seen_no_batch_does_not_merge():
    with pytest.raises(NoisewiseError, match=r"has seen no batch in train mode.*train it first"):
        MRConv(4, 100).merge()
    # the norm of a kernel needs no batch
    MRConv(4, 100, norm="kernel").merge()


@pytest.mark.parametrize("mode", [None, True])
def test_a_merged_layer_does_not_go_back_to_training(mode):
    merged = layer().merge()
    for one in (merged, torch.nn.Sequential(merged)):
        with pytest.raises(NoisewiseError, match="no branches to train any more: train the layer it was merged from"):
            one.train() if mode is None else one.train(mode)
        one.eval()
        one.train(False)
    assert not merged.training


def test_a_module_around_a_merged_layer_is_mended_by_eval():
    merged = merge_layers(torch.nn.Sequential(torch.nn.Dropout(), layer(), torch.nn.Dropout()))
    with pytest.raises(NoisewiseError, match=r"half in train mode now, so call \.eval\(\)"):
        merged.train()
    merged.eval()
    assert not any(part.training for part in merged.modules())


def test_channels_that_never_vary_are_warned_of():
    module = layer(momentum=1.0)
    u = signal(3, 24)
    u[:, 1] = 0.0
    module(u)
    with pytest.warns(NoisewiseWarning, match="4 of 12 branches hardly vary.*constant channels"):
        merged = module.merge()
    # it is still the layer
    assert (merged(u) - module.eval()(u)).abs().max() < 1e-11


def test_weights_of_another_layer_are_not_loaded():
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer("fourier", 24).load_state_dict(layer("fourier", 40).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer("fourier", 24).load_state_dict(layer("dilated", 24).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer("fourier", 24).merge().load_state_dict(layer("fourier", 24).state_dict())


def test_statistics_that_saw_nan_are_not_merged():
    layer = MRConv(2, 40)
    layer(torch.full((2, 2, 40), float("nan")))
    with pytest.raises(NoisewiseError, match="not finite"):
        layer.eval().merge()


def test_lengths_are_a_tensor(shapes_unchecked):
    with pytest.raises(InvalidInput, match=r"torch\.tensor"):
        MRConv(2, 40)(torch.randn(2, 2, 40), lengths=[3, 40])

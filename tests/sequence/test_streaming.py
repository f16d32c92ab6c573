"""A stream is the layer: for chunks of any sizes, for ever, and at a cost that the kernel's parts decide."""

import copy
import itertools

import pytest
import torch
from branches_by_torch import convolve, layer, signal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.sequence import LongConv, MRConv
from noisewise.sequence.kernels import KINDS
from noisewise.sequence.streaming import Blocks, Sliding, Taps

FORMS = (*KINDS, "merged", "few taps")
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
STREAMED = pytest.mark.usefixtures("shapes_unchecked")


def streamed(form, length=21, dtype=torch.float64, **options):
    """A layer in use that streams in the way of `form`."""
    if form in KINDS:
        return layer(form, length, dtype=dtype, **options).eval()
    if form == "merged":
        return layer("fourier", length, dtype=dtype, **options).eval().merge()
    kernel = torch.zeros(1, 3, length, dtype=dtype)
    kernel[..., [0, length - 1]] = signal(1, 2, dtype=dtype)
    return LongConv(kernel, signal(1, 1, dtype=dtype)[0, :, 0])


def offline(module, u):
    """By torch's convolution with the merged kernel, for signals longer than the kernel too."""
    merged = module.merge() if isinstance(module, MRConv) else module
    return convolve(u, merged.kernel[0]) + merged.bias.unsqueeze(-1)


def by_steps(module, u, state):
    return torch.stack([module.step(u_t, state)[0] for u_t in u.unbind(-1)], -1)


@pytest.mark.parametrize(
    ("form", "ways"),
    [
        ("dilated", {Taps}),
        ("sparse", {Taps}),
        ("fourier", {Sliding, Taps}),
        ("fourier+sparse", {Sliding, Taps}),
        ("dense", {Blocks}),
        ("merged", {Blocks}),
        ("few taps", {Taps}),
    ],
)
def test_each_kernel_streams_by_its_own_structure(form, ways):
    assert {type(way) for way in streamed(form).init_state(2).ways} == ways


@STREAMED
@EVERY_FORM
@pytest.mark.parametrize("norm", ["batch", "kernel"])
@pytest.mark.parametrize("length", [1, 3, 21, 32, 33])
def test_step_by_step_is_the_convolution(form, norm, length):
    module = streamed(form, length, **({"norm": norm} if form in KINDS else {}))
    u = signal(2, 4 * length + 5)
    assert (by_steps(module, u, module.init_state(2)) - offline(module, u)).abs().max() < 1e-11
    # and it is what the layer itself says, of a signal that fits
    fits = u[..., :length]
    assert (by_steps(module, fits, module.init_state(2)) - module(fits)).abs().max() < 1e-11


@STREAMED
@EVERY_FORM
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.one_of(st.just(1), st.integers(0, 8), st.integers(20, 70)), min_size=1, max_size=8))
def test_chunks_of_any_size_are_the_convolution(form, sizes):
    module, u = streamed(form), signal(2, sum(sizes))
    state, found = module.init_state(2), []
    for size, chunk in zip(sizes, u.split(sizes, -1), strict=True):
        if size == 1:
            y, state = module.step(chunk[..., 0], state)
            found.append(y.unsqueeze(-1))
        else:
            y, state = module(chunk, state)
            found.append(y)
    assert state.position == sum(sizes)
    y = torch.cat(found, -1)
    assert y.shape == u.shape
    assert not u.numel() or (y - offline(module, u)).abs().max() < 1e-11


@EVERY_FORM
@pytest.mark.parametrize("steps", [1, 20, 21, 22, 200])
def test_a_prefill_goes_on_step_by_step(form, steps):
    module, u = streamed(form), signal(2, steps + 30)
    y, state = module.prefill(u[..., :steps])
    then = by_steps(module, u[..., steps:], state)
    assert (torch.cat([y, then], -1) - offline(module, u)).abs().max() < 1e-11


def steps_without_drift(form, steps):
    """Errors of the first and the last thousand outputs, in units of the outputs."""
    module = streamed(form, 64, torch.float32, **({"kernel_size": 8} if form in KINDS else {}))
    exact = copy.deepcopy(module).double()
    u = 5 + signal(1, steps, dtype=torch.float32)
    y = by_steps(module, u, module.init_state(1)).double()
    true = offline(exact, u[..., -1100:].double())[..., -1000:]
    scale = true.abs().max()
    return [
        float((y[..., :1000] - offline(exact, u[..., :1000].double())).abs().max() / scale),
        float((y[..., -1000:] - true).abs().max() / scale),
    ]


@STREAMED
@EVERY_FORM
def test_errors_do_not_grow_over_three_thousand_steps(form):
    early, late = steps_without_drift(form, 3000)
    assert late < 5e-6
    assert late < 2 * early + 1e-6


@pytest.mark.slow
@STREAMED
@EVERY_FORM
def test_errors_do_not_grow_over_fifty_thousand_steps(form):
    early, late = steps_without_drift(form, 50_000)
    assert late < 5e-6
    assert late < 2 * early + 1e-6


# ---- what a step costs


class Written(TorchDispatchMode):
    """Counts the numbers that operations return; of those that go to some places of a tensor, their own."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        written = args[2] if func is torch.ops.aten.index_put_.default else out
        self.count += sum(value.numel() for value in torch.utils._pytree.tree_leaves(written) if torch.is_tensor(value))
        return out


def written_per_step(module, steps):
    """Of a stream that has run for a while."""
    state = module.init_state(1)
    module(torch.zeros(1, 2, steps), state)
    with Written() as written:
        by_steps(module, torch.zeros(1, 2, steps), state)
    return written.count / steps


@STREAMED
@pytest.mark.parametrize("kind", ["dilated", "sparse", "fourier", "fourier+sparse"])
def test_a_step_costs_what_the_parameters_cost_and_not_the_length(kind):
    short, long = (layer(kind, n, 16, 2, dtype=torch.float32).eval() for n in (256, 4096))
    # 5 branches and 9; a cost that grows with the length would be sixteen times as large
    assert written_per_step(long, 64) < 9 / 5 * written_per_step(short, 64)


@STREAMED
def test_a_step_of_a_dense_kernel_costs_the_logarithm_of_the_length():
    costs = []
    for length in (16, 128, 1024):
        module = LongConv(signal(1, length, 2, dtype=torch.float32), torch.zeros(2))
        costs.append(written_per_step(module, length))
    # sizes 1 to L, the one of size q every 2 q steps: the same is added for each doubling
    first, second = costs[1] - costs[0], costs[2] - costs[1]
    assert second < 1.2 * first
    assert costs[2] < 2 * costs[0]


@pytest.mark.parametrize("length", [256, 1024])
def test_states_and_taps_are_counted_by_resolutions(length):
    branches = {256: 5, 1024: 7}[length]
    (taps,) = layer("dilated", length, 16).eval().init_state(2).ways
    assert taps.lags.shape == (3, 16 * branches + 1)
    sliding = layer("fourier", length, 16).eval().init_state(2)
    assert sliding.memories[0]["S"].shape == (2, branches, 3, 8)
    assert sliding.ring.shape == (2, 3, length + 1)


# ---- states


@EVERY_FORM
def test_a_new_state_knows_nothing_of_the_last_one(form):
    module, u = streamed(form), signal(2, 40)
    first = by_steps(module, u, module.init_state(2))
    state = module.init_state(2)
    assert torch.equal(by_steps(module, u, state), first)
    # streams side by side do not hear each other
    one, two = module.init_state(2), module.init_state(2)
    found = [(module.step(u_t, one)[0], module.step(-u_t, two)[0]) for u_t in u.unbind(-1)]
    assert torch.equal(torch.stack([pair[0] for pair in found], -1), first)


@EVERY_FORM
def test_rows_of_a_stream_do_not_hear_each_other(form):
    module, u = streamed(form), signal(3, 40)
    together = by_steps(module, u, module.init_state(3))
    alone = by_steps(module, u[1:2], module.init_state(1))
    assert (together[1:2] - alone).abs().max() < 1e-12


@EVERY_FORM
def test_a_stream_keeps_the_weights_of_its_start(form):
    module, u = streamed(form), signal(2, 40)
    true, state = offline(module, u), module.init_state(2)
    with torch.no_grad():
        for value in itertools.chain(module.parameters(), module.buffers()):
            if value.is_floating_point():
                value.mul_(2.0)
    y = torch.cat([by_steps(module, u[..., :20], state), module(u[..., 20:], state)[0]], -1)
    assert (y - true).abs().max() < 1e-11


@EVERY_FORM
def test_a_copy_of_a_state_goes_its_own_way(form):
    module, u = streamed(form), signal(2, 40)
    state = module.init_state(2)
    by_steps(module, u[..., :13], state)
    saved = copy.deepcopy(state)
    first = by_steps(module, u[..., 13:], state)
    assert torch.equal(by_steps(module, u[..., 13:], saved), first)


@EVERY_FORM
def test_no_gradient_goes_through_a_stream(form):
    module = streamed(form)
    u = signal(2, 5).requires_grad_()
    state = module.init_state(2)
    assert not module.step(u[..., 0], state)[0].requires_grad
    assert not module(u, state)[0].requires_grad


@EVERY_FORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_stream_answers_in_the_format_that_it_is_asked_in(form, dtype):
    module = streamed(form, dtype=torch.float32)
    u = signal(2, 40).to(dtype)
    true = offline(copy.deepcopy(module).double(), u.double())
    state = module.init_state(2)
    y = torch.cat([by_steps(module, u[..., :9], state), module(u[..., 9:], state)[0]], -1)
    assert y.dtype == dtype
    allowed = max(torch.finfo(dtype).eps, 1e-5)
    assert (y.double() - true).abs().max() < allowed * true.abs().max()


# ---- what is refused


@EVERY_FORM
def test_an_input_that_does_not_belong_is_refused_and_changes_nothing(form, shapes_unchecked):
    module, u = streamed(form), signal(2, 40)
    true, state = offline(module, u), module.init_state(2)
    y = [by_steps(module, u[..., :30], state)]
    bad = u[..., 30].clone()
    bad[1, 2] = torch.nan
    wrong = {
        "2 rows of 3 channels": (u[:1, :, 30], u[:, :2, 30], u[..., 30:31]),
        "finite floating-point": (bad, bad.abs() / 0, torch.ones(2, 3, dtype=torch.long)),
    }
    for message, inputs in wrong.items():
        for one in inputs:
            with pytest.raises(InvalidInput, match=message):
                module.step(one, state)
    for one in (u[:1, :, 30:], bad.unsqueeze(-1), torch.ones(2, 3, 5, dtype=torch.long)):
        with pytest.raises(InvalidInput, match=r"rows of|finite"):
            module(one, state)
    y.append(by_steps(module, u[..., 30:], state))
    assert (torch.cat(y, -1) - true).abs().max() < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_in_training_does_not_stream(kind):
    module = streamed(kind)
    state = module.init_state(2)
    module.train()
    u = signal(2, 5)
    for call in (
        lambda: module.init_state(2),
        lambda: module.step(u[..., 0], state),
        lambda: module.prefill(u),
        lambda: module(u, state),
    ):
        with pytest.raises(NoisewiseError, match=r"call \.eval\(\)"):
            call()


def test_a_layer_that_looks_ahead_does_not_stream():
    module = layer(bidirectional=True).eval()
    for one in (module, module.merge()):
        with pytest.raises(InvalidInput, match="bidirectional=False"):
            one.init_state(1)


@pytest.mark.parametrize("form", ["fourier", "merged"])
@pytest.mark.parametrize("batch", [0, -1])
def test_a_stream_without_rows_is_refused(form, batch):
    with pytest.raises(InvalidInput, match="batch must be at least 1"):
        streamed(form).init_state(batch)


@pytest.mark.parametrize("form", ["fourier", "merged"])
@pytest.mark.parametrize("batch", [1.5, "2"])
def test_a_number_of_rows_that_is_none_is_refused(form, batch, shapes_unchecked):
    with pytest.raises(InvalidInput, match="batch must be"):
        streamed(form).init_state(batch)


@EVERY_FORM
def test_a_chunk_without_an_axis_of_time_is_refused(form, shapes_unchecked):
    module = streamed(form)
    with pytest.raises(InvalidInput, match=r"\(2, 3\)"):
        module(signal(2, 5)[..., 0], module.init_state(2))


@pytest.mark.parametrize("form", ["fourier", "merged"])
def test_lengths_of_a_chunk_are_refused_and_not_forgotten(form):
    module = streamed(form)
    with pytest.raises(InvalidInput, match="lengths"):
        module(signal(2, 5), module.init_state(2), lengths=torch.tensor([5, 3]))


@EVERY_FORM
def test_weights_in_half_precision_stream_too(form):
    module = streamed(form).to(torch.bfloat16)
    u = signal(2, 40).to(torch.bfloat16)
    true = offline(copy.deepcopy(module).double(), u.double())
    # each of some ten factors is rounded to 3 digits
    assert (by_steps(module, u, module.init_state(2)).double() - true).abs().max() < 0.05 * true.abs().max()

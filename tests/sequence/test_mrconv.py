"""A multi-resolution convolution is its branches, exactly: in training, in use, merged, and whatever the signal is."""

import copy
import itertools
import math

import pytest
import torch
from branches_by_torch import by_branches, convolve, dense_kernels, gradients, layer, signal
from safetensors.torch import load, save

from noisewise.sequence import LongConv, MRConv
from noisewise.sequence.kernels import KINDS

WAYS = pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both"])
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
# rounding of sums of a hundred terms in float64 stays below
EXACT = 1e-11


def off(one, other):
    """Largest difference, in units of the largest value."""
    return float(((one - other).abs().max() / other.abs().max().clamp(min=1e-300)).detach())


def assert_exact(module, u, lengths=None, tolerance=EXACT, offset=0.0):
    """Outputs, gradients and running statistics in train mode are those of the branches."""
    u = (u + offset).requires_grad_()
    true = by_branches(module, u, lengths)
    y = module(u, lengths=lengths)
    assert off(y, true.y) < tolerance
    if module.norm == "batch":
        assert off(module.running_mean, true.running_mean) < tolerance
        assert off(module.running_var, true.running_var) < tolerance
    ours, theirs = gradients(y, u, module), gradients(true.y, u, module)
    # gradients of kernels that a normalisation all but cancels are measured against the largest of their kind
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        scale = max(float(value.abs().max()), 1e-3 * largest)
        assert (ours[name] - value).abs().max() < tolerance * scale, name


# ---- training


@EVERY_KIND
@WAYS
@pytest.mark.parametrize(("length", "steps"), [(24, 24), (37, 37), (3, 3), (48, 29), (33, 32)])
def test_training_by_one_convolution_is_batch_norm_of_every_branch(kind, bidirectional, length, steps):
    module = layer(kind, length, bidirectional=bidirectional)
    assert_exact(module, signal(3, steps))


@pytest.mark.parametrize("kind", ["fourier", "dilated", "fourier+sparse"])
@pytest.mark.parametrize(("rows", "steps"), [(1, 2), (1, 5), (1, 101), (7, 2), (5, 1), (2, 3)])
def test_few_rows_and_few_steps_are_exact_too(kind, rows, steps):
    assert_exact(layer(kind, 101), signal(rows, steps))


@WAYS
def test_a_signal_that_wanders_far_from_zero_is_exact(bidirectional):
    u = signal(3, 60).cumsum(-1)
    assert_exact(layer("fourier", 60, bidirectional=bidirectional), u)
    assert_exact(layer("fourier", 60, bidirectional=bidirectional), u, offset=1e4)


@EVERY_KIND
@WAYS
def test_single_precision_is_right_to_four_digits(kind, bidirectional):
    exact = layer(kind, 90, bidirectional=bidirectional)
    single = copy.deepcopy(exact).float()
    u = signal(3, 90).cumsum(-1)
    wide, narrow = u.clone().requires_grad_(), u.float().requires_grad_()
    true, y = by_branches(exact, wide), single(narrow)
    assert y.dtype == torch.float32
    assert off(y, true.y) < 1e-4
    assert off(single.running_var, true.running_var) < 1e-4
    theirs, ours = gradients(true.y, wide, exact), gradients(y, narrow, single)
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() < 1e-4 * max(float(value.abs().max()), 1e-2 * largest), name


@WAYS
@pytest.mark.parametrize("length", [90, 2000])
def test_single_precision_survives_an_offset_of_ten_thousand(bidirectional, length):
    exact = layer("fourier", length, bidirectional=bidirectional)
    single = copy.deepcopy(exact).float()
    u = 1e4 + signal(2, length).cumsum(-1).float()
    # as exact in double precision as the test above says
    assert off(single(u), exact(u.double())) < 1e-5
    assert off(single.running_var, exact.running_var) < 1e-5
    true = copy.deepcopy(single).double().eval()(u.double())
    assert off(single.eval()(u), true) < 1e-5
    assert off(single.merge()(u), true) < 1e-5


@EVERY_KIND
def test_a_blow_in_the_last_step_is_not_taken_for_what_rings_on(kind):
    # nearly all energy lies behind the end, and is taken away again
    exact = layer(kind, 256, kernel_size=16)
    single = copy.deepcopy(exact).float()
    u = signal(4, 256, dtype=torch.float32)
    u[..., -1] = 100.0
    true = by_branches(exact, u.double())
    single(u)
    assert ((single.running_var - true.running_var) / true.running_var).abs().max() < 1e-4
    exact(u.double())
    assert ((exact.running_var - true.running_var) / true.running_var).abs().max() < EXACT


@pytest.mark.parametrize("kind", ["fourier", "dilated", "sparse", "dense"])
@WAYS
def test_rows_of_many_lengths_are_normalised_over_their_own_steps(kind, bidirectional):
    u, lengths = signal(4, 40), torch.tensor([40, 1, 17, 33])
    u[1, :, 1:], u[2, :, 17:] = math.nan, 1e9
    module = layer(kind, 40, bidirectional=bidirectional)
    assert_exact(module, u, lengths)
    assert (module(u, lengths=lengths)[2, :, 17:] == 0).all()


@WAYS
@pytest.mark.parametrize("norm", ["batch", "kernel"])
def test_a_padded_row_in_use_is_the_row_alone(norm, bidirectional):
    u, lengths = signal(3, 40), torch.tensor([40, 9, 26])
    module = layer("fourier+sparse", 40, bidirectional=bidirectional, norm=norm).eval()
    y = module(u, lengths=lengths)
    merged = module.merge()(u, lengths=lengths)
    for row, own in enumerate(lengths.tolist()):
        alone = module(u[row : row + 1, :, :own])
        assert off(y[row : row + 1, :, :own], alone) < EXACT
        assert off(merged[row : row + 1, :, :own], alone) < EXACT


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"norm": "kernel"}], ids=["causal", "both", "kernel"])
def test_gradients_are_those_of_finite_differences(options):
    module = layer("fourier+sparse", 7, kernel_size=3, d_model=2, **options)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(u, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (u,))

    u = signal(2, 7, 2).requires_grad_()
    assert torch.autograd.gradcheck(run, (u, *parameters), atol=1e-6)


@EVERY_KIND
@WAYS
@pytest.mark.parametrize("lengths", [None, [30, 4, 19]], ids=["whole", "lengths"])
def test_the_layer_that_runs_its_branches_is_the_same_layer(kind, bidirectional, lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    exact, branches = (layer(kind, 30, bidirectional=bidirectional, stats=stats) for stats in ("exact", "branches"))
    u = signal(3, 30)
    assert off(exact(u, lengths=lengths), branches(u, lengths=lengths)) < EXACT
    assert off(exact.running_var, branches.running_var) < EXACT
    assert off(exact.eval()(u), branches.eval()(u)) < EXACT


@WAYS
def test_full_statistics_count_what_rings_on_after_the_end(bidirectional):
    full = layer("fourier", 20, bidirectional=bidirectional, stats="full", momentum=1.0)
    u = signal(4, 20)
    full(u)
    far = torch.nn.functional.pad(u, (40, 40))
    for i, kernels in enumerate(dense_kernels(full)):
        for way, kernel in enumerate(kernels):
            energy = convolve(far, kernel, ahead=way == 1).square().sum((0, 2)) / 80
            mean = convolve(u, kernel, ahead=way == 1).mean((0, 2))
            assert off(full.running_var[i, way], (energy - mean.square()) * 80 / 79) < EXACT
    # it is a normaliser of its own: the exact one is smaller in every branch that mixes steps
    exact = layer("fourier", 20, bidirectional=bidirectional, momentum=1.0)
    exact(u)
    assert (exact.running_var < full.running_var).all()


# ---- in use, and merged


@EVERY_KIND
@WAYS
@pytest.mark.parametrize("norm", ["batch", "kernel"])
@pytest.mark.parametrize(("length", "steps"), [(24, 24), (37, 37), (3, 3), (48, 29), (33, 2), (16, 1)])
def test_one_kernel_and_a_bias_are_the_whole_layer(kind, bidirectional, norm, length, steps):
    module, u = layer(kind, length, bidirectional=bidirectional, norm=norm).eval(), signal(2, steps)
    merged = module.merge()
    assert isinstance(merged, LongConv)
    true = by_branches(module, u).y
    assert off(module(u), true) < EXACT
    assert off(merged(u), true) < EXACT
    single = copy.deepcopy(module).float()
    scale = float(true.detach().abs().max())
    assert (single.merge()(u.float()) - true).abs().max() < 1e-5 * max(scale, 1)
    assert (single(u.float()) - true).abs().max() < 1e-5 * max(scale, 1)


def test_a_merged_layer_keeps_a_kernel_and_a_bias_and_nothing_else():
    merged = layer("fourier+sparse", 30).eval().merge()
    assert set(merged.state_dict()) == {"kernel", "bias"}
    assert not list(merged.parameters())
    u = signal(2, 30)
    again = LongConv(torch.zeros(1, 3, 30, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    again.load_state_dict(load(save(merged.state_dict())))
    assert torch.equal(again(u), merged(u))


def test_merging_after_training_changes_nothing_and_leaves_the_layer_as_it_is():
    module = MRConv(4, 50, "fourier", 8)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    u, target = signal(8, 50, 4, dtype=torch.float32), signal(8, 50, 4, seed=1, dtype=torch.float32)
    for _ in range(20):
        optimizer.zero_grad()
        (module(u) - target).square().mean().backward()
        optimizer.step()
    before = copy.deepcopy(module.state_dict())
    merged = module.merge()
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert (merged(u) - module.eval()(u)).abs().max() < 1e-5


def test_a_signal_that_is_not_contiguous_is_the_same_signal():
    u = signal(2, 24).mT.contiguous().mT
    assert not u.is_contiguous()
    assert off(layer()(u), layer()(u.contiguous())) < EXACT


@EVERY_KIND
def test_a_saved_layer_is_the_same_layer(kind):
    made = layer(kind, 30, seed=3).eval()
    again = MRConv(3, 30, kind, 4, seed=4).double().eval()
    again.load_state_dict(load(save(made.state_dict())))
    u = signal()
    # the lags of sparse parts were drawn from another seed, and are read
    assert torch.equal(again(u), made(u))
    assert torch.equal(copy.deepcopy(made)(u), made(u))


def test_a_seed_decides_everything_and_nothing_else_does():
    one = MRConv(3, 90, "fourier+sparse", seed=5)
    torch.manual_seed(1)
    two, other = MRConv(3, 90, "fourier+sparse", seed=5), MRConv(3, 90, "fourier+sparse", seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(one.kernels.lags_1, other.kernels.lags_1)


# ---- closed forms


@EVERY_KIND
def test_white_noise_gives_the_variance_that_theory_says(kind):
    length, rows, deviation = 40, 4000, 1.7
    module = layer(kind, length, momentum=1.0)
    u = deviation * signal(rows, length, seed=5)
    module(u)
    for i, (kernel,) in enumerate(dense_kernels(module)):
        # energy of step t is that of the lags it reaches; steps of a row vary together, rows do not
        branch = convolve(u, kernel)
        energies = branch.square().mean(-1)
        true = deviation**2 / length * (kernel.square() * (length - torch.arange(kernel.shape[-1]))).sum(-1)
        # the mean that is subtracted has variance of order 1 / rows, and so little counts
        mean = deviation**2 / (rows * length**2) * _partial_energies(kernel, length)
        z = (module.running_var[i, 0] - (true - mean)) / (energies.std(0) / rows**0.5)
        assert z.abs().max() < 4


def _partial_energies(kernel, length):
    """sum_s (sum_{j < length - s} k[j])^2: what the sum of a branch over all steps is in white noise."""
    sums = torch.nn.functional.pad(kernel, (0, length - kernel.shape[-1])).cumsum(-1)
    return sums.square().sum(-1)


@EVERY_KIND
def test_a_constant_input_gives_running_sums_of_the_kernels(kind):
    module = layer(kind, 25, skip=False).eval()
    with torch.no_grad():
        module.running_mean.zero_()
        module.running_var.fill_(1 - module.eps)
        module.weight.fill_(1)
        module.bias.zero_()
        sums = sum(
            module.alpha[i, 0].unsqueeze(-1) * torch.nn.functional.pad(kernel, (0, 25 - kernel.shape[-1])).cumsum(-1)
            for i, (kernel,) in enumerate(dense_kernels(module))
        )
    assert off(module(torch.ones(2, 3, 25, dtype=torch.float64)), sums.expand(2, -1, -1)) < EXACT


def test_one_resolution_is_a_convolution_and_a_batch_norm():
    module = layer("dense", 9, kernel_size=16, skip=False)
    assert module.alpha.shape[0] == 1
    u, norm = signal(4, 9), torch.nn.BatchNorm1d(3).double()
    kernel = module.kernels.dense_0[0]
    plain = norm(convolve(u, kernel))
    expected = module.alpha[0, 0].unsqueeze(-1) * (
        module.weight[0, 0].unsqueeze(-1) * plain + module.bias[0, 0].unsqueeze(-1)
    )
    assert off(module(u), expected) < EXACT


@EVERY_KIND
def test_weights_on_one_branch_leave_that_branch(kind):
    module, u = layer(kind, 40, skip=False), signal(3, 40)
    with torch.no_grad():
        module.alpha.zero_()
        module.alpha[2] = 1.0
    branch = convolve(u, dense_kernels(module)[2][0])
    normed = torch.nn.functional.batch_norm(branch, None, None, module.weight[2, 0], module.bias[2, 0], True)
    assert off(module(u), normed) < EXACT


@WAYS
@pytest.mark.parametrize("training", [True, False])
def test_without_gamma_only_the_biases_and_the_skip_are_left(bidirectional, training):
    module, u = layer("fourier", 40, bidirectional=bidirectional).train(training), signal(3, 40)
    with torch.no_grad():
        module.weight.zero_()
    constant = (module.alpha * module.bias).sum((0, 1)).unsqueeze(-1)
    assert off(module(u), constant + module.skip.unsqueeze(-1) * u) < EXACT


@EVERY_KIND
def test_the_scale_of_a_kernel_means_nothing_in_training(kind):
    module, u = layer(kind, 40, eps=1e-300), signal(3, 40)
    before = module(u)
    with torch.no_grad():
        for name, value in module.kernels.named_parameters():
            if name != "mix":
                value.mul_(37.0)
    assert off(module(u), before) < EXACT
    with torch.no_grad():
        for name, value in module.kernels.named_parameters():
            if name != "mix":
                value.neg_()
    # but its sign does
    assert off(module(u), before) > 0.1


@EVERY_KIND
def test_moving_the_signal_moves_the_output(kind):
    module, u = layer(kind, 64).eval(), signal(2, 40)
    later = torch.nn.functional.pad(u, (24, 0))
    quiet = module(torch.zeros_like(later))
    assert off(module(later)[..., 24:], module(u)) < EXACT
    assert off(module(later)[..., :24], quiet[..., :24]) < EXACT


@pytest.mark.parametrize("training", [True, False])
def test_time_reversed_a_layer_that_looks_both_ways_has_its_directions_swapped(training):
    module, u = layer("fourier+sparse", 40, bidirectional=True).train(training), signal(3, 40)
    swapped = copy.deepcopy(module)
    with torch.no_grad():
        for name, value in (*swapped.named_parameters(), *swapped.named_buffers()):
            if name != "skip" and value.ndim:
                axis = {"kernels.mix": 2}.get(name, 0 if name.startswith("kernels.") else 1)
                value.copy_(value.flip(axis))
    assert off(swapped(u.flip(-1)), module(u).flip(-1)) < EXACT


@WAYS
def test_rows_do_not_know_their_order(bidirectional):
    module, u = layer("fourier", 40, bidirectional=bidirectional), signal(5, 40)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert off(module(u[order]), module(u)[order]) < EXACT
    module.eval()
    assert off(module(u[:1]), module(u)[:1]) < EXACT


def test_in_use_a_loud_row_does_not_deafen_a_quiet_one():
    module = layer("fourier", 40, dtype=torch.float32).eval()
    u = signal(2, 40, dtype=torch.float32)
    u[0] += 1e6
    alone = module(u[1:])
    assert (module(u)[1:] - alone).abs().max() < 1e-5 * alone.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_no_number_stays_in_its_row_and_channel(bad):
    module, u = layer("fourier", 40).eval(), signal(2, 40)
    clean = module(u)
    u[0, 1, 20] = bad
    for found in (module(u), module.merge()(u)):
        assert not found[0, 1, 20:].isfinite().any()
        assert off(found[1], clean[1]) < EXACT
        assert off(found[0, 0], clean[0, 0]) < EXACT


# ---- what sees the future


def reach(module, u, t0):
    """Largest gradients of y[t0] with respect to inputs at each step, over channels and rows."""
    u = u.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(u)[0, :, t0].sum(), u)
    return gradient.abs().amax((0, 1)), gradient.abs().amax((1, 2))


@EVERY_KIND
@pytest.mark.parametrize("form", ["eval", "merged", "kernel, train", "kernel, eval"])
def test_a_causal_layer_sees_no_future_and_no_other_row(kind, form):
    module = layer(kind, 50, norm="kernel" if "kernel" in form else "batch").train("train" in form)
    if form == "merged":
        module = module.merge()
    by_step, by_row = reach(module, signal(3, 50), 20)
    # what is left is rounding of the transforms
    assert by_step[21:].max() < 1e-13 * by_step.max()
    assert by_row[1:].max() < 1e-13 * by_row.max()
    u, other = signal(3, 50), signal(3, 50, seed=1)
    changed = torch.cat([u[..., :21], 100 * other[..., 21:]], -1)
    assert off(module(changed)[..., :21], module(u)[..., :21]) < EXACT


@EVERY_KIND
def test_with_the_kernel_norm_a_beginning_is_heard_the_same_whatever_follows(kind):
    module, u = layer(kind, 50, norm="kernel"), signal(2, 50)
    for mode in (True, False):
        whole = module.train(mode)(u)
        for steps in (1, 3, 17, 49):
            assert off(module(u[..., :steps]), whole[..., :steps]) < EXACT


def test_statistics_of_a_batch_do_see_the_future_in_training():
    by_step, by_row = reach(layer("fourier", 50), signal(3, 50), 20)
    # the truth that the page states: a model of its own next input must not be trained so
    assert by_step[21:].max() > 1e-3 * by_step.max()
    assert by_row[1:].max() > 1e-3 * by_row.max()


# ---- size


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("length", "branches"), [(32, 1), (33, 2), (256, 4), (1024, 6), (16384, 10)])
def test_parameters_are_those_of_the_table(length, branches, skip):
    d, l_0, m, s = 5, 32, 9, 12
    per_channel = {
        "dilated": branches * l_0,
        "fourier": 2 * branches * m,
        "sparse": branches * s,
        "fourier+sparse": branches * (2 * m + s) + 2 * branches,
    }
    for kind, own in per_channel.items():
        module = MRConv(d, length, kind, l_0, modes=m, taps=s, skip=skip)
        if kind == "dilated" and length == 33:
            # the taps of the second branch that lie beyond lag 32 are not there
            own -= l_0 - 17
        # alpha, gamma and beta of every branch
        assert sum(p.numel() for p in module.parameters()) == d * (own + 3 * branches + skip)


def test_twice_the_length_is_one_branch_more():
    sizes = [sum(p.numel() for p in MRConv(2, 32 * 2**n).parameters()) for n in range(8)]
    steps = {after - before for before, after in itertools.pairwise(sizes)}
    assert steps == {2 * (2 * 16 + 3)}


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@WAYS
def test_half_precision_is_single_precision_rounded(dtype, training, bidirectional):
    module = layer("fourier+sparse", 70, bidirectional=bidirectional, dtype=torch.float32).train(training)
    u = signal(3, 70, dtype=torch.float32).to(dtype)
    single = module(u.float())
    y = module(u)
    assert y.dtype == dtype
    assert (y.float() - single).abs().max() <= torch.finfo(dtype).eps * single.abs().max()
    if not training:
        merged = module.merge()(u)
        assert merged.dtype == dtype
        assert (merged.float() - single).abs().max() <= 2 * torch.finfo(dtype).eps * single.abs().max()


@pytest.mark.parametrize("form", ["train", "eval", "merged"])
def test_autocast_changes_nothing(form):
    module = layer("fourier+sparse", 70, dtype=torch.float32).train(form == "train")
    if form == "merged":
        module = module.merge()
    u = signal(3, 70, dtype=torch.float32)
    single = module(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = module(u)
    assert torch.equal(cast, single)


@EVERY_KIND
def test_weights_in_half_precision_work_to_its_resolution(kind):
    exact = layer(kind, 40, dtype=torch.float32).eval()
    half = copy.deepcopy(exact).to(torch.bfloat16)
    u = signal(2, 40, dtype=torch.float32).to(torch.bfloat16)
    true = exact(u.float())
    # each of some ten factors is rounded to 3 digits
    assert (half(u).float() - true).abs().max() < 0.05 * true.abs().max()
    assert (half.merge()(u).float() - true).abs().max() < 0.05 * true.abs().max()

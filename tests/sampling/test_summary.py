"""What a summary says: bad agreement of the chains, a biased sampler, where the modes are, and the user's own mistakes."""

import io

import pytest
import torch
from every_kernel import seeded
from rich.console import Console

from noisewise.errors import InvalidInput
from noisewise.sampling import HMC, MALA, ULA, sample
from noisewise.targets import as_target, two_modes


def test_chains_that_do_not_agree_are_noted_with_their_worst_coordinate():
    target = two_modes(2, separation=20.0)
    stuck = sample(MALA(target, step_size=0.3), init=target.mode_means[torch.arange(10) % 2], draws=200, progress=False)
    notes = stuck.summary().notes
    assert any(note.startswith("R-hat is") and "x[" in note for note in notes)
    one = two_modes(2, separation=0.1)
    fine = sample(HMC(one, step_size=0.7), init=one.sample(20, seeded(0)), draws=300, progress=False)
    assert fine.summary().notes == ()


def test_few_effective_draws_are_noted():
    target = two_modes(2, separation=0.1)
    slow = sample(MALA(target, step_size=1e-4), init=target.sample(4, seeded(0)), draws=50, progress=False)
    assert any("R-hat" in note or "effective sample size" in note for note in slow.summary().notes)


def test_the_bias_of_ula_is_noted():
    target = two_modes(2, separation=0.1)
    run = sample(ULA(target, step_size=0.05), init=target.sample(20, seeded(0)), draws=100, progress=False)
    assert any("biased" in note for note in run.summary().notes)


def test_modes_are_shown_from_the_heaviest_with_their_centres():
    target = two_modes(2, weights=(0.3, 0.7))
    run = sample(HMC(target, step_size=0.7), init=target.sample(200, seeded(0)), draws=20, progress=False)
    summary = run.summary()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary.table())
    text = console.export_text()
    heavy, light = (f"({value:.3g}" for value in sorted(summary.centres[:, 0].tolist(), reverse=True))
    assert "2 modes" in text
    assert 0 < text.index(heavy) < text.index(light)
    assert summary.to_dict()["interrupted"] is False


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda x: x.squre().sum(-1), "AttributeError"),
        (lambda x: (x + torch.ones(4)).sum(-1), "must match the size"),
        (lambda x: torch.as_tensor(x.numpy().sum(-1)), "from_numpy"),
    ],
)
def test_errors_of_the_users_own_function_are_one_sentence_with_the_shape(broken, said):
    with pytest.raises(InvalidInput, match=said) as caught:
        sample(as_target(broken, dim=3), chains=5, draws=3, progress=False)
    assert "[5, 3]" in str(caught.value)
    assert caught.value.__cause__ is not None

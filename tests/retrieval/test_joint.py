"""Joint vectors are units whose inner product is the promised mixture of both cosines, with the slopes of calculus."""

import math

import pytest
import torch
from lookup_augment import Lookup
from torch.nn import functional

from noisewise.errors import InvalidInput, RunFolderError
from noisewise.retrieval.joint import JointEncoder
from noisewise.retrieval.table import WordPieceTable

N, BLACK, SMALL = 40, 12, 5
TEXTS = [str(i) for i in range(N)]


def black_vectors(n=N, dim=BLACK, seed=1, dtype=torch.float32):
    return 3 * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def joint(weighting="equal", black_dim=BLACK, small=SMALL, bend=0.0, **options):
    """`bend`: size of a random direction a, so that l depends on the text."""
    made = JointEncoder(Lookup(N, small), black_dim, weighting, **options)
    if bend:
        a = made.weight.weight
        with torch.no_grad():
            a.copy_(bend * torch.randn(a.shape, generator=torch.Generator().manual_seed(2)))
    return made.eval()


def vectors(model, black=None):
    return model.encode(TEXTS, black_vectors() if black is None else black, "document")


def cosines():
    b = functional.normalize(black_vectors().double(), dim=1)
    t = functional.normalize(Lookup(N, SMALL).table.detach().double(), dim=1)
    return b @ b.T, t @ t.T


@pytest.mark.parametrize("dims", [(1, 1), (12, 5), (300, 64)])
@pytest.mark.parametrize(
    "options", [{}, {"weighting": 0.0}, {"weighting": 0.5}, {"weighting": 1e4}, {"weighting": "lambda"},
                {"weighting": "lambda", "start": 1 - 1e-9}, {"weighting": "lambda", "start": 1e-6, "bend": 40.0}],
)  # fmt: skip
def test_every_joint_vector_is_a_unit(dims, options):
    e = vectors(joint(black_dim=dims[0], small=dims[1], **options), black_vectors(dim=dims[0]))
    assert e.shape == (N, sum(dims))
    assert float((e.double().norm(dim=1) - 1).abs().max()) < 1e-6


def test_scores_are_the_closed_forms():
    cos_b, cos_t = cosines()
    e = vectors(joint())
    assert torch.allclose((e @ e.T).double(), (cos_b + cos_t) / 2, atol=1e-6)
    for w in (0.0, 0.5, 2):
        e = vectors(joint(w))
        assert torch.allclose((e @ e.T).double(), (cos_b + w**2 * cos_t) / (1 + w**2), atol=1e-6)
    # in float64: 1 - l^2 of a float32 l near 1 has lost half of its digits
    model, black = joint("lambda", bend=4.0).double(), black_vectors().double()
    l = model.black_weights(black).detach().unsqueeze(1)  # noqa: E741
    assert float(l.std()) > 0.1
    e = vectors(model, black)
    rest = ((1 - l**2) @ (1 - l**2).T).sqrt()
    assert torch.allclose(e @ e.T, l @ l.T * cos_b + rest * cos_t, atol=1e-6)


@pytest.mark.parametrize(("start", "weighting"), [(None, "equal"), (2 / math.sqrt(5), 0.5)])
def test_a_constant_l_is_a_fixed_weight(start, weighting):
    assert torch.allclose(vectors(joint("lambda", start=start)), vectors(joint(weighting)), atol=1e-6)


def test_l_near_its_ends_ranks_as_one_part_does():
    cos_b, cos_t = cosines()
    for start, alone in ((1 - 1e-12, cos_b), (1e-7, cos_t)):
        e = vectors(joint("lambda", start=start)).double()
        assert torch.equal((e @ e.T).argsort(1, descending=True), alone.argsort(1, descending=True))


@pytest.mark.parametrize("weighting", ["equal", 0.5, "lambda"])
def test_cosine_inner_product_and_distance_rank_alike(weighting):
    model = joint(weighting, bend=4.0 if weighting == "lambda" else 0.0)
    e = vectors(model).double()
    inner = (e @ e.T).argsort(1, descending=True)
    assert torch.equal(inner, functional.cosine_similarity(e.unsqueeze(1), e, dim=2).argsort(1, descending=True))
    # the nearest of all is the row itself, at a distance of rounding errors
    assert torch.equal(inner, torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist").argsort(1))


def test_l_depends_on_the_black_box_alone_and_starts_where_it_is_told():
    model = joint("lambda", start=0.9)
    assert torch.allclose(model.black_weights(black_vectors()), torch.full((N,), 0.9), atol=1e-6)
    assert torch.allclose(model.black_weights(black_vectors()), model.black_weights(7 * black_vectors()), atol=1e-6)


@pytest.mark.parametrize("weighting", ["equal", 0.5, "lambda"])
def test_gradients_are_those_of_finite_differences_and_none_reaches_the_black_box(weighting):
    model = joint(weighting, bend=1.0 if weighting == "lambda" else 0.0).double()
    black = black_vectors(dtype=torch.float64).requires_grad_()
    features = model.augment.features(TEXTS, "query")

    def score(*weights):
        names = [name for name, _ in model.named_parameters()]
        e = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (black, features))
        return (e[:5] @ e[5:].T).exp().sum()

    weights = tuple(model.parameters())
    assert torch.autograd.gradcheck(score, weights)
    score(*weights).backward()
    assert black.grad is None


def test_the_slope_of_l_is_finite_next_to_one():
    model = joint("lambda", start=1 - 1e-9).double()
    black = black_vectors(dtype=torch.float64)
    (model(black, model.augment.features(TEXTS, "query")) ** 3).sum().backward()
    for grad in (model.weight.weight.grad, model.weight.bias.grad):
        assert bool(grad.isfinite().all())
        assert float(grad.abs().max()) > 0


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_encode_keeps_the_order_and_does_not_depend_on_the_batch(batch_size):
    model = joint("lambda", bend=1.0)
    with torch.no_grad():
        plain = model(black_vectors(), model.augment.features(TEXTS, "query"))
    assert torch.allclose(model.encode(TEXTS, black_vectors(), "query", batch_size), plain, atol=1e-6)


@pytest.mark.parametrize("weighting", ["equal", 0.5, "lambda"])
def test_saved_and_loaded_gives_the_same_bits(weighting, tmp_path):
    texts = ["a red bus", "a green tram stops", "two buses and a tram", ""]
    table = WordPieceTable(8, seed=3)
    table.prepare(texts)
    model = JointEncoder(table, BLACK, weighting)
    model.save_pretrained(tmp_path)
    loaded = JointEncoder.from_pretrained(tmp_path)
    black = black_vectors(len(texts))
    assert torch.equal(loaded.encode(texts, black, "query"), model.encode(texts, black, "query"))
    assert not loaded.training
    with pytest.raises(RunFolderError, match="WordPieceTable"):
        JointEncoder.from_pretrained(tmp_path / "augment")


def test_what_cannot_work_is_refused_with_the_value(shapes_unchecked):
    for options, message in [
        ({"weighting": "both"}, "'both'"), ({"weighting": -1}, "-1"), ({"weighting": "lambda", "start": 1.0}, "1.0"),
        ({"start": 0.5}, "weighting='equal'"), ({"black_dim": 0}, "0"),
    ]:  # fmt: skip
        with pytest.raises(InvalidInput, match=message):
            joint(**options)
    with pytest.raises(InvalidInput, match="module with dim"):
        JointEncoder(torch.nn.Linear(2, 2), 3)
    model = joint()
    with pytest.raises(InvalidInput, match="built for"):
        vectors(model, black_vectors(dim=3))
    for value in (0.0, math.nan):
        bad = black_vectors()
        bad[7] = value
        with pytest.raises(InvalidInput, match="vector 7"):
            model(bad, model.augment.features(TEXTS, "query"))
    with pytest.raises(InvalidInput, match="'passage'"):
        model.encode(TEXTS, black_vectors(), "passage")
    with pytest.raises(InvalidInput, match="40 texts and 3"):
        model.encode(TEXTS, black_vectors(3), "query")

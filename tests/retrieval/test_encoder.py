"""A sentence-transformers model as an augment gives that library's vectors, and trains."""

import pytest
import torch

from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError
from noisewise.retrieval.fitting import RankingData, fit_joint
from noisewise.retrieval.joint import JointEncoder
from noisewise.retrieval.pairs import Pairs

pytest.importorskip("sentence_transformers")
from noisewise.retrieval.encoder import SentenceEncoder, small_transformer

TEXTS = [
    "a cat",
    "the dog sleeps near the cat on the mat",
    "no",
    "birds sing",
    "the cat and the dog play outside all day",
]


def encoder(seed=0, **options):
    return SentenceEncoder(small_transformer(TEXTS * 3, 1, 16, heads=2, seed=seed, **options)).eval()


def black(n, dim=6, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def test_vectors_are_those_of_the_library_with_its_prompts():
    made = encoder()
    made.model.prompts = {"query": "the dog ", "passage": "the cat "}
    for kind, encode in (("query", made.model.encode_query), ("document", made.model.encode_document)):
        with torch.no_grad():
            found = made(made.features(TEXTS, kind))
        expected = encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(found.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-6)
    assert not torch.allclose(made(made.features(TEXTS, "query")), made(made.features(TEXTS, "document")), atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_padding_and_sorting_by_length_change_nothing(batch_size):
    model = JointEncoder(encoder(), 6).eval()
    with torch.no_grad():
        singly = torch.cat([model(black(5)[i : i + 1], model.augment.features([TEXTS[i]], "query")) for i in range(5)])
    assert torch.allclose(model.encode(TEXTS, black(5), "query", batch_size), singly, atol=1e-5)


def test_the_seed_makes_the_model_and_its_folder_keeps_its_bits(tmp_path):
    first, again, other = encoder(1), encoder(1), encoder(2)
    with torch.no_grad():
        vectors = [made(made.features(TEXTS, "query")) for made in (first, again, other)]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])
    model = JointEncoder(first, 6, "lambda")
    model.save_pretrained(tmp_path)
    loaded = JointEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(TEXTS, black(5), "document"), model.encode(TEXTS, black(5), "document"))
    assert not list(tmp_path.rglob("*.bin"))
    with pytest.raises(RunFolderError, match="modules"):
        SentenceEncoder.from_pretrained(tmp_path)


def test_it_trains_in_chunks():
    texts = [f"{a} {b}" for a in ("cat", "dog", "bird", "mat") for b in ("sings", "sleeps", "plays", "sits", "runs")]
    made = SentenceEncoder(small_transformer(texts * 3, 1, 16, heads=2))
    model = JointEncoder(made, 6)
    before = [p.detach().clone() for p in model.parameters()]
    pairs = Pairs(torch.arange(20), torch.arange(20), torch.ones(20))
    data = RankingData(texts, texts, black(20), black(20, seed=1), pairs)
    result = fit_joint(model, data, dev=0.2, epochs=4, batch_size=8, chunk=3, lr=1e-2)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.dev.value >= result.start.value
    assert len(before) == len(list(model.parameters()))


def test_what_cannot_work_is_refused_with_the_value(tmp_path, shapes_unchecked):
    with pytest.raises(InvalidInput, match="Linear"):
        SentenceEncoder(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match="width=10"):
        small_transformer(TEXTS, 1, 10, heads=4)
    made = encoder()
    with pytest.raises(InvalidInput, match="'title'"):
        made.features(TEXTS, "title")
    with torch.no_grad():
        next(made.parameters()).fill_(float("nan"))
    with pytest.raises(NoisewiseError, match="a cat"):
        made(made.features(TEXTS, "query"))

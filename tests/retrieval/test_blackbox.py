"""Each text is paid for once: by one process, by two, after an interruption, an error and kill -9."""

import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from fake_endpoint import FakeEndpoint, unit_of, vector_of

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.retrieval.blackbox import PROBES, BlackBox, CachedBlackBox, UnusableText, as_black_box
from noisewise.retrieval.cache import EmbeddingCache
from noisewise.retrieval.endpoint import OpenAICompatible

QUICK = {"key": None, "backoff": 0.01, "timeout": 5.0, "batch_size": 4, "workers": 2}
TEXTS = [f"text number {i}" for i in range(20)]


def fetcher(server, cache=None, **options):
    return CachedBlackBox(OpenAICompatible(server.url, options.pop("model", "m"), **QUICK | options), cache)


def check(vectors, texts):
    assert vectors.dtype == np.float32
    assert np.allclose(vectors, np.stack([unit_of(text) for text in texts]), rtol=0, atol=1e-7)


def function(texts):
    return np.stack([vector_of(text) for text in texts])


# ---- who pays what


def test_a_second_look_makes_no_call_also_from_the_file(tmp_path):
    path = tmp_path / "c.sqlite"
    with FakeEndpoint() as server:
        first = fetcher(server, path)
        check(first.vectors(TEXTS, "document"), TEXTS)
        assert (first.calls, first.texts_fetched, first.dim) == (5, 20, 8)
        first.vectors(TEXTS, "document")
        again = fetcher(server, path)
        check(again.vectors(TEXTS, "document"), TEXTS)
        # queries and documents are sent alike here, so they share what was paid
        check(again.vectors(TEXTS, "query"), TEXTS)
        assert (again.calls, again.texts_fetched, again.dim) == (0, 0, 8)
        assert len(server.requests) == 5


def test_duplicates_are_sent_once():
    with FakeEndpoint() as server:
        texts = [TEXTS[i] for i in (3, 1, 3, 3, 0, 1)]
        check(fetcher(server).vectors(texts, "document"), texts)
        assert server.answered == {TEXTS[3]: 1, TEXTS[1]: 1, TEXTS[0]: 1}


def test_a_changed_text_or_model_makes_exactly_the_missing_calls(tmp_path):
    path = tmp_path / "c.sqlite"
    with FakeEndpoint() as server:
        fetcher(server, path).vectors(TEXTS, "document")
        changed = ["another text" if i == 7 else text for i, text in enumerate(TEXTS)]
        check(fetcher(server, path).vectors(changed, "document"), changed)
        assert server.requests[-1]["input"] == ["another text"]
        assert len(server.requests) == 6
        for options in ({"model": "other"}, {"dimensions": 8}, {"input_types": {"document": "d"}}):
            before = server.answered.total()
            fetcher(server, path, **options).vectors(TEXTS, "document")
            assert server.answered.total() - before == 20
        before = server.answered.total()
        fetcher(server, path, input_types={"query": "q"}).vectors(TEXTS, "document")
        assert server.answered.total() == before
        fetcher(server, path, input_types={"query": "q"}).vectors(TEXTS, "query")
        assert server.answered.total() == before + 20


def test_faults_of_every_kind_pay_no_text_twice():
    with FakeEndpoint(rate=0.4, seed=3, hang=0.5) as server:
        texts = [f"t {i}" for i in range(300)]
        fetched = fetcher(server, timeout=0.3, retries=20)
        check(fetched.vectors(texts, "document"), texts)
        assert server.answered == dict.fromkeys(texts, 1)
        assert fetched.calls == len(server.requests)


def test_what_came_before_an_error_is_kept(tmp_path):
    path = tmp_path / "c.sqlite"
    with FakeEndpoint() as server:
        server.poisoned = {TEXTS[9]: "nan"}
        texts = [TEXTS[0], *TEXTS]
        with pytest.raises(UnusableText, match=r"text 10 \('text number 9'\) came back with NaN") as caught:
            fetcher(server, path).vectors(texts, "document")
        # the caller's number, though the first was sent once
        assert caught.value.index == 10
        with EmbeddingCache(path) as cache:
            assert len(cache) == server.answered.total() >= 9
        server.poisoned = {}
        check(fetcher(server, path).vectors(texts, "document"), texts)
        assert server.answered == dict.fromkeys(TEXTS, 1)


def test_ctrl_c_keeps_what_was_fetched(tmp_path):
    path = tmp_path / "c.sqlite"
    with FakeEndpoint(delay=0.2) as server:
        fetched = fetcher(server, path)
        server.interrupt_when(texts=8)
        with pytest.raises(KeyboardInterrupt):
            fetched.vectors([f"t {i}" for i in range(200)], "document")
        with EmbeddingCache(path) as cache:
            assert len(cache) == server.answered.total() == fetched.texts_fetched
            assert 0 < len(cache) < 200


def test_ctrl_c_keeps_an_answer_whose_dimension_nothing_confirms():
    with FakeEndpoint(delay=0.4) as server:
        fetched = fetcher(server, workers=1)
        server.interrupt_when(requests=1)
        with pytest.raises(KeyboardInterrupt):
            fetched.vectors(TEXTS, "document")
        assert len(fetched.cache) == server.answered.total() == 4


FETCH = """
    import sys
    from noisewise.retrieval.blackbox import CachedBlackBox
    from noisewise.retrieval.endpoint import OpenAICompatible
    url, path, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
    box = OpenAICompatible(url, "m", **{options!r})
    fetched = CachedBlackBox(box, path)
    print("ready", flush=True)
    sys.stdin.readline()
    vectors = fetched.vectors([f"text {{i}}" for i in range(n)], "document")
    print(fetched.texts_fetched, flush=True)
"""


def start(server, path, n, **options):
    code = textwrap.dedent(FETCH.format(options=QUICK | options))
    arguments = [sys.executable, "-c", code, server.url, str(path), str(n)]
    child = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


def go(child):
    child.stdin.write("\n")
    child.stdin.flush()


def killed_once(server, path, n, at, **options):
    """Let a process fetch, kill it when `at` texts were answered, and return how many were."""
    child = start(server, path, n, **options)
    go(child)
    while server.answered.total() < at and child.poll() is None:
        time.sleep(0.002)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    # what was under way ends in a closed connection
    while server.running:
        time.sleep(0.01)
    return server.answered.total()


def test_kill_9_costs_no_more_than_what_was_in_flight(tmp_path):
    path, n = tmp_path / "c.sqlite", 400
    texts = [f"text {i}" for i in range(n)]
    with FakeEndpoint(delay=0.01) as server:
        answered = killed_once(server, path, n, 150)
        with EmbeddingCache(path) as cache:
            kept = len(cache)
        # two workers with four texts each, and two more batches until the dimension is believed
        assert 0 < answered - kept <= 16 or answered == kept
        fetched = fetcher(server, path)
        check(fetched.vectors(texts, "document"), texts)
        assert fetched.texts_fetched == n - kept
        assert server.answered.total() == n + answered - kept
        assert set(server.answered) == set(texts)


def test_two_processes_that_want_the_same_texts_pay_once(tmp_path):
    path, n = tmp_path / "c.sqlite", 300
    with FakeEndpoint(delay=0.005) as server:
        children = [start(server, path, n) for _ in range(2)]
        for child in children:
            go(child)
        fetched = [int(child.communicate()[0]) for child in children]
        assert [child.returncode for child in children] == [0, 0]
        assert sum(fetched) == n
        assert server.answered == {f"text {i}": 1 for i in range(n)}


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_unchecked")
def test_fifty_thousand_texts_with_three_in_ten_answers_wrong_and_a_kill(tmp_path):
    path, n, workers, batch = tmp_path / "c.sqlite", 50_000, 4, 128
    options = {"batch_size": batch, "workers": workers, "retries": 12, "backoff": 0.05, "timeout": 2.0}
    faults = ("429", "429 after", "500", "hang", "short", "nan", "dimension", "shuffled", "broken")
    with FakeEndpoint(rate=0.3, faults=faults, hang=3.0) as server:
        answered = killed_once(server, path, n, n // 2, **options)
        with EmbeddingCache(path) as cache:
            kept = len(cache)
        assert kept >= n // 2 - 2 * workers * batch
        assert answered - kept <= workers * batch
        texts = [f"text {i}" for i in range(n)]
        fetched = fetcher(server, path, **options)
        check(fetched.vectors(texts, "document"), texts)
        assert fetched.texts_fetched == n - kept
        assert server.answered.total() == n + answered - kept
        assert set(server.answered) == set(texts)
        assert sum(count for fault, count in server.given.items() if fault) > 0.2 * len(server.requests)
        calls = len(server.requests)
        check(fetcher(server, path, **options).vectors(texts, "document"), texts)
        assert len(server.requests) == calls


# ---- the result


def test_rows_have_length_one_and_no_texts_have_no_rows():
    fetched = CachedBlackBox(lambda texts: 1e-3 * function(texts))
    check(fetched.vectors(TEXTS, "query"), TEXTS)
    assert fetched.vectors([], "query").shape == (0, 8)
    assert CachedBlackBox(function).vectors([], "query").shape == (0, 0)


def test_bad_requests_are_quoted():
    fetched = CachedBlackBox(function)
    with pytest.raises(InvalidInput, match="by index: 1;"):
        fetched.vectors(["a", " "], "query")
    with pytest.raises(InvalidInput, match="kind must be 'query' or 'document', got 'passage'"):
        fetched.vectors(["a"], "passage")
    assert fetched.calls == 0


def test_a_model_that_changes_its_dimension_is_found_out(tmp_path):
    path = tmp_path / "c.sqlite"
    with FakeEndpoint() as server:
        fetcher(server, path).vectors(TEXTS[:4], "document")
        server.dim = 6
        with pytest.raises(NoisewiseError, match="m has vectors of 8 and of 6 numbers under one name"):
            fetcher(server, path).vectors(TEXTS, "document")


def test_progress_says_the_bill(capsys, monkeypatch):
    monkeypatch.setattr("noisewise.progress._LOG_SECONDS", 0.0)
    with FakeEndpoint() as server:
        fetched = fetcher(server, price=2.0)
        fetched.vectors(TEXTS, "document", progress=True)
    assert "texts embedded 20 of 20, 5 calls, 60 tokens, 0.0001 in money" in capsys.readouterr().err
    assert fetched.cost.money == pytest.approx(1.2e-4)
    assert fetched.cost.seconds > 0


def test_an_estimate_counts_only_what_is_missing_and_makes_no_call():
    with FakeEndpoint() as server:
        fetched = fetcher(server, price=1.0, count_tokens=lambda text: 50)
        fetched.vectors(TEXTS[:5], "document")
        calls = len(server.requests)
        found = fetched.estimate([*TEXTS, *TEXTS], "document")
        assert (found.texts, found.missing, found.tokens, found.money) == (40, 15, 750, pytest.approx(750e-6))
        assert str(found).startswith("15 of 40 texts to fetch, about 750 tokens")
        long = "long" * 9
        picky = fetcher(server, max_tokens=10, count_tokens=lambda text: 50 if text == long else 1)
        with pytest.raises(InvalidInput, match=r"text 21 .*has about 50 tokens, but m takes 10"):
            picky.estimate([TEXTS[0], *TEXTS, long], "document")
        assert len(server.requests) == calls
    assert fetched.missing(TEXTS[:7], "document") == TEXTS[5:7]
    local = CachedBlackBox(function).estimate(["a" * 40], "query")
    assert (local.missing, local.tokens, local.money) == (1, 10, None)


# ---- drift


def test_a_fingerprint_is_asked_for_anew_and_tells_models_apart():
    shift = [0.0]

    def drifting(texts):
        vectors = function(texts)
        vectors[:, 0] += shift[0]
        return vectors

    fetched = CachedBlackBox(as_black_box(drifting, name="drifting"))
    kept = fetched.fingerprint()
    check(kept, PROBES)
    assert len(fetched.cache) == 0
    shift[0] = 0.1
    # the sixth digit of an endpoint is noise
    fetched.check_fingerprint(kept)
    shift[0] = 50.0
    now = function(list(PROBES)) + 50.0 * np.eye(8)[0]
    now /= np.linalg.norm(now, axis=1, keepdims=True)
    distance = 1 - (now * kept).sum(1)
    with pytest.raises(NoisewiseError, match=rf"probe {distance.argmax()} .* cosine distance {distance.max():.2g}"):
        fetched.check_fingerprint(kept)
    fetched.check_fingerprint(kept, tolerance=distance.max() + 1e-3)
    with pytest.raises(NoisewiseError, match="now gives 8 numbers, the kept fingerprint has shape"):
        fetched.check_fingerprint(kept[:, :5])


def test_precomputed_vectors_have_no_probes_to_compare():
    fetched = CachedBlackBox((TEXTS, function(TEXTS)))
    assert fetched.fingerprint().shape == (0, 8)
    fetched.check_fingerprint(fetched.fingerprint())
    fetched.check_fingerprint(CachedBlackBox(function).fingerprint())
    with pytest.raises(NoisewiseError, match="now gives 8 numbers"):
        fetched.check_fingerprint(np.zeros((0, 9), np.float32))


# ---- what can be a black box


def test_a_function_may_give_arrays_tensors_or_lists():
    for change in (lambda rows: rows.astype(np.float64), torch.from_numpy, np.ndarray.tolist):
        check(CachedBlackBox(lambda texts, change=change: change(function(texts))).vectors(TEXTS, "query"), TEXTS)


def test_a_function_is_asked_in_batches_and_keeps_them(tmp_path):
    sizes = []

    def tiring(texts):
        sizes.append(len(texts))
        if len(sizes) == 3:
            raise RuntimeError("out of breath")
        return function(texts)

    fetched = CachedBlackBox(tiring, tmp_path / "c.sqlite")
    texts = [f"t {i}" for i in range(600)]
    with pytest.raises(RuntimeError, match="out of breath"):
        fetched.vectors(texts, "document")
    assert len(fetched.cache) == 512
    check(fetched.vectors(texts, "document"), texts)
    assert sizes == [256, 256, 88, 88]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda texts: function(texts)[:-1], r"must give an array \(20, dim\) for 20 texts, got \(19, 8\)"),
        (lambda texts: function(texts)[0], r"must give an array"),
        (lambda texts: [["a"]] * len(texts), r"must be an array of numbers"),
        (lambda texts: np.where(np.arange(20)[:, None] == 4, np.nan, function(texts)), r"text 4 .* NaN"),
        (lambda texts: np.where(np.arange(20)[:, None] == 4, 0.0, function(texts)), r"text 4 .* zeros"),
    ],
)
def test_a_function_that_gives_something_else_is_named(wrong, said):
    with pytest.raises(NoisewiseError, match=said):
        CachedBlackBox(wrong).vectors(TEXTS, "query")


def test_a_lambda_has_no_name_for_a_file(tmp_path):
    def same(texts):
        return function(texts)

    anonymous = lambda texts: function(texts)  # noqa: E731
    with pytest.raises(InvalidInput, match="a lambda has no name"):
        CachedBlackBox(anonymous, tmp_path / "c.sqlite")
    check(CachedBlackBox(as_black_box(anonymous, name="f 1"), tmp_path / "c.sqlite").vectors(TEXTS, "query"), TEXTS)
    assert CachedBlackBox(same, tmp_path / "c.sqlite").identity["model"].endswith("<locals>.same")


def test_precomputed_vectors_answer_for_their_texts_only():
    pair = (TEXTS, function(TEXTS))
    fetched = CachedBlackBox(pair)
    check(fetched.vectors(TEXTS[::-1], "query"), TEXTS[::-1])
    with pytest.raises(InvalidInput, match=r"text 1 \('unheard of'\) has no precomputed vector"):
        fetched.vectors([TEXTS[0], "unheard of"], "query")
    assert fetched.identity != as_black_box((TEXTS, function(TEXTS) + 1.0)).identity
    assert fetched.identity == as_black_box(pair).identity
    with pytest.raises(InvalidInput, match="20 texts, but shape"):
        as_black_box((TEXTS, function(TEXTS)[:3]))
    with pytest.raises(InvalidInput, match="texts 0 and 1 are the same"):
        as_black_box((["a", "a"], function(["a", "b"])))
    with pytest.raises(UnusableText, match="text 0"):
        as_black_box((["a"], np.zeros((1, 8))))


class Prompted:
    """A sentence-transformers model, as far as a black box uses one."""

    prompts = {"query": "query: ", "document": ""}
    max_seq_length = 96

    def encode_query(self, texts, **_):
        return function([f"query: {text}" for text in texts])

    def encode_document(self, texts, **_):
        return function(texts)


def test_prompts_of_an_encoder_are_honoured_and_kept_apart():
    fetched = CachedBlackBox(Prompted())
    check(fetched.vectors(TEXTS, "document"), TEXTS)
    check(fetched.vectors(TEXTS, "query"), [f"query: {text}" for text in TEXTS])
    assert len(fetched.cache) == 40
    longer = Prompted()
    longer.max_seq_length = 256
    assert as_black_box(longer).identity != fetched.identity


@pytest.mark.slow
def test_a_real_encoder_is_named_by_its_weights(monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    weights = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    build = lambda rows: sentence_transformers.SentenceTransformer(  # noqa: E731
        modules=[modules.StaticEmbedding(tokenizer, embedding_weights=rows)], device="cpu"
    )
    fetched = CachedBlackBox(build(weights))
    vectors = fetched.vectors(["a b", "a"], "document")
    expected = np.stack([weights[1] + weights[2], weights[1]])
    assert np.allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    assert fetched.black_box.variant("a", "query") == ""
    assert as_black_box(build(weights)).identity == fetched.identity
    assert as_black_box(build(weights + 1e-3)).identity != fetched.identity


def test_a_black_box_of_your_own_needs_two_members():
    class Mine:
        identity = {"provider": "mine", "model": "m", "dimensions": 8}

        def embed(self, texts, kind):
            # one at a time, from the last
            return iter([([i], function([texts[i]])) for i in reversed(range(len(texts)))])

    mine = Mine()
    assert isinstance(mine, BlackBox)
    assert as_black_box(mine) is mine
    fetched = CachedBlackBox(mine)
    check(fetched.vectors(TEXTS, "query"), TEXTS)
    # without a word on how kinds differ they are kept apart
    fetched.vectors(TEXTS, "document")
    assert fetched.texts_fetched == 40
    mine.embed = lambda texts, kind: iter([([0], function(texts[:1]))])
    with pytest.raises(UnusableText, match=r"text 1 \('new 1'\) was never answered"):
        fetched.vectors(["new 0", "new 1"], "query")
    with pytest.raises(InvalidInput, match="has an identity of its own"):
        as_black_box(mine, name="other")
    with pytest.raises(InvalidInput, match=r"a black box is .*, got int"):
        as_black_box(3)

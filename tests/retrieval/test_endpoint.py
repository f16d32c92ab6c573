"""An endpoint that fails in every known way is paid once for each text, and its faults are named when they stay."""

import re
import signal
import time

import numpy as np
import pytest
from fake_endpoint import FakeEndpoint, unit_of, vector_of

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.retrieval.blackbox import BlackBox, UnusableText
from noisewise.retrieval.endpoint import OpenAICompatible
from noisewise.retrieval.transport import RateLimits

QUICK = {"key": None, "backoff": 0.01, "timeout": 5.0, "batch_size": 4, "workers": 2}
TEXTS = [f"text number {i}" for i in range(20)]


def box(server, **options):
    return OpenAICompatible(server.url, "m", **QUICK | options)


def embedded(black_box, texts, kind="document"):
    """All vectors in order; each position comes once."""
    found = {}
    for positions, vectors in black_box.embed(texts, kind):
        for position, vector in zip(positions, vectors, strict=True):
            assert position not in found
            found[position] = vector
    return np.stack([found[position] for position in range(len(texts))])


def check(vectors, texts, dim=8):
    assert np.array_equal(vectors, np.stack([vector_of(text, dim) for text in texts]))


@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_vectors_are_the_servers_in_order(encoding):
    with FakeEndpoint() as server:
        black_box = box(server, encoding=encoding)
        assert isinstance(black_box, BlackBox)
        check(embedded(black_box, TEXTS), TEXTS)
        assert [len(request["input"]) for request in server.requests] == [4] * 5
        assert {request["encoding_format"] for request in server.requests} == {encoding}
        assert black_box.cost.calls == 5
        assert black_box.cost.texts == 20
        # by the server's account
        assert black_box.cost.tokens == 60


@pytest.mark.parametrize("fault", ["429", "429 after", "500", "hang", "drop", "broken", "empty", "short", "shuffled"])
def test_a_fault_that_passes_is_recovered_from_and_nothing_is_paid_twice(fault):
    with FakeEndpoint(script=[fault, None, fault, fault], hang=0.5) as server:
        check(embedded(box(server, timeout=0.2), TEXTS), TEXTS)
        assert server.given[fault] == 3
        assert set(server.answered.values()) == {1}


@pytest.mark.parametrize("fault", ["nan", "dimension"])
@pytest.mark.parametrize("dimensions", [None, 8])
def test_a_vector_that_is_unusable_is_asked_for_again(fault, dimensions):
    # first of all, when no dimension is known yet
    with FakeEndpoint(script=[fault, *[None] * 4, fault]) as server:
        check(embedded(box(server, dimensions=dimensions), TEXTS), TEXTS)
        assert server.given[fault] == 2
        assert set(server.answered.values()) == {1}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("nan", "NaN or infinite numbers"),
        ("zeros", "zeros only"),
        ("dimension", "7 numbers where 8 were expected"),
    ],
)
def test_a_vector_that_stays_unusable_is_named_and_the_others_come_out(wrong, said):
    with FakeEndpoint() as server:
        server.poisoned = {TEXTS[6]: wrong}
        came = []
        with pytest.raises(UnusableText, match=rf"text 6 \('text number 6'\) came back with {said}") as caught:
            for positions, _ in box(server).embed(TEXTS, "document"):
                came += positions
        assert caught.value.index == 6
        # whatever was under way is there too
        assert {0, 1, 2, 3, 4, 5, 7} <= set(came)
        assert sorted(came) == sorted(int(text.split()[-1]) for text in server.answered)
        assert sum(TEXTS[6] in request["input"] for request in server.requests) == 5


def test_two_answers_of_different_dimensions_are_told_apart_by_a_third():
    with FakeEndpoint(script=["dimension", None]) as server:
        check(embedded(box(server), TEXTS[:8]), TEXTS[:8])


def test_a_text_that_is_always_left_out_is_named():
    with FakeEndpoint() as server:
        listed = server.embeddings

        def without(request, fault):
            rows, well = listed(request, fault)
            kept = [row for row in rows if request["input"][row[0]] != TEXTS[3]]
            return kept, [text for text in well if text != TEXTS[3]]

        server.embeddings = without
        with pytest.raises(UnusableText, match=r"text 3 .* was left out, 3 times"):
            embedded(box(server, retries=2), TEXTS)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("429", r"answered 429 \('slow down'\)"),
        ("500", "answered 500"),
        ("hang", r"gave no answer within 0\.2 s"),
        ("drop", "could not be reached"),
        ("broken", "broken JSON"),
        ("empty", "without vectors"),
    ],
)
def test_a_server_that_never_recovers_is_named_with_its_last_fault(fault, said):
    with FakeEndpoint(rate=1.0, faults=(fault,), hang=0.5) as server:
        with pytest.raises(NoisewiseError, match=rf"127\.0\.0\.1.*/embeddings was asked 3 times and .*{said}"):
            embedded(box(server, retries=2, timeout=0.2, workers=1), TEXTS)
        assert len(server.requests) == 3


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FakeEndpoint() as server:
        check(embedded(box(server), TEXTS), TEXTS)


def test_a_server_that_is_not_there_is_named():
    with FakeEndpoint() as server:
        url = server.url
    with pytest.raises(NoisewiseError, match="could not be reached"):
        embedded(OpenAICompatible(url, "m", **QUICK | {"retries": 1}), TEXTS)


@pytest.mark.parametrize("fault", ["400", "404", "quota"])
def test_what_waiting_cannot_mend_is_not_tried_again(fault):
    with FakeEndpoint(rate=1.0, faults=(fault,)) as server:
        with pytest.raises(NoisewiseError, match="answered 4"):
            embedded(box(server, workers=1), TEXTS)
        assert len(server.requests) == 1


# ---- waiting


def test_retry_after_is_waited_for_by_all_workers():
    with FakeEndpoint(script=["429 after"], retry_after="1") as server:
        embedded(box(server, workers=1), TEXTS[:8])
        assert server.times[1] - server.times[0] >= 1.0
    with FakeEndpoint(script=["429 after"], retry_after="1") as server:
        embedded(box(server, workers=2), TEXTS)
        # one other request may have left before the answer
        assert sum(moment < server.times[0] + 1.0 for moment in server.times) <= 3


def test_retry_after_may_be_a_date():
    then = int(time.time()) + 2
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(then))
    with FakeEndpoint(script=["429 after"], retry_after=date) as server:
        embedded(box(server), TEXTS[:2])
        assert time.time() >= then
        assert len(server.requests) == 2


def test_a_retry_after_of_hours_ends_at_once():
    with (
        FakeEndpoint(script=["429 after"], retry_after="7200") as server,
        pytest.raises(NoisewiseError, match="asks to wait 7200 s"),
    ):
        embedded(box(server), TEXTS[:2])


def test_requests_a_minute_are_spaced_evenly_and_shared_by_the_workers():
    limits = RateLimits(rpm=60)
    assert [limits.reserve(10**6) for _ in range(4)] == pytest.approx([0, 1, 2, 3], abs=0.2)
    with FakeEndpoint() as server:
        begun = time.monotonic()
        embedded(box(server, rpm=600, workers=4), TEXTS)
        assert time.monotonic() - begun >= 0.4
        assert len(server.requests) == 5


def test_tokens_a_minute_bound_the_batches_too():
    limits = RateLimits(tpm=60)
    assert [limits.reserve(30), limits.reserve(1), limits.reserve(1)] == pytest.approx([0, 30, 31], abs=0.2)
    with FakeEndpoint() as server:
        black_box = box(server, tpm=600_000, count_tokens=lambda text: 1000, max_tokens=1000, batch_tokens=3000)
        begun = time.monotonic()
        embedded(black_box, TEXTS[:7])
        assert sorted(len(request["input"]) for request in server.requests) == [1, 3, 3]
        assert time.monotonic() - begun >= 0.6
    assert box(server, tpm=500).batch_tokens == 500


def test_no_more_workers_than_asked_for_are_under_way():
    with FakeEndpoint(delay=0.02) as server:
        embedded(box(server, workers=3), TEXTS)
        assert server.most_running <= 3


def test_a_consumer_that_waits_holds_the_endpoint_back():
    with FakeEndpoint() as server:
        batches = box(server, batch_size=1).embed(TEXTS, "document")
        next(batches)
        time.sleep(0.3)
        # one taken (for the vote on the dimension two) and two under way or answered
        assert sum(server.answered.values()) <= 4
        batches.close()


def test_ctrl_c_sends_nothing_more_and_brings_what_is_under_way():
    with FakeEndpoint(delay=0.2) as server:
        came = []
        server.interrupt_when(texts=8)
        with pytest.raises(KeyboardInterrupt):
            for positions, _ in box(server).embed(TEXTS, "document"):
                came += positions
        assert 0 < len(came) < len(TEXTS)
        assert sorted(TEXTS[i] for i in came) == sorted(server.answered)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- what is sent


def test_input_types_prefixes_and_dimensions_are_sent():
    types, prefixes = {"query": "search_query", "document": "search_document"}, {"query": "query: "}
    with FakeEndpoint() as server:
        black_box = box(server, input_types=types, prefixes=prefixes, dimensions=5)
        check(embedded(black_box, ["a"], "query"), ["query: a"], 5)
        check(embedded(black_box, ["a"], "document"), ["a"], 5)
        assert [request["input_type"] for request in server.requests] == ["search_query", "search_document"]
        assert {request["dimensions"] for request in server.requests} == {5}
        assert black_box.variant("a", "query") != black_box.variant("a", "document")
        assert box(server).variant("a", "query") == box(server).variant("a", "document") == ""
    assert server.paths == ["/v1/embeddings"] * 2


def test_any_text_can_be_sent():
    texts = ["naïve", "今日は", "a\0b", 'quote " and \\', "line\nbreak", "🙂"]
    with FakeEndpoint() as server:
        check(embedded(box(server), texts), texts)


def test_empty_texts_are_refused_by_index_before_any_call():
    with FakeEndpoint() as server:
        with pytest.raises(InvalidInput, match="by index: 1, 3;"):
            embedded(box(server), ["a", "", "b", " \n"])
        assert embedded(box(server), ["a"]).shape == (1, 8)
        with pytest.raises(InvalidInput, match="put it in a list"):
            next(box(server).embed("abc", "document"))
        assert list(box(server).embed([], "document")) == []
        assert len(server.requests) == 1


def words(text):
    return len(text.split())


LONG = " ".join(f"w{i}" for i in range(25))


def test_a_text_that_is_too_long_is_refused_by_index():
    with FakeEndpoint() as server:
        black_box = box(server, max_tokens=10, count_tokens=words)
        with pytest.raises(InvalidInput, match=r"text 1 \('w0 w1.*has about 25 tokens, but m takes 10: give too_long="):
            embedded(black_box, ["a", LONG])
        assert server.requests == []


def test_a_text_that_is_too_long_is_cut_at_a_space():
    with FakeEndpoint() as server:
        black_box = box(server, max_tokens=10, count_tokens=words, too_long="truncate")
        check(embedded(black_box, ["a", LONG]), ["a", " ".join(LONG.split()[:10])])
        assert black_box.variant(LONG, "document")
        assert not black_box.variant("a", "document")


def test_a_text_in_chunks_has_the_mean_weighted_by_tokens():
    with FakeEndpoint() as server:
        black_box = box(server, max_tokens=10, count_tokens=words, too_long="chunk", prefixes={"document": "p "})
        vectors = embedded(black_box, ["a", LONG, "b"])
        sent = [text for request in server.requests for text in request["input"]]
        assert all(words(text) <= 10 for text in sent)
        parts = sorted((text for text in sent if text not in ("p a", "p b")), key=lambda text: int(text.split()[1][1:]))
        assert " ".join(part.removeprefix("p ") for part in parts) == LONG
        weights = np.array([words(part) for part in parts])
        mean = weights @ np.stack([vector_of(part) for part in parts]) / weights.sum()
        assert np.allclose(vectors[1], mean, rtol=1e-6)
        check(vectors[[0, 2]], ["p a", "p b"])


def test_without_a_counter_cuts_keep_a_margin():
    with FakeEndpoint() as server:
        black_box = box(server, max_tokens=12, too_long="chunk")
        text = "x" * 100
        embedded(black_box, [text])
        sent = [part for request in server.requests for part in request["input"]]
        # three bytes for each token, not four
        assert max(map(len, sent)) == 36
        assert sum(map(len, sent)) == 100
    with pytest.raises(InvalidInput, match="too few for the prefix"):
        list(
            box(server, max_tokens=2, too_long="truncate", prefixes={"query": "a long prefix "}).embed(
                ["b" * 50], "query"
            )
        )


# ---- cost


def test_an_estimate_makes_no_call():
    with FakeEndpoint() as server:
        black_box = box(
            server, price=0.5, rpm=10, tpm=1000, count_tokens=lambda text: 100, batch_size=3, key="NO_SUCH_KEY"
        )
        found = black_box.estimate(TEXTS, "document")
        assert server.requests == []
    assert (found.texts, found.tokens) == (20, 2000)
    assert found.money == pytest.approx(2000 * 0.5e-6)
    # 2 minutes by tokens, 0.7 by 7 requests
    assert found.minutes == pytest.approx(2.0)
    assert "2,000 tokens" in str(found)
    assert box(server).estimate(TEXTS, "query").money is None


# ---- the key

KEY = "sk-very-secret-123"


def test_the_key_is_sent_and_shown_nowhere(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with FakeEndpoint(script=[None, "401"]) as server:
        black_box = box(server, key="MY_KEY")
        embedded(black_box, TEXTS[:2])
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        with pytest.raises(NoisewiseError, match=r"answered 401 .*the key in MY_KEY was refused") as caught:
            embedded(black_box, TEXTS[:2])
    shown = [str(caught.value), repr(caught.value), repr(black_box), repr(vars(black_box)), str(black_box.identity)]
    shown += [repr(vars(black_box.transport)), black_box.variant("a", "query")]
    assert not any(KEY in text or "very-secret" in text for text in shown)
    assert "***" in str(caught.value)


def test_a_missing_key_is_named_by_its_variable_before_any_call(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FakeEndpoint() as server:
        with pytest.raises(InvalidInput, match=r"environment variable OPENAI_API_KEY, .* is not set"):
            embedded(OpenAICompatible(server.url, "m"), TEXTS)
        monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
        with pytest.raises(InvalidInput, match="OPENAI_API_KEY holds characters"):
            embedded(OpenAICompatible(server.url, "m"), TEXTS)
        assert server.requests == []


def test_a_key_in_the_wrong_place_is_not_quoted():
    for options in (
        {"key": KEY},
        {"base_url": f"https://user:{KEY}@host/v1"},
        {"base_url": f"ftp://user:{KEY}@host/v1"},
    ):
        with pytest.raises(InvalidInput) as caught:
            OpenAICompatible(**{"base_url": "https://host/v1", "model": "m", "key": None} | options)
        assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base_url": "host/v1"}, "base_url must look like https://host/v1, got 'host/v1'"),
        ({"model": " "}, "model must name"),
        ({"encoding": "int8"}, "encoding must be 'base64' or 'float', got 'int8'"),
        ({"too_long": "cut"}, "too_long must be .* got 'cut'"),
        ({"dimensions": 0}, "dimensions must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rpm": -1}, "rpm must be a finite number above 0"),
        ({"timeout": 0}, "timeout must be"),
        ({"price": -1}, "price must be"),
        ({"input_types": {"passage": "x"}}, "input_types must have the keys"),
    ],
)
def test_options_that_cannot_work_are_quoted(options, said):
    with pytest.raises(InvalidInput, match=said):
        OpenAICompatible(**{"base_url": "https://host/v1", "model": "m"} | options)


def test_a_kind_that_is_neither_is_quoted():
    with pytest.raises(InvalidInput, match=re.escape("kind must be 'query' or 'document', got 'passage'")):
        next(OpenAICompatible("http://127.0.0.1:9/v1", "m", key=None).embed(["a"], "passage"))


def test_the_fake_gives_what_the_tests_think():
    assert np.linalg.norm(unit_of("a")) == pytest.approx(1.0)
    assert not np.array_equal(vector_of("a"), vector_of("b"))

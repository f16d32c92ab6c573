"""`ChatEndpoint`: a language model behind `POST /chat/completions`, one answer per prompt, by the same transport as vectors."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from noisewise.errors import InvalidInput
from noisewise.retrieval.transport import RateLimits, Stream, Transport, TryAgain
from noisewise.retrieval.vectors import CostEstimate, FetchCost, count_tokens_roughly
from noisewise.typing import check_count

__all__ = ["ChatEndpoint"]


class ChatEndpoint:
    """The language model `model` of an OpenAI-compatible server at `base_url`: call it with a prompt, or ask for `answers`.

    `temperature`, `max_tokens` (of an answer; None leaves either to the server) and `options` are fields of the request;
    `price`: money per million tokens, or two prices (prompt, answer). `key` and the rest are as in `OpenAICompatible`.
    Source: OpenAI API reference, "Create chat completion".
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str | None = "OPENAI_API_KEY",
        temperature: float | int | None = None,
        max_tokens: int | None = 256,
        options: Mapping[str, Any] | None = None,
        rpm: float | int | None = None,
        tpm: float | int | None = None,
        timeout: float | int = 120.0,
        retries: int = 8,
        backoff: float | int = 0.5,
        workers: int = 4,
        price: float | int | tuple[float | int, float | int] | None = None,
        provider: str | None = None,
    ) -> None:
        if not model.strip():
            raise InvalidInput(f"model must name a model of the server, got {model!r}")
        prices = price if isinstance(price, tuple) else (price, price)
        if any(each is not None and not each >= 0 for each in prices):
            raise InvalidInput(f"price must be money per million tokens, or a pair of it, at least 0, got {price!r}")
        self.transport = Transport(base_url, key, RateLimits(rpm, tpm), timeout, retries, backoff)
        self.provider = provider or self.transport.provider
        self.model, self.temperature, self.price = model, temperature, price
        self.max_tokens = None if max_tokens is None else check_count("max_tokens", max_tokens)
        self.options = dict(options or {})
        self.workers = check_count("workers", workers)
        self._prices = prices
        self._lock = threading.Lock()
        # tokens of prompts and of answers
        self._tokens = [0, 0]
        self._answers = 0

    def __repr__(self) -> str:
        return f"ChatEndpoint({self.transport.base_url!r}, {self.model!r})"

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Provider and model."""
        return {"provider": self.provider, "model": self.model}

    @property
    def cost(self) -> FetchCost:
        """What was used since this object was made; `texts` are answers."""
        return FetchCost(self.transport.calls, self._answers, sum(self._tokens), self._money(*self._tokens))

    def __call__(self, prompt: str) -> str:
        """The answer to one prompt. Raises as `answers` does."""
        self.transport.secret()
        return self._ask(prompt, threading.Event())

    def answers(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """(number of the prompt, answer) as they arrive, in any order; a refusal is an empty answer.

        Ctrl-C and errors end it as they end `OpenAICompatible.embed`: what is under way still comes out. Raises `InvalidInput`
        for a missing key, `NoisewiseError` for a server that does not answer or refuses.
        """
        self.transport.secret()
        numbers = iter(range(len(prompts)))
        yield from Stream(
            lambda: next(numbers, None), lambda number, stop: self._ask(prompts[number], stop), self.workers
        )

    def estimate(self, prompts: Sequence[str], answer_tokens: int) -> CostEstimate:
        """Tokens, money and minutes for `prompts` with answers of about so many tokens, without a call."""
        asked, answered = sum(map(count_tokens_roughly, prompts)), answer_tokens * len(prompts)
        minutes = self.transport.limits.minutes(len(prompts), asked + answered)
        return CostEstimate(len(prompts), len(prompts), asked + answered, self._money(asked, answered), minutes)

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        self.transport.close()

    def _ask(self, prompt: str, stop: threading.Event) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        fields = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        body |= {name: value for name, value in fields.items() if value is not None} | self.options
        tokens = count_tokens_roughly(prompt)
        answer, used = self.transport.post("/chat/completions", body, tokens + (self.max_tokens or 0), _read, stop)
        with self._lock:
            self._answers += 1
            self._tokens[0] += used.get("prompt_tokens", tokens)
            self._tokens[1] += used.get("completion_tokens", count_tokens_roughly(answer))
        return answer

    def _money(self, asked: int, answered: int) -> float | None:
        first, second = self._prices
        return None if first is None or second is None else (asked * first + answered * second) / 1e6


def _read(answer: Any) -> tuple[str, dict[str, int]]:
    """The text of the first choice, and the tokens that the server counted."""
    try:
        content = answer["choices"][0]["message"].get("content") or ""
        used = answer.get("usage") or {}
        counts = {
            name: used[name] for name in ("prompt_tokens", "completion_tokens") if isinstance(used.get(name), int)
        }
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TryAgain("answered without a message") from None
    if not isinstance(content, str):
        raise TryAgain("answered with a message that is no text")
    return content, counts

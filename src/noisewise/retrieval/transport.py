"""JSON to an OpenAI-compatible server from many threads: the key, shared rate limits, retries, and answers as they arrive."""

import email.utils
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from noisewise.errors import InvalidInput, NoisewiseError, require
from noisewise.progress import gentle_interrupt
from noisewise.typing import check_count, check_positive

__all__ = ["RateLimits", "Stream", "Transport", "TryAgain"]

Job = TypeVar("Job")
Answer = TypeVar("Answer")

_LONGEST_WAIT = 30.0
# a server that asks for more has no quota left for the day
_LONGEST_RETRY_AFTER = 900.0
_SHOWN = 300


class TryAgain(NoisewiseError):
    """An answer that another attempt may mend; `after`: seconds that the server asks to wait, None where it does not say."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class RateLimits:
    """Requests and tokens a minute, None for no limit, spaced evenly and shared by all threads."""

    def __init__(self, rpm: float | int | None = None, tpm: float | int | None = None) -> None:
        self.rpm = None if rpm is None else check_positive("rpm", rpm)
        self.tpm = None if tpm is None else check_positive("tpm", tpm)
        self._lock = threading.Lock()
        # when the next request may leave: by requests, by tokens
        self._free = [0.0, 0.0]

    def reserve(self, tokens: int) -> float:
        """Seconds from now until a request of so many tokens may leave; it counts as sent then."""
        with self._lock:
            now = time.monotonic()
            start = max(now, *self._free)
            self._free[0] = start + (0.0 if self.rpm is None else 60 / self.rpm)
            self._free[1] = start + (0.0 if self.tpm is None else 60 * tokens / self.tpm)
            return start - now

    def pause(self, seconds: float) -> None:
        """Let nothing leave for so long."""
        with self._lock:
            self._free[0] = max(self._free[0], time.monotonic() + seconds)

    def minutes(self, requests: int, tokens: int) -> float | None:
        """Least time for so much, None without limits."""
        found = []
        if self.rpm is not None:
            found.append(requests / self.rpm)
        if self.tpm is not None:
            found.append(tokens / self.tpm)
        return max(found, default=None)


class Transport:
    """Posts JSON below `base_url`. `key` is the NAME of the environment variable that holds the key, None for no key.

    The key is read when a request leaves and stays nowhere else. Time-outs, lost connections, 408, 409, 429, 5xx, broken JSON
    and answers that the reader refuses are tried `retries` more times, after `backoff` seconds that double each time (up to 30,
    +- half, so that workers do not come back together), or after what Retry-After says, which holds for all threads.
    `calls` and `tokens` count what was sent and, by the server's account where it gives one, used.
    """

    def __init__(
        self,
        base_url: str,
        key: str | None,
        limits: RateLimits,
        timeout: float | int,
        retries: int,
        backoff: float | int,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput(f"base_url must look like https://host/v1, got {_without_password(base_url)!r}")
        if "@" in parts.netloc or parts.query:
            raise InvalidInput("base_url must hold no user, password or query, they would be shown: use key= for a key")
        if key is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", key):
            # not quoted: it may be the key itself
            raise InvalidInput("key must be the name of an environment variable in capitals, such as OPENAI_API_KEY")
        self.base_url = base_url.rstrip("/")
        self.provider = f"{parts.netloc}{parts.path}".rstrip("/")
        self.key, self.limits = key, limits
        self.timeout = check_positive("timeout", timeout)
        self.retries = check_count("retries", retries, 0)
        self.backoff = check_positive("backoff", backoff)
        self.calls = self.tokens = 0
        self._lock = threading.Lock()
        self._client: Any = None
        self._process = 0
        # spreads retries in time, and decides nothing else
        self._jitter = random.Random()

    def secret(self) -> str | None:
        """The key, now. Raises `InvalidInput` that names the variable where it is missing or cannot be sent."""
        if self.key is None:
            return None
        value = os.environ.get(self.key, "").strip()
        if not value:
            raise InvalidInput(
                f"the environment variable {self.key}, which holds the key for {self.provider}, is not set: set it, give the "
                "name of another one as key=, or key=None for a server that wants none"
            )
        if not value.isascii() or not value.isprintable():
            raise InvalidInput(f"the environment variable {self.key} holds characters that no key has")
        return value

    def post(
        self,
        path: str,
        body: dict[str, Any],
        tokens: int,
        read: Callable[[Any], Answer],
        stop: threading.Event | None = None,
    ) -> Answer:
        """What `read` makes of the answer to `body`; `tokens` is an estimate for the limits.

        No attempt begins once `stop` is set. Raises `NoisewiseError` that says what the last attempt got.
        """
        tenacity = require("tenacity", "retrieval")
        stop = stop or threading.Event()
        attempts = tenacity.Retrying(
            stop=tenacity.stop_any(tenacity.stop_after_attempt(self.retries + 1), tenacity.stop_when_event_set(stop)),
            wait=self._pause_before_retry,
            retry=tenacity.retry_if_exception_type(TryAgain),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        try:
            return attempts(self._once, path, body, tokens, read, stop)
        except TryAgain as error:
            made = attempts.statistics.get("attempt_number", 1)
            times = "once" if made == 1 else f"{made} times"
            raise NoisewiseError(
                f"{self.provider}{path} was asked {times} and {error}; what came before is kept: try later, or give more "
                "retries=, a longer timeout= or lower rpm= and tpm="
            ) from None

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        with self._lock:
            if self._client is not None and self._process == os.getpid():
                self._client.close()
            self._client = None

    def _pause_before_retry(self, state: Any) -> float:
        error = state.outcome.exception()
        if error.after is not None:
            return error.after
        wait = self.backoff * 2.0 ** (state.attempt_number - 1) * self._jitter.uniform(0.5, 1.5)
        return min(_LONGEST_WAIT, wait)

    def _once(
        self, path: str, body: dict[str, Any], tokens: int, read: Callable[[Any], Answer], stop: threading.Event
    ) -> Answer:
        httpx = require("httpx", "retrieval")
        if stop.wait(self.limits.reserve(tokens)):
            raise TryAgain("was stopped before it was sent")
        secret = self.secret()
        headers = {"Content-Type": "application/json"}
        if secret is not None:
            headers["Authorization"] = f"Bearer {secret}"
        with self._lock:
            self.calls += 1
        try:
            # ASCII escapes: half a surrogate pair in a text is the server's to judge, and no crash here
            content = json.dumps(body).encode()
            response = self._connections().post(f"{self.base_url}{path}", content=content, headers=headers)
        except httpx.TimeoutException:
            raise TryAgain(f"gave no answer within {self.timeout:g} s") from None
        except httpx.RequestError as error:
            raise TryAgain(f"could not be reached ({error or type(error).__name__})") from None
        if response.status_code != 200:
            raise self._refusal(response, secret)
        try:
            answer = response.json()
        except ValueError:
            raise TryAgain("answered with broken JSON") from None
        used = _tokens_used(answer)
        with self._lock:
            self.tokens += tokens if used is None else used
        return read(answer)

    def _refusal(self, response: Any, secret: str | None) -> NoisewiseError:
        status, said, code = response.status_code, *_said(response)
        if secret is not None:
            said = said.replace(secret, "***")
        where = f"{self.provider} answered {status} ({said[:_SHOWN]!r})"
        if status in (401, 403):
            return NoisewiseError(f"{where}: the key in {self.key} was refused" if self.key else f"{where}: give key=")
        if code == "insufficient_quota":
            return NoisewiseError(f"{where}: the account has no quota left, and waiting would not bring it back")
        if status not in (408, 409, 429) and status < 500:
            return NoisewiseError(f"{where}: check base_url, the model's name and the options sent to it")
        after = _retry_after(response.headers)
        if after is not None and after > _LONGEST_RETRY_AFTER:
            return NoisewiseError(f"{where} and asks to wait {after:.0f} s: start again then, what came before is kept")
        if after is not None:
            self.limits.pause(after)
        return TryAgain(f"answered {status} ({said[:_SHOWN]!r})", after)

    def _connections(self) -> Any:
        httpx = require("httpx", "retrieval")
        with self._lock:
            # sockets of a parent process are not ours
            if self._client is None or self._process != os.getpid():
                limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
                # a proxy of the environment cannot reach this machine's own servers
                near = urlsplit(self.base_url).hostname in ("127.0.0.1", "::1", "localhost")
                self._client = httpx.Client(timeout=self.timeout, limits=limits, trust_env=not near)
                self._process = os.getpid()
            return self._client


class Stream(Generic[Job, Answer]):
    """Iterates over (job, answer) as answers arrive; at most `workers` jobs are under way or answered but not yet taken.

    `take` gives the next job, or None while there is none; it is asked again after every answer, so that a job may come back.
    `ask(job, stop)` runs in a thread and gives up soon once `stop` is set. After the first error, a `halt` or Ctrl-C nothing
    new begins, answers to what is under way still come out, because they are paid for, and then the error is raised. A second
    Ctrl-C ends it at once.
    """

    def __init__(
        self, take: Callable[[], Job | None], ask: Callable[[Job, threading.Event], Answer], workers: int
    ) -> None:
        self._take, self._ask, self._workers = take, ask, workers
        self._failure: BaseException | None = None

    def halt(self, error: BaseException) -> None:
        """Begin nothing new, and raise `error` in the end."""
        self._failure = self._failure or error

    def __iter__(self) -> Iterator[tuple[Job, Answer]]:
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="noisewise-fetch")
        running: dict[Future[Answer], Job] = {}
        with gentle_interrupt() as stop:
            try:
                while True:
                    if self._failure is not None:
                        stop.set()
                    while len(running) < self._workers and not stop.is_set() and (job := self._take()) is not None:
                        running[pool.submit(self._ask, job, stop)] = job
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        if (error := future.exception()) is None:
                            yield job, future.result()
                        elif not stop.is_set():
                            self.halt(error)
                            stop.set()
                if stop.is_set():
                    raise self._failure or KeyboardInterrupt
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)


def _tokens_used(answer: Any) -> int | None:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    used = usage.get("total_tokens") if isinstance(usage, dict) else None
    return used if isinstance(used, int) and used > 0 else None


def _said(response: Any) -> tuple[str, str | None]:
    """The server's message, and its error code."""
    try:
        error = response.json()["error"]
        return (str(error.get("message", error)), error.get("code")) if isinstance(error, dict) else (str(error), None)
    except (ValueError, KeyError, TypeError):
        return response.text, None


def _retry_after(headers: Any) -> float | None:
    """Seconds of Retry-After-Ms or of Retry-After, which is a number or a date; None for neither."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        if re.fullmatch(r"\d+(\.\d+)?", value):
            return scale * float(value)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", url)

"""Progress of anything a user waits for: a bar on a terminal, a line every few seconds elsewhere; and its interruption."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Reporter", "gentle_interrupt"]

_LOG_SECONDS = 5.0
_BAR_SECONDS = 0.1


class Reporter:
    """Says how far a computation is and what it has to remark, such as its bill or its loss; silent unless `show`."""

    def __init__(self, show: bool) -> None:
        self._show = show
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if show and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[remark]}"), TimeRemainingColumn(),
                console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=None, remark="")
        self._last = time.monotonic()

    def __enter__(self) -> "Reporter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def _due(self) -> bool:
        """Whether it is time to say something again."""
        wait = _BAR_SECONDS if self._bar is not None else _LOG_SECONDS
        return self._show and time.monotonic() - self._last >= wait

    def show(self, what: str, done: int, total: int | None, remark: str) -> None:
        """Say that `what` is at `done` of `total`, if it is time to."""
        if not self._due:
            return
        self._last = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=done, total=total, remark=remark)
        else:
            of = "" if total is None else f" of {total}"
            print(f"noisewise: {what} {done}{of}, {remark}", file=sys.stderr, flush=True)


@contextmanager
def gentle_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that no step is cut in half; the second raises as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        stop.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)

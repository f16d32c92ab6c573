"""Progress and bill of a run: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from noisewise.typing import Cost

__all__ = ["Reporter"]

_LOG_SECONDS = 5.0
_BAR_SECONDS = 0.1


@runtime_checkable
class _Billed(Protocol):
    cost: Cost


class Reporter:
    """Progress and bill: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, show: bool, run: _Billed) -> None:
        self._run = run
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if show and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[bill]}"), TimeRemainingColumn(),
                console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("sampling", total=None, bill="")
        self._show = show
        self._last = time.monotonic()

    def __enter__(self) -> "Reporter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, what: str, done: int, total: int | None) -> None:
        """Say how far `what` is, if it is time to."""
        now = time.monotonic()
        if not self._show or now - self._last < (_BAR_SECONDS if self._bar is not None else _LOG_SECONDS):
            return
        self._last = now
        bill = f"{self._run.cost.gradients:.3g} gradients"
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=done, total=total, bill=bill)
        else:
            of = "" if total is None else f" of {total}"
            print(f"noisewise: {what} {done}{of}, {bill}", file=sys.stderr, flush=True)

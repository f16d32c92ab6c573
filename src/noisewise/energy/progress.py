"""Progress of a fit: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["FitReporter"]

_LOG_SECONDS = 5.0
_BAR_SECONDS = 0.1


class FitReporter:
    """Steps and the latest losses; silent unless `show`."""

    def __init__(self, show: bool) -> None:
        self._show = show
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if show and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("fitting"), BarColumn(), TextColumn("{task.fields[losses]}"), TimeRemainingColumn(),
                console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("fitting", total=None, losses="")
        self._last = time.monotonic()

    def __enter__(self) -> "FitReporter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, steps: int, entry: Mapping[str, float | None] | None) -> None:
        """Say how far the fit is, if it is time to; `entry`: the last one of its history."""
        now = time.monotonic()
        if not self._show or now - self._last < (_BAR_SECONDS if self._bar is not None else _LOG_SECONDS):
            return
        self._last = now
        pairs = [] if entry is None else [(name, entry[name]) for name in ("loss", "validation")]
        losses = ", ".join(f"{name} {value:.4g}" for name, value in pairs if value is not None)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=steps, losses=losses)
        else:
            print(f"noisewise: fitting step {step} of {steps}, {losses}", file=sys.stderr, flush=True)

"""Speed ratios that a busy machine cannot fake: contenders take turns in one process, and each round gives one ratio."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import torch

import noisewise


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each of `rounds` rounds, after one call of each to warm up.

    Rounds run forwards and backwards in turn, so that no contender always follows the same one. Seconds are wall time.
    """
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds):
        names = list(contenders)
        for name in names if index % 2 == 0 else reversed(names):
            begun = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def compared(seconds: dict[str, list[float]], ours: str, other: str) -> dict[str, float]:
    """How many times `other` takes longer than `ours`, round by round: median, min, max, and the median seconds of both."""
    ratios = [theirs / mine for mine, theirs in zip(seconds[ours], seconds[other], strict=True)]
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "rounds": len(ratios),
        "seconds_ours": statistics.median(seconds[ours]),
        "seconds_other": statistics.median(seconds[other]),
    }


def environment() -> dict[str, Any]:
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "noisewise": noisewise.__version__,
        "torch": torch.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": model,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }

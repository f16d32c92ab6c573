"""What lies in the folders of `noisewise diffusion` beside what every command leaves, and what is finished there."""

from pathlib import Path
from typing import Any

from noisewise.command import REPORT, SUMMARY, read_json

__all__ = ["HEAD", "LEAST", "RESULTS", "SEEN", "finished"]

HEAD, RESULTS = "head", "results.json"
# short names of the images that a head was fitted on
SEEN = "fitted-on.txt"
# images that a fit needs
LEAST = 40


def finished(out: Path) -> dict[str, Any] | None:
    """The summary of a fit of which nothing is left to do."""
    if not (out / SUMMARY).is_file() or not (out / REPORT).is_file():
        return None
    facts = read_json(out / SUMMARY)
    return None if facts["interrupted"] or facts["cut"] else facts

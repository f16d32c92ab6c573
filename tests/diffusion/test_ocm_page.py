"""The method's page: its examples run as they stand, without a warning."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "ocm.md"


@pytest.mark.slow
def test_the_examples_of_the_page_run_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), space)
    assert (tmp_path / "runs" / "head" / "config.json").is_file()
    assert space["draws"].shape == (100, 2)
    assert bool(torch.isfinite(space["nats"]).all())

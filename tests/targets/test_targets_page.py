"""The page about targets: each block runs by itself, and its target passes what a sampler checks first."""

import contextlib
import re
from pathlib import Path

import pytest
import torch

from noisewise.targets import check_target

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"
BLOCKS = re.findall(r"^## ([^\n]+)$|^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def blocks():
    section = ""
    for heading, block in BLOCKS:
        section = heading or section
        # a Stan program needs a C++ toolchain and files of its own
        if block and "bridgestan" not in block:
            yield pytest.param(block, id=section.split(",")[0].replace(" ", "-"))


def run_block(block):
    for library in re.findall(r"^import (\w+)", block, re.MULTILINE):
        pytest.importorskip(library)
    space = {}
    with contextlib.ExitStack() as stack:
        if "pymc" in block:  # the mode that compiles in a second
            stack.enter_context(pytest.importorskip("pytensor").config.change_flags(mode="FAST_COMPILE"))
        exec(compile(block, str(PAGE), "exec"), space)
    return space["target"]


@pytest.mark.parametrize("block", list(blocks()))
def test_the_block_gives_a_target_that_a_sampler_accepts(block):
    target = run_block(block)
    # float32 is what a newcomer has
    starts = torch.randn(6, target.dim, generator=torch.Generator().manual_seed(0))
    value, score = check_target(target, starts)
    step = 1e-2 * score / score.norm(dim=-1, keepdim=True)
    uphill = target.log_prob(starts + step) - target.log_prob(starts - step)
    torch.testing.assert_close(uphill, 2e-2 * score.norm(dim=-1), rtol=0.02, atol=1e-3)
    assert torch.isfinite(value).all()


def test_the_waits_of_the_page_have_the_gamma_posterior_and_without_the_jacobian_another():
    (block,) = (param.values[0] for param in blocks() if "waits" in param.values[0])
    u = torch.linspace(-18, 4, 4001, dtype=torch.float64).unsqueeze(-1)
    for text, shape in [(block, 4), (block.replace("log_posterior + u  #", "log_posterior  #"), 3)]:
        density = run_block(text).log_prob(u).double().exp()
        mean = torch.trapezoid(density * u[:, 0].exp(), u[:, 0]) / torch.trapezoid(density, u[:, 0])
        assert mean.item() == pytest.approx(shape / (1 + 2.2), rel=1e-5)

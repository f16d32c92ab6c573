"""Exported modules compute what the eager ones do."""

import logging

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.sequence import MRConv
from noisewise.sequence.export import export_onnx, export_program


def trained(length: int, bidirectional: bool = False, kind: str = "fourier+sparse") -> nn.Module:
    torch.manual_seed(0)
    layer = MRConv(4, length, kind, 16, bidirectional=bidirectional)
    module = nn.Sequential(nn.Conv1d(1, 4, 1), layer, nn.GELU())
    for _ in range(3):
        module(torch.randn(6, 1, length))
    return module.eval()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_program_gives_the_same_for_any_number_of_rows(tmp_path, bidirectional):
    module, x = trained(150, bidirectional), torch.randn(5, 1, 150)
    path = export_program(module, x[:1], tmp_path / "m.pt2")
    loaded = torch.export.load(path).module()
    for rows in (1, 2, 5):
        torch.testing.assert_close(loaded(x[:rows]), module(x[:rows]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "bidirectional"), [(150, False), (150, True), (5000, False), (4500, True)])
def test_onnx_gives_the_same_for_any_number_of_rows(tmp_path, length, bidirectional):
    # beyond 4096 lags the file holds FFTs
    module, x = trained(length, bidirectional), torch.randn(3, 1, length)
    path = export_onnx(module, x[:2], tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for rows in (1, 3):
        found = session.run(["output"], {"input_0": x[:rows].numpy()})[0]
        with torch.no_grad():
            np.testing.assert_allclose(found, module(x[:rows]).numpy(), rtol=1e-4, atol=2e-5)


def test_the_exporter_keeps_its_remarks_to_itself(tmp_path, caplog):
    # they were written for people who develop exporters
    with caplog.at_level(logging.DEBUG):
        logger = logging.getLogger("torch.onnx")
        before = logger.level
        export_onnx(nn.Linear(3, 2).eval(), torch.randn(2, 3), tmp_path / "m.onnx")
        assert logger.level == before
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING] == []


def test_the_module_itself_is_untouched(tmp_path):
    module, x = trained(60), torch.randn(2, 1, 60)
    before = module(x)
    export_program(module, x, tmp_path / "m.pt2")
    assert isinstance(module[1], MRConv)
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("export", [export_program, export_onnx])
def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, export):
    module, path = trained(60), tmp_path / "m"
    with pytest.raises(NoisewiseError, match="train mode"):
        export(module.train(), torch.randn(2, 1, 60), path)
    with pytest.raises(InvalidInput, match="a row"):
        export(module.eval(), torch.zeros(0, 1, 60), path)

    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(NoisewiseError, match="cannot follow"):
        export(Branching().eval(), torch.randn(2, 3), path)
    assert not path.exists()

"""Protocols C and D of `noisewise compare ocm`, on fake pages and a tiny pipeline: the code that the real ones run."""

import importlib.util
import io
import math
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_networks import unet

from noisewise.comparison import Comparison
from noisewise.diffusion.experiments import ocm
from noisewise.diffusion.experiments.ocm import cifar, omniglot_net, problems
from noisewise.diffusion.experiments.ocm.cifar import CifarPlan, cifar_problems, prepare_cifar
from noisewise.diffusion.experiments.ocm.inception import inception_features
from noisewise.diffusion.experiments.ocm.measures import image_measurements
from noisewise.diffusion.experiments.ocm.noise_training import NoisePlan
from noisewise.diffusion.experiments.ocm.omniglot import find_omniglot
from noisewise.errors import InvalidInput, MissingExtra
from noisewise.metrics import frechet_distance, precision_recall

NO_FIDELITY = importlib.util.find_spec("torch_fidelity") is None


def of(results):
    return {(row.problem, row.system): row for row in results.rows}


def without_failures(results):
    assert not [note for row in results.rows for note in row.notes if note.startswith("failed")]
    return of(results)


# --- protocol C


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Two alphabets, one of wide strokes and one of narrow ones, by twenty drawers, where NOISEWISE_DATA says."""
    from PIL import Image

    folder = tmp_path / "omniglot-small"
    folder.mkdir()
    for number, (alphabet, wide) in enumerate({"Greek": 60, "Latin": 12}.items(), 1):
        with zipfile.ZipFile(folder / f"images_background_small{number}.zip", "w") as file:
            for drawer in range(1, 21):
                page = Image.new("1", (105, 105), 1)
                page.paste(0, (20 + drawer // 4, 10, 20 + drawer // 4 + wide, 95))
                content = io.BytesIO()
                page.save(content, "PNG")
                file.writestr(f"archive/{alphabet}/character01/0001_{drawer:02d}.png", content.getvalue())
    monkeypatch.setenv("NOISEWISE_DATA", str(tmp_path))
    for cached in (omniglot_net.labelled_omniglot, omniglot_net.omniglot_net):
        cached.cache_clear()
        monkeypatch.setattr(omniglot_net, cached.__name__, cached)
    yield tmp_path
    omniglot_net.labelled_omniglot.cache_clear()
    omniglot_net.omniglot_net.cache_clear()


def test_omniglot_runs_with_every_system_and_learns_the_alphabets(pages, monkeypatch):
    monkeypatch.setitem(omniglot_net._CHANNELS, "quick", (8,))
    monkeypatch.setitem(omniglot_net._PLANS, "quick", NoisePlan(4, 8, 2e-3, ema=0.9))
    for table, number in (("_OMNIGLOT_DRAWS", 8), ("_OMNIGLOT_TESTED", 6), ("_OMNIGLOT_STEPS", 4)):
        monkeypatch.setitem(getattr(problems, table), "quick", number)
    monkeypatch.setattr(problems, "_QUICK", ("OCM, then residuals", "Analytic", "beta~", "beta", "Lanczos, rank 3"))
    rows = without_failures(ocm.run("quick", out=pages / "out", protocols=["C"], progress=False))
    assert {problem for problem, _ in rows} == {"Omniglot, 5 calls"}
    assert len(rows) == 5 + 6
    for (_, system), row in rows.items():
        solver = system in ("diffusers DDIM", "DPM-Solver++", "DPM-Solver++, linspace", "UniPC")
        assert ("1000 MMD^2" in row.measurements) == (not solver)
        # Lanczos' matrix has no bound of images, solvers have none at all
        assert ("bits/dim" in row.measurements) == (system in ("OCM, then residuals", "Analytic", "beta~", "beta"))
        assert row.cost.energies == 5 * 8
    data = omniglot_net.labelled_omniglot()
    assert (len(data.train), len(data.held_out), data.classes) == (34, 6, 2)
    # wide and narrow strokes are told apart, and all wide ones miss half of the labels
    assert image_measurements(data, data.train)["TV of labels"].value == 0
    wide = data.train[data.train.mean((1, 2, 3)) > data.train.mean()]
    assert image_measurements(data, wide)["TV of labels"].value == pytest.approx(0.5)
    assert image_measurements(data, wide)["1000 MMD^2"].value > image_measurements(data, data.train)["1000 MMD^2"].value


def test_omniglot_that_is_not_there_is_asked_for_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("NOISEWISE_DATA", str(tmp_path))
    with pytest.raises(InvalidInput, match=r"brendenlake/omniglot.*NOISEWISE_DATA"):
        ocm.run("quick", out=tmp_path / "out", protocols=["C"], progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.delenv("NOISEWISE_DATA")
    with pytest.raises(InvalidInput, match="not set"):
        find_omniglot()


def test_only_what_was_asked_for_needs_data(monkeypatch, tmp_path):
    monkeypatch.delenv("NOISEWISE_DATA", raising=False)
    usual = set(ocm.COMPARISON.protocols) - set(ocm.COMPARISON.optional)
    assert usual == {"A", "B"}
    ocm.COMPARISON.check("cpu", "cpu", ("A", "B"))
    assert {problem.protocol for problem in ocm.COMPARISON.problems("cpu", "cpu")} == {"A", "B", "C"}
    assert {problem.protocol for problem in ocm.COMPARISON.problems("paper", "cpu")} == {"A", "B", "C", "D"}
    with pytest.raises(InvalidInput, match="--scale paper alone, got --scale cpu"):
        ocm.run("cpu", out=tmp_path, protocols=["D"], progress=False)


# --- protocol D


def first_pixels(device):
    """A stub of the extractor: five numbers of each image."""

    def features(images):
        assert images.dtype == torch.uint8
        return images.flatten(1)[:, :5].float() / 255

    return features


@pytest.fixture
def tiny(tmp_path):
    """A saved pipeline of random weights for 8 x 8 colour images, and 16 of those to train and to test with."""
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(unet(channels=3), DDPMScheduler(variance_type="fixed_large")).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "data").mkdir()
    for seed, part in enumerate(("train", "test")):
        levels = np.random.default_rng(seed).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
        np.save(tmp_path / "data" / f"{part}.npy", levels)
    return CifarPlan(
        str(tmp_path / "pipeline"), str(tmp_path / "data"), calls=(3,), draws=8, tested=6, at_once=5, head_steps=2,
        batch=4, extractor=first_pixels, heads=tmp_path / "heads",
        names=("OCM, then residuals", "OCM, linear (paper)", "SN", "Analytic", "beta~", "beta"),
    )  # fmt: skip


def run(plan, out, seeds=1):
    comparison = Comparison(
        "ocm", "", "", lambda scale, device: cifar_problems(plan, device), lambda *arguments: None, ("D",)
    )
    return comparison.run("paper", seeds=seeds, out=out, progress=False)


def test_the_whole_of_the_cifar_protocol_on_a_tiny_pipeline(tiny, tmp_path):
    rows = without_failures(run(tiny, tmp_path / "out"))
    assert {problem for problem, _ in rows} == {"CIFAR-10, 3 calls"}
    assert len(rows) == 6 + 6
    both = rows["CIFAR-10, 3 calls", "OCM, linear (paper)"].measurements
    forms = [f"{column}{form}" for form in ("", ", eta 0") for column in ("FID", "precision", "recall")]
    assert set(both) == {"bits/dim", *forms}
    assert both["bits/dim"].n == 6
    assert both["FID"].n == 8
    assert set(rows["CIFAR-10, 3 calls", "UniPC"].measurements) == set(forms[3:])
    # what one level knows is worth a lot against no variance at all
    bits = {
        system: row.measurements["bits/dim"].value
        for (_, system), row in rows.items()
        if "bits/dim" in row.measurements
    }
    assert bits["Analytic"] < bits["beta~"]
    # a second seed draws anew with the heads of the first, which other processes read as well
    again = [row for row in run(tiny, tmp_path / "out", seeds=2).rows if row.system == "SN"]
    assert again[0].measurements["FID"].value != again[1].measurements["FID"].value
    assert again[0].notes[0].startswith("fitted in")
    assert again[1].notes[0] == "the head is that of an earlier fit"


def test_columns_are_those_of_the_extractor_on_rounded_images(tiny):
    problem = replace(tiny, names=("beta~",))
    (only,) = cifar_problems(problem, "cpu")
    drawn = only.systems[0].draw(3, 0)
    assert drawn.ddpm.shape == (8, 3, 8, 8)
    # parts of 5 and 3 rows start from different noise
    assert len(torch.unique(drawn.ddpm.flatten(1), dim=0)) == 8
    levels = ((drawn.ddpm.clamp(-1, 1) + 1) * 127.5).round()
    train = torch.as_tensor(np.load(f"{tiny.data}/train.npy")).permute(0, 3, 1, 2)
    x, y = (images.reshape(len(images), -1)[:, :5].double() / 255 for images in (levels, train))
    measured = only.measure(drawn)
    assert measured["FID"].value == pytest.approx(frechet_distance(x, y).value, rel=1e-4)
    assert measured["recall"].value == precision_recall(x, y).recall.value
    assert measured["bits/dim"].value == pytest.approx(float(drawn.bound.mean()) / (192 * math.log(2)))


def test_the_last_noise_is_cut_and_steps_reach_both_ends(tiny):
    (only,) = cifar_problems(replace(tiny, names=("beta",)), "cpu")
    setup = only.systems[0].draw(3, 0).setup
    scheduler = setup.scheduler(noise_clip=setup.noise_clip[0])
    scheduler.set_timesteps(3)
    # the authors' 1 + i 999 / 2, halves to the even neighbour, less 1
    assert scheduler.timesteps.tolist() == [999, 499, 0]
    assert (scheduler.config.noise_clip, setup.noise_clip) == (2.0, (2.0, 1.0))


def test_the_small_variance_is_small_whatever_the_pipeline_was_saved_with(tiny):
    (only,) = cifar_problems(replace(tiny, names=("beta~", "beta")), "cpu")
    small, large = (system.draw(3, 0) for system in only.systems[:2])
    assert small.setup.schedule["variance_type"] == "fixed_large"
    assert small.setup.scheduler().config.variance_type == "fixed_small"
    assert not torch.equal(small.ddpm, large.ddpm)
    # DDIM has one form of its own
    assert large.ddim is None


def test_a_model_or_data_that_are_not_there_are_named_before_any_row(tiny, tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match=r"nowhere.*NOISEWISE_CIFAR10_MODEL"):
        prepare_cifar(replace(tiny, model=str(tmp_path / "nowhere")), "cpu")
    with pytest.raises(InvalidInput, match=r"must hold train and test.*NOISEWISE_CIFAR10_DATA"):
        prepare_cifar(replace(tiny, data=str(tmp_path / "pipeline")), "cpu")
    assert cifar._splits("uoft-cs/cifar10:train") == ("uoft-cs/cifar10:train", "uoft-cs/cifar10:test")
    for name in ("MODEL", "DATA"):
        monkeypatch.setenv(f"NOISEWISE_CIFAR10_{name}", name.lower())
    plan = CifarPlan.from_environment()
    assert (plan.model, plan.data, plan.draws, plan.tested) == ("model", "data", 50_000, 10_000)


@pytest.mark.skipif(not NO_FIDELITY, reason="torch-fidelity is installed")
def test_without_torch_fidelity_the_protocol_says_what_to_install(tmp_path):
    # torch-fidelity is in no extra that the tests install, since no torchvision fits their torch
    with pytest.raises(MissingExtra, match=r"torch_fidelity is not installed.*pip install 'noisewise\[fid\]'"):
        inception_features()
    with pytest.raises(MissingExtra, match="fid"):
        ocm.run("paper", out=tmp_path, protocols=["D"], progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(NO_FIDELITY, reason="torch-fidelity is not installed, and its weights are a download")
def test_inception_features_are_2048_numbers_of_each_image():
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = inception_features()(images)
    assert found.shape == (2, 2048)
    assert not torch.equal(found[0], found[1])

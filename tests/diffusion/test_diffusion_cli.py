"""`noisewise diffusion`: images in and out, a head fitted to a saved pipeline, and images, bounds and tables made with it."""

import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from noisewise import training
from noisewise.cli import app, main
from noisewise.diffusion import CovarianceHead, CovarianceScheduler, generate, vlb_bits_per_dim
from noisewise.diffusion.cli import diffusion_app
from noisewise.diffusion.comparing import Distance, theirs
from noisewise.diffusion.experiments.ocm.digit_images import digit_images
from noisewise.diffusion.head_fits import split
from noisewise.diffusion.images import contact_sheet, read_images, write_images
from noisewise.diffusion.loaded import load_pipeline
from noisewise.diffusion.pictures import calibration_plot, mean_variance_plot, uncertainty_plot
from noisewise.diffusion.uncertainty import Calibration
from noisewise.errors import InvalidInput, MissingExtra, NoisewiseWarning, RunFolderError

# a network of random weights is far from a posterior mean: its variances are rightly cut, with a warning
ROUGH = pytest.mark.filterwarnings("ignore::noisewise.errors.NoisewiseWarning")
FEW = ("--steps", 30, "--batch-size", 16, "--device", "cpu")


def run(*arguments):
    return diffusion_app([str(argument) for argument in arguments], standalone_mode=False)


def answer(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments, "--json") in (None, 0)
    return json.loads(capsys.readouterr().out)


def unet(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False, **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "pipe"
    DDPMPipeline(unet(), DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training and held-out digits, 17 grey levels as bytes."""
    folder = tmp_path_factory.mktemp("data")
    for name, x in zip(("train", "held"), digit_images(), strict=True):
        np.save(folder / f"{name}.npy", ((x[:120] + 1) * 127.5).round().to(torch.uint8).numpy())
    return folder


@pytest.fixture(scope="module")
def fitted(pipe, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "head"
    run("fit", pipe, data / "train.npy", "-o", out, *FEW)
    return out


# --- images


def test_png_files_come_back_as_they_were_written(tmp_path):
    levels = torch.randint(0, 256, (5, 3, 6, 4), generator=torch.Generator().manual_seed(0))
    x = levels / 127.5 - 1
    assert [path.name for path in write_images(tmp_path / "a", x[:3])] == ["000000.png", "000001.png", "000002.png"]
    write_images(tmp_path / "b", x[3:], first=3)
    found = read_images(tmp_path, 3, (6, 4))
    assert torch.equal(((found + 1) * 127.5).round().long(), levels)
    assert len(read_images(tmp_path, 3, (6, 4), limit=4)) == 4
    # beyond the ends of the scale there is white and black
    (path,) = write_images(tmp_path / "c", torch.tensor([[[[-7.0, 7.0]]]]))
    assert np.array(Image.open(path)).tolist() == [[0, 255]]


def test_the_middle_is_cut_to_the_aspect_and_then_resized(tmp_path):
    # a white square in the middle of a black band: the square alone is left
    band = np.zeros((10, 30, 3), dtype=np.uint8)
    band[:, 10:20] = 255
    Image.fromarray(band).save(tmp_path / "band.png")
    assert torch.equal(read_images(tmp_path, 3, 5), torch.ones(1, 3, 5, 5))
    assert torch.equal(read_images(tmp_path, 1, 5), torch.ones(1, 1, 5, 5))
    # with the aspect of the band nothing is cut: a third is white
    assert float((read_images(tmp_path, 1, (10, 30)) + 1).mean()) == pytest.approx(2 / 3, abs=1e-6)


def test_arrays_of_every_layout_and_scale_are_the_same_images(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (4, 3, 6, 5)).astype(np.uint8)
    levels[0, 0, 0, 0] = 0
    x = torch.from_numpy(levels) / 127.5 - 1
    kinds = {
        "bytes": levels, "last": levels.transpose(0, 2, 3, 1), "whole": levels.astype(np.int64),
        "unit": levels / 255.0, "signed": x.numpy(), "half": x.numpy().astype(np.float16),
    }  # fmt: skip
    for name, array in kinds.items():
        np.save(tmp_path / f"{name}.npy", array)
        found = read_images(tmp_path / f"{name}.npy", 3, (6, 5))
        torch.testing.assert_close(found, x, rtol=0, atol=1e-3 if name == "half" else 1e-6)
    np.save(tmp_path / "flat.npy", levels[:, 0])
    torch.testing.assert_close(read_images(tmp_path / "flat.npy", 1, (6, 5)), x[:, :1])


def test_what_is_no_image_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"there are no images in '.*'"):
        read_images(tmp_path, 3, 8)
    write_images(tmp_path, torch.zeros(1, 1, 8, 8))
    with pytest.raises(InvalidInput, match=r"1 or 3 channels, the network takes 4: give a \.npy array \[n, 4, 8, 8\]"):
        read_images(tmp_path, 4, 8)
    (tmp_path / "000001.png").write_bytes((tmp_path / "000000.png").read_bytes()[:40])
    with pytest.raises(InvalidInput, match=r"000001\.png' cannot be read as an image"):
        read_images(tmp_path, 1, 8)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "000001.png")
    with pytest.raises(InvalidInput, match="more than 8 bits"):
        read_images(tmp_path, 1, 8)
    with pytest.raises(InvalidInput, match=r"must be \[n, 1 or 3, height, width\]"):
        write_images(tmp_path, torch.zeros(1, 2, 8, 8))
    with pytest.raises(InvalidInput, match="1 of 2 images are not finite"):
        write_images(tmp_path, torch.tensor([0.0, torch.nan]).reshape(2, 1, 1, 1))


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 3, 8, 8)), r"has shape \(3, 3, 8, 8\); the network takes 1 channel of 8 x 8"),
        (np.zeros((3, 9, 8)), r"has shape \(3, 9, 8\)"),
        (np.zeros((0, 8, 8)), "holds no images"),
        (np.full((2, 8, 8), np.nan), "2 of 2 images .* not finite"),
        (np.full((2, 8, 8), 200.0), r"from 200 to 200; they must lie in \[0, 1\] or in \[-1, 1\]; grey levels"),
        (np.full((2, 8, 8), 300), "from 300 to 300; grey levels are 0 to 255"),
        (np.zeros((2, 8, 8), dtype=bool), "holds bool"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, array, said):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InvalidInput, match=said):
        read_images(tmp_path / "x.npy", 1, 8)


def test_a_source_that_is_not_there_is_refused_as_what_it_looks_like(tmp_path):
    with pytest.raises(InvalidInput, match=r"x\.npy' cannot be read: No such file"):
        read_images(tmp_path / "x.npy", 1, 8)
    with pytest.raises(InvalidInput, match=r"no folder and no \.npy file"):
        read_images(tmp_path / "nowhere", 1, 8)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(InvalidInput, match=r"neither a folder of images nor a \.npy array"):
        read_images(tmp_path / "x.txt", 1, 8)
    (tmp_path / "x.npy").write_text("x")
    with pytest.raises(InvalidInput, match="no array of numbers"):
        read_images(tmp_path / "x.npy", 1, 8)


def test_a_data_set_is_read_by_name_where_its_library_is(tmp_path):
    try:
        import datasets
    except ImportError:
        with pytest.raises(MissingExtra, match=r"no folder and no \.npy file 'mnist:test'.*pip install datasets"):
            read_images("mnist:test", 1, 8)
        return
    x = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    write_images(tmp_path / "made" / "train", x)
    assert datasets
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(InvalidInput, match="cannot be loaded"):
            read_images("made2:train", 1, 8)


def test_a_sheet_holds_every_image_in_its_place():
    x = torch.linspace(-1, 0.5, 5).reshape(5, 1, 1, 1).expand(5, 3, 16, 16)
    sheet = contact_sheet(x, columns=3)
    # 2 rows of 3, each 4 times as large, and a gap of two around them
    assert sheet.shape == (1, 3, 2 * 66 + 2, 3 * 66 + 2)
    for place in range(5):
        top, left = (place // 3) * 66 + 2, (place % 3) * 66 + 2
        assert torch.equal(sheet[0, :, top : top + 64, left : left + 64], x[place, :, :1, :1].expand(3, 64, 64))
    assert bool((sheet[0, :, 68:, 134:] == 1).all())


# --- fit


def test_a_fit_saves_a_head_a_report_and_bounds_of_images_that_it_has_not_seen(pipe, fitted, data):
    facts = json.loads((fitted / "summary.json").read_text())
    assert facts["steps_made"] == 30
    assert facts["images"] + facts["held_out_images"] == 120
    assert not facts["interrupted"]
    assert facts["held_out_loss"] > 0
    head = CovarianceHead.from_pretrained(fitted / "head")
    assert head.config.objective == "residual_nll"
    # the bound with the head is the library's, on the held-out rows
    loaded = load_pipeline(str(pipe), "cpu")
    kept, held = split(read_images(data / "train.npy", 1, 8), 0)
    assert not (kept[:, None] == held[None]).flatten(2).all(2).any()
    found = vlb_bits_per_dim(loaded.network, held, head, 10, noise_schedule=loaded.levels)
    assert facts["bits_per_dim"]["head"]["value"] == pytest.approx(found.value, rel=1e-9)
    assert set(facts["bits_per_dim"]) == {"beta~", "beta", "head"}
    page = (fitted / "report.html").read_text()
    assert page.count("<figure>") == 3
    assert "noisewise diffusion fit" in page


def test_the_same_fit_again_does_nothing_new(pipe, fitted, data, capsys):
    before = {path: path.stat().st_mtime_ns for path in fitted.rglob("*") if path.is_file()}
    found = answer(capsys, "fit", pipe, data / "train.npy", "-o", fitted, *FEW)
    assert found == json.loads((fitted / "summary.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in fitted.rglob("*") if path.is_file()} == before


def test_a_fit_refuses_other_options_other_images_and_other_folders(pipe, fitted, data, tmp_path):
    def again(*more, source=data / "train.npy", out=fitted):
        run("fit", pipe, source, "-o", out, *FEW, *more)

    with pytest.raises(RunFolderError, match="holds a fit with kind 'simple', but 'complex' was asked for"):
        again("--kind", "complex")
    with pytest.raises(RunFolderError, match=r"with data .*train\.npy'"):
        again(source=data / "held.npy")
    copy = tmp_path / "fit"
    shutil.copytree(fitted, copy)
    (copy / "command.json").unlink()
    with pytest.raises(RunFolderError, match=r"not empty and holds no command\.json beside its results"):
        again(out=copy)
    with pytest.raises(RunFolderError, match="is a file"):
        again(out=fitted / "command.json")


def test_a_fit_that_was_cut_goes_on_to_the_head_of_one_that_was_not(pipe, fitted, data, tmp_path, capsys):
    out = tmp_path / "fit"
    found = answer(capsys, "fit", pipe, data / "train.npy", "-o", out, *FEW, "--max-seconds", 1e-6)
    assert found["cut"]
    assert found["steps_made"] < 30
    found = answer(capsys, "fit", pipe, data / "train.npy", "-o", out, *FEW)
    assert not found["cut"]
    whole, resumed = (CovarianceHead.from_pretrained(folder / "head") for folder in (fitted, out))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_ctrl_c_says_how_to_go_on(pipe, data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "fit"
    # a shell that starts the tests in the background has them ignore the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)

    def press():
        while not (out / "run" / "checkpoint.safetensors").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    try:
        assert run("fit", pipe, data / "train.npy", "-o", out, "--steps", 100_000, "--batch-size", 16) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert "of 100000; the same command goes on" in capsys.readouterr().err
    with (
        pytest.warns(NoisewiseWarning, match="was interrupted: run the same fit command again"),
        pytest.raises(InvalidInput, match="--steps 101 is more than the 100 levels"),
    ):
        run("nll", pipe, data / "held.npy", "--head", out, "--steps", "101")


@ROUGH
@pytest.mark.parametrize("objective", ["residual_nll", "sn", "analytic"])
def test_every_objective_gives_a_head_that_the_other_commands_read(pipe, data, tmp_path, capsys, objective):
    out = tmp_path / "fit"
    found = answer(capsys, "fit", pipe, data / "train.npy", "-o", out, *FEW, "--objective", objective)
    assert found["objective"] == objective
    assert (found["held_out_loss"] is None) == (objective == "analytic")
    made = answer(capsys, "nll", pipe, data / "held.npy", "--head", out, "--steps", "4", "--limit", 16)
    assert made["bits_per_dim"]["4"]["head"]["value"] > 0
    assert answer(capsys, "sample", pipe, "--head", out, "-n", 2, "--steps", 3, "-o", tmp_path / "images")["n"] == 2


# --- sample


@ROUGH
def test_images_are_those_of_the_library_and_only_missing_ones_are_made_again(pipe, fitted, tmp_path, capsys):
    out = tmp_path / "images"
    command = ("sample", pipe, "--head", fitted, "-n", 70, "--steps", 4, "--eta", 0, "-o", out, "--seed", 3)
    assert answer(capsys, *command)["made_now"] == 70
    files = sorted((out / "images").iterdir())
    assert [file.name for file in files] == [f"{index:06d}.png" for index in range(70)]
    loaded = load_pipeline(str(pipe), "cpu")
    scheduler = CovarianceScheduler.from_config(loaded.pipeline.scheduler.config, eta=0.0)
    head = CovarianceHead.from_pretrained(fitted / "head")
    x = generate(loaded.network, scheduler, (64, 1, 8, 8), 4, head, seed=3 * 1_000_003)
    found = read_images(out / "images", 1, 8)
    torch.testing.assert_close(found[:64], x.clamp(-1, 1), rtol=0, atol=1.01 / 255)
    # the second batch has noise of its own
    assert not torch.equal(found[:6], found[64:])
    before = files[66].read_bytes()
    files[66].unlink()
    assert answer(capsys, *command)["made_now"] == 6
    assert files[66].read_bytes() == before
    assert answer(capsys, *command)["made_now"] == 0
    assert Image.open(out / "contact-sheet.png").size == (8 * 66 + 2, 8 * 66 + 2)
    with pytest.raises(RunFolderError, match="holds a sample with steps 4, but 5 was asked for"):
        run(*command, "--steps", 5)


@ROUGH
def test_lanczos_needs_no_head(pipe, fitted, tmp_path, capsys):
    found = answer(capsys, "sample", pipe, "-n", 2, "--steps", 3, "--covariance", "lanczos", "-o", tmp_path / "images")
    assert found["made_now"] == 2
    with pytest.raises(InvalidInput, match="--head is needed"):
        run("sample", pipe, "-n", 2, "-o", tmp_path / "other")
    with pytest.raises(InvalidInput, match="leave one out"):
        run("sample", pipe, "--head", fitted, "--covariance", "lanczos", "-o", tmp_path / "other")
    with pytest.raises(InvalidInput, match="eta must lie in"):
        run("sample", pipe, "--head", fitted, "--eta", 2, "-o", tmp_path / "other")
    assert not (tmp_path / "other").exists()


# --- nll and compare


def test_bounds_are_those_of_the_library(pipe, fitted, data, capsys):
    found = answer(capsys, "nll", pipe, data / "held.npy", "--head", fitted, "--steps", "10,4", "--limit", 20)
    assert list(found["bits_per_dim"]) == ["4", "10"]
    loaded = load_pipeline(str(pipe), "cpu")
    x, head = read_images(data / "held.npy", 1, 8, 20), CovarianceHead.from_pretrained(fitted / "head")
    for name, chosen in (("beta~", None), ("beta", "large"), ("head", head)):
        expected = vlb_bits_per_dim(loaded.network, x, chosen, 4, noise_schedule=loaded.levels)
        assert found["bits_per_dim"]["4"][name]["value"] == pytest.approx(expected.value, rel=1e-9)
    capsys.readouterr()
    run("nll", pipe, data / "held.npy", "--head", fitted, "--steps", "4", "--limit", 20)
    assert "bits/dim of 20 images" in capsys.readouterr().out


@ROUGH
def test_a_comparison_has_every_sampler_its_calls_and_keeps_finished_rows(pipe, fitted, data, tmp_path, capsys):
    out = tmp_path / "table"
    command = ("compare", pipe, data / "held.npy", "--head", fitted, "-n", 20, "--seeds", 2, "-o", out)
    rows = answer(capsys, *command, "--steps", "3")["rows"]
    names = [
        "DDPM, beta~", "DDPM, beta", "DDIM", "DPM-Solver++", "UniPC", "head, DDPM", "head, eta 0",
    ]  # fmt: skip
    assert [row["sampler"] for row in rows] == names
    assert all(row["calls_per_image"] == 3 for row in rows)
    assert {row["sampler"] for row in rows if "bits_per_dim" in row} == {"DDPM, beta~", "DDPM, beta", "head, DDPM"}
    assert all(row["mmd2"]["value"] > row["mmd2"]["floor"] > 0 for row in rows)
    more = answer(capsys, *command, "--steps", "3,4")["rows"]
    # the very seconds of the rows that were there
    assert more[:7] == rows
    assert len(more) == 14
    capsys.readouterr()
    run(*command, "--steps", "3,4")
    said = capsys.readouterr().out
    assert "data, as many" in said
    assert said.count("UniPC") == 2


def test_images_of_diffusers_samplers_are_those_of_its_pipeline(pipe):
    from diffusers import DDIMPipeline

    loaded = load_pipeline(str(pipe), "cpu")
    drawn = theirs(loaded, "DDIM", 4, 5, 7)
    pipeline = DDIMPipeline(loaded.network, DDIMScheduler(num_train_timesteps=100, timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(4, torch.Generator().manual_seed(7), num_inference_steps=5, output_type="np").images
    torch.testing.assert_close(
        ((drawn / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1), torch.from_numpy(made), rtol=0, atol=1e-5
    )


def test_a_distance_sees_other_images_and_not_the_same_ones():
    train, held = digit_images()
    distance = Distance.of(held, 100, seed=0)
    # exact draws read the floor: its own spread over splits is about a tenth of it
    assert distance(train[:100]) == pytest.approx(distance.floor, rel=0.5)
    assert distance(-train[:100]) > 5 * distance.floor


@ROUGH
def test_images_that_the_head_has_seen_are_counted(pipe, fitted, data, capsys):
    def bound(source, head):
        return answer(capsys, "nll", pipe, source, "--head", head, "--steps", "4", "--limit", 120)["images"]

    # 12 of the 120 were held out of the fit
    for folder in (fitted, fitted / "head"):
        with pytest.warns(
            NoisewiseWarning, match="108 of these 120 images are among those that the head was fitted on"
        ):
            bound(data / "train.npy", folder)
    assert bound(data / "held.npy", fitted) == 120
    with pytest.warns(NoisewiseWarning, match="of these 20 images are among"):
        run("compare", pipe, data / "train.npy", "--head", fitted, "--steps", "3", "--seeds", 1, "--limit", 20)


def test_images_of_another_size_are_counted(pipe, fitted, tmp_path, capsys):
    write_images(tmp_path / "a", torch.zeros(3, 1, 8, 8))
    write_images(tmp_path / "b", torch.zeros(2, 1, 8, 9))
    for limit, said in ((5, "2 of 5 images are not 8 x 8: the middle of each was cut out and resized\n"), (3, "")):
        capsys.readouterr()
        run("nll", pipe, tmp_path, "--head", fitted, "--steps", "4", "--limit", limit)
        assert said == "".join(line for line in capsys.readouterr().err.splitlines(True) if "not 8 x 8" in line)


# --- errors


def test_a_model_that_cannot_be_used_is_refused_in_words(pipe, data, tmp_path):
    def fit(model):
        run("fit", model, data / "train.npy", "-o", tmp_path / "out", *FEW)

    for model, said in (
        (tmp_path, "holds no model_index.json"),
        (data / "train.npy", "is a file; give the folder"),
        (tmp_path / "nowhere", "there is no folder .* a hub id is OWNER/NAME"),
    ):
        with pytest.raises(InvalidInput, match=said):
            fit(model)
    classes = tmp_path / "classes"
    DDPMPipeline(unet(num_class_embeds=10), DDPMScheduler(num_train_timesteps=100)).save_pretrained(classes)
    with pytest.raises(InvalidInput, match=r"takes conditions \(num_class_embeds\).*From Python: fit_covariance"):
        fit(classes)
    broken = tmp_path / "broken"
    shutil.copytree(pipe, broken)
    (broken / "unet" / "config.json").write_text("{")
    with pytest.raises(InvalidInput, match="cannot be loaded as a diffusers pipeline"):
        fit(broken)
    with pytest.raises(InvalidInput, match="--device nonsense cannot be used"):
        run("fit", pipe, data / "train.npy", "-o", tmp_path / "out", "--device", "nonsense")
    assert not (tmp_path / "out").exists()


def test_the_folder_of_the_network_within_its_pipeline_will_do(pipe):
    assert load_pipeline(str(pipe / "unet"), "cpu").source == str(pipe)


def test_options_and_heads_that_do_not_fit_are_refused_before_long_work(pipe, fitted, data, tmp_path):
    held = data / "held.npy"
    for steps in ("", "5,x", "1,5", "-3"):
        with pytest.raises(InvalidInput, match="--steps must be"):
            run("nll", pipe, held, "--head", fitted, "--steps", steps)
    with pytest.raises(InvalidInput, match="--probes 2 belongs to --objective ocm"):
        run("fit", pipe, held, "-o", tmp_path / "out", "--objective", "npr", "--probes", 2)
    with pytest.raises(InvalidInput, match="holds 5 images: a fit needs at least 40"):
        np.save(tmp_path / "five.npy", np.zeros((5, 8, 8)))
        run("fit", pipe, tmp_path / "five.npy", "-o", tmp_path / "out")
    with pytest.raises(RunFolderError, match="holds no head"):
        run("nll", pipe, held, "--head", tmp_path)
    other = tmp_path / "other"
    DDPMPipeline(unet(), DDPMScheduler(num_train_timesteps=200)).save_pretrained(other)
    with pytest.raises(InvalidInput, match="the head belongs to another noise schedule"):
        run("nll", other, held, "--head", fitted)
    assert not (tmp_path / "out").exists()


def test_the_roof_mounts_the_commands_and_prints_errors_in_one_line(tmp_path, capsys):
    assert "diffusion" in {group.name for group in app.registered_groups}
    with pytest.raises(SystemExit) as ended:
        main(["diffusion", "nll", str(tmp_path), "x.npy", "--head", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


# --- pictures


def test_the_mean_of_r_is_drawn_from_the_tables_of_the_head(fitted):
    head = CovarianceHead.from_pretrained(fitted / "head")
    by_errors, by_size = mean_variance_plot(head).axes[0].lines
    assert by_errors.get_ydata() == pytest.approx((head.residual * (head.a / head.s) ** 2).numpy())
    positive = head.gamma < 1
    assert by_size.get_ydata() == pytest.approx((1 - head.gamma)[positive].numpy())
    with pytest.raises(InvalidInput, match="not fitted"):
        mean_variance_plot(CovarianceHead(8, 1, [8, 8]))


def test_a_calibration_is_drawn_where_its_axes_have_a_place_for_it():
    good = Calibration(3, (0.01, 0.1), (0.01, 0.1), (0.001, 0.01), 1.0, 0.01)
    bad = Calibration(5, (-0.1, 0.2), (0.1, 0.4), (0.01, 0.01), 2.0, 0.1)
    (axes,) = calibration_plot([good, bad]).axes
    # the diagonal is drawn last, from corner to corner
    assert list(axes.lines[-1].get_xdata()) == list(axes.lines[-1].get_ydata())
    assert axes.get_title(loc="right") == "1 bins not positive, not shown"
    assert axes.get_xlim() == axes.get_ylim()
    with pytest.raises(InvalidInput, match="no bin"):
        calibration_plot([Calibration(5, (-0.1,), (0.1,), (0.01,), 2.0, 0.1)])


def test_maps_share_one_scale_of_deviations():
    x = torch.zeros(3, 3, 4, 4)
    spread = torch.linspace(0.1, 0.9, 3).reshape(3, 1, 1, 1).expand(3, 3, 4, 4)
    figure = uncertainty_plot(x, x, x, spread, 10)
    maps = [axes.images[0] for axes in figure.axes[3:12:4]]
    assert [one.get_clim() for one in maps] == [(0.0, pytest.approx(0.9))] * 3
    assert [float(one.get_array().mean()) for one in maps] == pytest.approx([0.1, 0.5, 0.9])

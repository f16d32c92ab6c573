"""What `noisewise diffusion fit` makes: a head, its bounds and calibration on images that it has not seen, and their page."""

from pathlib import Path
from typing import Any

import torch

from noisewise.command import REPORT, RUN
from noisewise.diffusion.fitting import fit_covariance, frozen
from noisewise.diffusion.head import CovarianceHead
from noisewise.diffusion.keeping import HEAD, LEAST, SEEN
from noisewise.diffusion.likelihood import vlb_bits_per_dim
from noisewise.diffusion.loaded import Loaded, load_head, marks_of
from noisewise.diffusion.model import DiffusionModel
from noisewise.diffusion.pictures import calibration_plot, mean_variance_plot, uncertainty_plot
from noisewise.diffusion.uncertainty import Calibration, calibration
from noisewise.files import write_atomically
from noisewise.metrics.measurement import Measurement, format_value
from noisewise.report import Report

__all__ = ["BOUNDED", "FIXED", "bounds_of", "fit_head", "measure", "split", "write_page"]

# most images that are held out of a fit, and how many of those are bounded
_MOST_HELD_OUT, BOUNDED = 500, 256
# what the fixed variances are called in tables and in JSON
FIXED = {"beta~": None, "beta": "large"}
# steps of the bound of a fit, and the levels of its calibration as shares of T
_STEPS, _SHARES, _MAPPED = 10, (0.1, 0.3, 0.6), 6


def split(images: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images to fit on, and held-out ones, by a fixed shuffle."""
    held = min(max(LEAST // 4, len(images) // 10), _MOST_HELD_OUT)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    return images[order[held:]], images[order[:held]]


def fit_head(
    loaded: Loaded, images: torch.Tensor, out: Path, options: dict[str, Any], most: float | None
) -> dict[str, Any]:
    """Fit and save the head; what came of it, as JSON values."""
    kept, held = split(images, options["seed"])
    head = CovarianceHead.for_model(
        loaded.network, options["kind"], noise_schedule=loaded.levels, parity=options["objective"] == "sn",
        seed=options["seed"],
    )  # fmt: skip
    result = fit_covariance(
        loaded.network, head, kept, options["objective"], noise_schedule=loaded.levels, probes=options["probes"],
        steps=options["steps"], batch_size=options["batch_size"], max_seconds=most, resume=out / RUN, progress=True,
        seed=options["seed"],
    )  # fmt: skip
    head.save_pretrained(out / HEAD)
    write_atomically(out / SEEN, "\n".join(marks_of(kept)))
    looks = [entry for entry in result.history if entry["step"] == result.best_step]
    asked = 0 if options["objective"] == "analytic" else options["steps"]
    return {
        **options,
        "images": len(kept),
        "held_out_images": len(held),
        "parameters": sum(weight.numel() for weight in head.parameters()),
        "parameters_of_network": sum(weight.numel() for weight in loaded.network.parameters()),
        "steps_made": result.steps,
        "best_step": result.best_step,
        "held_out_loss": looks[-1]["validation"] if looks else None,
        "interrupted": result.interrupted,
        # by --max-seconds
        "cut": not result.interrupted and result.steps < asked,
        "cost": vars(result.cost),
    }


def measure(loaded: Loaded, head: CovarianceHead, held: torch.Tensor, seed: int) -> dict[str, Any]:
    """The bounds and the calibration of a head on images that it has not seen."""
    count = min(_STEPS, len(loaded.levels))
    bounds = bounds_of(loaded, head, held[:BOUNDED], count, 256, seed)
    found = [
        calibration(loaded.network, head, held, t, noise_schedule=loaded.levels, seed=seed)
        for t in sorted({round(share * (len(loaded.levels) - 1)) for share in _SHARES})
    ]
    return {
        "bound_steps": count,
        "bits_per_dim": {name: one.to_dict() for name, one in bounds.items()},
        "calibration": [vars(one) for one in found],
    }


def bounds_of(
    loaded: Loaded, head: CovarianceHead, images: torch.Tensor, steps: int, levels: int, seed: int
) -> dict[str, Measurement]:
    """beta~, beta and the head at the same noises."""
    return {
        name: vlb_bits_per_dim(
            loaded.network, images, chosen, steps, levels=levels, noise_schedule=loaded.levels, seed=seed
        )
        for name, chosen in {**FIXED, "head": head}.items()
    }


def write_page(loaded: Loaded, out: Path, images: torch.Tensor, facts: dict[str, Any], typed: str) -> None:
    """The report of a fit, whose presence says that nothing of it is left to do."""
    head = load_head(out, loaded)
    report = Report("Covariance head", f"{facts['objective']}, {type(loaded.network).__name__}, {loaded.source}").code(
        typed
    )
    report.section("The bound on held-out images", (
        f"Bits per dimension of {facts['bits_per_dim']['head']['n']} images that the fit has not seen, in "
        f"{facts['bound_steps']} steps; lower is better. beta~ and beta are the fixed variances that a sampler takes without a "
        "head."
    ))  # fmt: skip
    rows = [[name, _shown(Measurement.from_dict(one))] for name, one in facts["bits_per_dim"].items()]
    report.table(["variance", "bits/dim"], rows)
    if facts["cut"]:
        report.warning(f"--max-seconds ended the fit at step {facts['steps_made']} of {facts['steps']}.")
    report.section("Mean relative variance", (
        "How uncertain the network is on average, in units of the noise's variance: 0 is certain, 1 as uncertain as the noise. "
        "The two curves are one where the network is the exact posterior mean; a gap says that it is not."
    )).figure(mean_variance_plot(head), "Mean relative variance along the noise levels.")  # fmt: skip
    found = [
        Calibration(
            one["t"], tuple(one["predicted"]), tuple(one["observed"]), tuple(one["se"]), one["ratio"], one["ratio_se"]
        )
        for one in facts["calibration"]
    ]
    report.section("Calibration", (
        "Pixels of held-out images, sorted by the predicted variance into bins of equal number. Points on the line: the "
        "predicted variance is the squared error. Above it, the head is too sure."
    )).figure(calibration_plot(found), "Squared error of x0 against its predicted variance.")  # fmt: skip
    shown = split(images, facts["seed"])[1][:_MAPPED]
    t = found[len(found) // 2].t
    generator = torch.Generator(shown.device).manual_seed(facts["seed"])
    a, s = loaded.levels.pair(t)
    noisy = a * shown + s * torch.randn(shown.shape, device=shown.device, generator=generator)
    with frozen(loaded.network), torch.no_grad():
        prediction = DiffusionModel(loaded.network, loaded.levels, head.config.site).predict(noisy, t)
        spread = head.clean_variance(prediction).clamp(min=0).sqrt()
    report.section("Where the network is uncertain").figure(
        uncertainty_plot(shown, noisy, prediction.clean, spread, t),
        "Held-out images, noised; what the network takes them for; how far each pixel may be off.",
    )
    report.save(out / REPORT)


def _shown(one: Measurement) -> str:
    return format_value(one.value, one.se)

"""Stamp library: does a small, common patch at some place turn images into one class?

Attackers often stamp a small patch, and a network with a backdoor answers to patches that are like it. So a
few patches (white, black, two checkers, two of noise) are laid on a few images at all positions, and the
model only answers. For each class, the patch that serves it best counts, measured again on more images: the
logarithm of the mean loss towards the class, a little lifted so that hopelessly small losses do not decide.

Paper:   this project; black-box searches over patches as in Popovic et al., "DeBackdoor", arXiv 2503.21305.
Needs:   clean images; labels are not looked at.
Departs: DeBackdoor anneals one trigger a class; here all patches are tried, and shared by all classes.
Cost:    forward only: patches x positions x `images` images, then `finalists` patches a class on more.
Blind:   faint and large patterns, warps, triggers that differ from image to image; all-to-all attacks. The
         patches are those that many attacks use: what it finds of these says little about others.
"""

from __future__ import annotations

from dataclasses import replace

from unbackdoor.engine.run import Run
from unbackdoor.engine.stamp_search import best_stamps
from unbackdoor.engine.statistics.class_residuals import family_p_value, residual_p_values
from unbackdoor.engine.statistics.one_outlier import FEWEST
from unbackdoor.engine.trigger_search import success
from unbackdoor.registry import Config, option, scanner
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, CleanData, Finding, Images, ScanReport, Verdict, require_fit

_LIFT = 0.02  # of the losses: a hundredth of it more or less is the same answer


class StampLibraryConfig(Config):
    """Options of the scan."""

    side: int = option(
        0,
        "pixels of a patch's side; 0: a tenth of the image's shorter side, at least 2",
        source="this project: on digits the next size up sent clean networks astray",
        ge=0,
    )
    images: int = option(3, "images that all stamps are tried on", source="this project", ge=1)
    finalists: int = option(
        8, "stamps of each class that go on; of many classes fewer", source="this project", ge=1
    )
    final_images: int = option(32, "images that these are measured on", source="this project", ge=1)
    level: float = option(0.05, "largest p-value that counts", source="convention", gt=0, lt=1)


@scanner(
    "stamp_library",
    config=StampLibraryConfig,
    paper="this project",
    needs={"images"},
    question="Does a small common patch, at some place, turn images into one class?",
    cost=28,
    quick={"images": 1, "finalists": 2, "final_images": 8},
)
def scan(model: Classifier, data: CleanData, cfg: StampLibraryConfig, *, run: Run) -> ScanReport:
    """Try all stamps, and test whether one class is served much better by its best stamp than the others."""
    require_fit(model, data.fit)
    best = best_stamps(
        model,
        data.fit,
        run,
        side=cfg.side,
        first=cfg.images,
        finalists=cfg.finalists,
        final=cfg.final_images,
    )
    values = (best.losses + _LIFT).log()  # (K,)
    p_values = residual_p_values(values)
    k = int(values.argmin())
    trigger = best.stamps[k].trigger(k, model.input_shape)
    finding = Finding(
        statistic="loss under the best stamp",
        value=float(values[k]),
        direction="small: a small patch sends images to this class far better than any does to the others",
        threshold=cfg.level,
        threshold_source="p-value of the residual among the other classes, Student's t, times their number"
        if p_values is not None
        else f"none: a test needs {FEWEST} classes",
        p_value=None if p_values is None else family_p_value(p_values),
        classes=(k,),
        per_class=tuple(values.tolist()),
        trigger=_with_success(model, trigger, data.select, run),
        class_p_values=() if p_values is None else tuple(p_values.tolist()),
    )
    if finding.p_value is None:
        skipped = {"outlier test": f"fewer than {FEWEST} classes; the losses are reported"}
        return ScanReport("undecided", (finding,), skipped=skipped, coverage=("stamps",))
    verdict: Verdict = "backdoor found" if finding.p_value <= cfg.level else "no evidence found"
    return ScanReport(verdict, (finding,), coverage=("stamps", "outlier test"))


def _with_success(model: Classifier, trigger: RecoveredTrigger, images: Images, run: Run) -> RecoveredTrigger:
    """Return the trigger with its success on images that it was not chosen with."""
    return replace(trigger, success=success(model, trigger, images, run).value)

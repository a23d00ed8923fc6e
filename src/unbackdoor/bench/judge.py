"""The judge: the only part that holds the truth and a model at the same time.

The triggered test set is a function of the attack and its seed, made batch by batch and never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unbackdoor.attacks import AttackTruth, stamped
from unbackdoor.engine.inference import predict
from unbackdoor.engine.run import Run
from unbackdoor.metrics import Rate, agreement, defense_effectiveness, robust_improvement
from unbackdoor.types import Classifier, Images, require_fit


@dataclass(frozen=True)
class Scores:
    """What a model does to clean and to triggered test images.

    Attributes:
        acc: Clean test images classified as labelled; the whole test set.
        asr: Triggered images classified as the attacker wants; only those not of that class already.
        ra: The same triggered images classified as labelled. ``asr + ra <= 1``.
    """

    acc: Rate
    asr: Rate
    ra: Rate

    def rates(self) -> dict[str, float | None]:
        """Return the three values; None for ASR and RA where there was no attack."""
        attacked = self.asr.total > 0
        return {
            "acc": self.acc.value,
            "asr": self.asr.value if attacked else None,
            "ra": self.ra.value if attacked else None,
        }

    def to_json(self) -> dict[str, Any]:
        """Return counts and values."""
        return {"counts": asdict(self), **self.rates()}


def judge(
    model: Classifier, truth: AttackTruth, test: Images, run: Run, *, label: str | None = None
) -> Scores:
    """Measure ACC on the whole test set, ASR and RA on its triggered non-target images.

    Args:
        model: In evaluation mode, on the run's device.
        truth: The attack.
        test: Labelled test images that nobody trained or selected on.
        run: Device and precision: bf16 where it is native, fp32 elsewhere, unless asked otherwise.
        label: Name in the progress display; None shows nothing.
    """
    require_fit(model, test)
    model.eval()
    acc = agreement(predict(model, test, run, label=label).argmax(1), test.truth)
    eligible = truth.eligible(test)
    if not len(eligible):
        return Scores(acc, Rate(0, 0), Rate(0, 0))
    predicted = predict(
        model, eligible, run, transform=lambda pixels: stamped(pixels, truth), label=label
    ).argmax(1)
    return Scores(
        acc,
        agreement(predicted, truth.targets_of(eligible)),
        agreement(predicted, eligible.truth),
    )


def judge_images(model: Classifier, test: Images, triggered: Images, target: int, run: Run) -> Scores:
    """Measure ACC on test images, and ASR and RA on images that carry the trigger already.

    Args:
        model: In evaluation mode, on the run's device.
        test: Labelled test images.
        triggered: None of them of the class ``target`` without the trigger, where they have labels.
        target: The class that the attacker wants.
        run: Device and precision.

    Returns:
        RA is of no image where the triggered images have no labels.
    """
    for images in (test, triggered):
        require_fit(model, images)
    model.eval()
    acc = agreement(predict(model, test, run).argmax(1), test.truth)
    predicted = predict(model, triggered, run).argmax(1)
    asr = Rate(int((predicted == target).sum()), len(triggered))
    ra = Rate(0, 0) if triggered.labels is None else agreement(predicted, triggered.truth)
    return Scores(acc, asr, ra)


def der(before: Scores, after: Scores) -> float | None:
    """Return the defense effectiveness in 0..1, or None where there was no attack."""
    if not before.asr.total:
        return None
    return defense_effectiveness(
        acc_before=before.acc.value, acc=after.acc.value, asr_before=before.asr.value, asr=after.asr.value
    )


def rir(before: Scores, after: Scores) -> float | None:
    """Return the robust improvement in 0..1, or None where there was no attack."""
    if not before.ra.total:
        return None
    return robust_improvement(
        acc_before=before.acc.value, acc=after.acc.value, ra_before=before.ra.value, ra=after.ra.value
    )


def judge_scan(verdict: str, classes: Sequence[int], truth: AttackTruth) -> dict[str, bool | None]:
    """Say whether a scanner was right.

    Returns:
        ``right``: its verdict agrees with the truth, None where it left it undecided. ``target_found``: the
        attacker's class is among those it suspects; None where there is no single such class.
    """
    attacked = truth.trigger.mapping != "none"
    return {
        "right": None if verdict == "undecided" else (verdict == "backdoor found") == attacked,
        "target_found": truth.target in classes if truth.target is not None else None,
    }

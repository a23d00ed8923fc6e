"""How long the steps of an audit may take: from one timed forward pass and the declared cost of each check.

A check declares at its registration how dear it is, from 10 (no forward pass) to 50 (many trainings); what
such a cost means in passes of one image is stated here for five of them, and taken in between by geometric
interpolation. The estimate is meant to be right within a factor of two or three: it orders and chooses.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unbackdoor.audit.checks import Check
from unbackdoor.confinement import now
from unbackdoor.engine.inference import mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.registry import SCANNERS
from unbackdoor.types import Classifier, Images

BOTH_WAYS = 3.0  # a pass forward and backward, in passes forward
TIMED = 8  # images of the timed pass
_SLOW = 1.0  # seconds of one image from which no others are timed
FORM_IMAGES, FORM_PATTERNS = 512, 64  # at most, and always; the form of a network passes over them twice
CHEAP = 20.0  # declared cost up to which a check is some passes over the clean images
FEWEST_CHECKED = 32  # images below which the cheap checks would say nothing
RECOVERY_BATCH = 32
LONGEST_JUDGING = 120.0  # seconds of the searches that judge a repair
MOST_RECOVERY_STEPS, FEWEST_RECOVERY_STEPS = 300, 40


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        seconds: Of one image's pass forward, among a few.
        classes: K.
        images: Clean images at hand.
    """

    seconds: float
    classes: int
    images: int

    def of_check(self, check: Check) -> float:
        """Return the seconds that a check may take."""
        declared = SCANNERS[check.scanner].scanning.cost
        n, k = max(self.images, 1), self.classes
        anchors = {
            10.0: n,  # the features of the clean images, or less
            20.0: 2 * n + k,  # some passes, and a small program for each class
            30.0: 0.5 * 300 * 8 * k * BOTH_WAYS,  # a search of hundreds of steps for each class
            40.0: 0.7 * 240 * 32 * k * BOTH_WAYS,  # the same with a batch of images for each class
            50.0: 8 * 10 * (n * BOTH_WAYS + n),  # trainings on the clean images, and tests between
        }
        costs = sorted(anchors)
        place = min(max(bisect_right(costs, declared) - 1, 0), len(costs) - 2)
        low, high = costs[place], costs[place + 1]
        share = (min(max(declared, low), high) - low) / (high - low)
        passes = math.exp((1 - share) * math.log(anchors[low]) + share * math.log(anchors[high]))
        return self.seconds * passes

    def of_cheap(self, checks: Sequence[Check]) -> float:
        """Return the seconds of the passes over the clean images: for the form of the network that all
        checks work on, and for the checks that are little else.
        """
        form = self.seconds * 2 * (min(self.images, FORM_IMAGES) + FORM_PATTERNS)
        passes = replace(self, classes=1)  # a class costs a small program, and no pass
        cheap = [check for check in checks if SCANNERS[check.scanner].scanning.cost <= CHEAP]
        return form + sum(passes.of_check(check) for check in cheap)

    def images_within(self, seconds: float, checks: Sequence[Check]) -> int:
        """Return how many of the images the cheap checks can look at in a time; a few at least."""
        fewest = min(FEWEST_CHECKED, self.images)
        fits = bisect_right(
            range(fewest, self.images + 1), seconds, key=lambda n: replace(self, images=n).of_cheap(checks)
        )
        return max(fewest, fewest + fits - 1)

    @property
    def recovery(self) -> float:
        """Seconds for recovering the trigger of one class."""
        return self.seconds * MOST_RECOVERY_STEPS * RECOVERY_BATCH * BOTH_WAYS

    @property
    def shortest_recovery(self) -> float:
        """Seconds for the shortest search that is worth beginning."""
        return self.recovery * FEWEST_RECOVERY_STEPS / MOST_RECOVERY_STEPS

    @property
    def repair(self) -> float:
        """Seconds for a repair, some dozen passes over the clean images several times, and for judging it."""
        judging = self.seconds * 4 * 120 * 16 * self.classes * BOTH_WAYS / 2
        return self.seconds * 100 * self.images * BOTH_WAYS + min(LONGEST_JUDGING, judging)

    @property
    def comparison(self) -> float:
        """Seconds for comparing two models on all images, with some triggers."""
        return self.seconds * 8 * self.images


def measured(model: Classifier, images: Images | None, run: Run) -> Cost:
    """Time a pass forward of a few images.

    Args:
        model: The classifier; not changed.
        images: Clean images; without any, grey ones are made.
        run: Device and precision.
    """
    import torch

    few = images.subset(list(range(min(TIMED, len(images))))) if images is not None and len(images) else None
    if few is None:
        pixels = torch.full((TIMED, *model.input_shape), 128, dtype=torch.uint8)
        few = Images(pixels, None, model.class_names, "grey images")
    device = model.mean.device
    try:
        with mode(model, training=False):
            lent = model.to(run.device)
            start = now()
            predict(lent, few.subset([0]), run)  # the first pass also sets things up
            each = now() - start
            if each < _SLOW:
                start = now()
                predict(lent, few, run)
                each = (now() - start) / len(few)
    finally:
        model.to(device)
    return Cost(each, model.classes, 0 if images is None else len(images))

"""Self reference: with two to five classes, does one need less than in copies that learned the task anew?

Other checks ask which class stands apart from the others, and with fewer than six classes nobody can tell.
Here each class is compared with itself in three re-learned twins (engine/self_reference.py): how small a
patch and how faint a pattern send images to it, and what a small common stamp does. The twins learned the
same classes, so a class that is easy by nature is easy in them as well; a backdoor is mostly lost in them.

Paper:   this project; the twin is feature-shift tuning (Min et al., NeurIPS 2023).
Needs:   clean images and labels; about ten of each class.
Departs: -
Cost:    three trainings of a few hundred steps, and three searches of four networks each.
Blind:   a backdoor that the twins keep as well; triggers that differ from image to image; warps; more than
         five classes, which the other checks compare with one another.
"""

from __future__ import annotations

from dataclasses import replace

from unbackdoor.engine.run import Run
from unbackdoor.engine.self_reference import MOST_CLASSES, TWINS, self_reference
from unbackdoor.engine.trigger_search import TriggerSearchConfig, success
from unbackdoor.engine.twin import USABLE, Twin
from unbackdoor.errors import UnsupportedModel
from unbackdoor.registry import Config, option, scanner
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport, Verdict, require_fit


class SelfReferenceConfig(Config):
    """Options of the scan."""

    twins: int = option(TWINS, "copies that learn the task anew", source="this project", ge=1)
    steps: int = option(
        48, "steps of each search for a change", source="this project: as neural_cleanse", ge=20
    )
    level: float = option(0.05, "largest p-value that counts", source="convention", gt=0, lt=1)


@scanner(
    "self_reference",
    config=SelfReferenceConfig,
    paper="this project",
    needs={"images", "labels"},
    question="Does a class need less of a change than in copies that learned the task anew?",
    most_classes=MOST_CLASSES,
    cost=50,
    quick={"twins": 1, "steps": 20},
)
def scan(model: Classifier, data: CleanData, cfg: SelfReferenceConfig, *, run: Run) -> ScanReport:
    """Compare each class with itself in the twins."""
    require_fit(model, data.fit)
    if model.classes > MOST_CLASSES:
        raise UnsupportedModel(
            "the check is for few classes, which cannot be compared with one another",
            expected=f"at most {MOST_CLASSES} classes",
            got=model.classes,
        )
    search = TriggerSearchConfig(steps=cfg.steps)
    found = self_reference(model, data, run, count=cfg.twins, search=search)
    if isinstance(found, Twin):
        reason = (
            f"a re-learned twin agrees on {found.agreement:.0%} of the held-out images only, and at least "
            f"{USABLE:.0%} are needed; more clean images help"
        )
        return ScanReport("undecided", skipped={"comparison with twins": reason})
    k = int(found.p_values.argmin())
    kind = min(found.differences, key=lambda kind: float(found.differences[kind][k]))
    values = found.differences[kind]
    form = "blend" if kind == "blend" else "patch"
    trigger = found.searches[form].triggers[k]
    rate = success(model, trigger, data.select, run)
    finding = Finding(
        statistic=f"what a class needs beside its twins ({kind})",
        value=float(values[k]),
        direction="small: a smaller change sends images to this class than in copies that learned it anew",
        threshold=cfg.level,
        threshold_source="p-value over patches, patterns and stamps, of the spread in clean networks, times "
        "the number of classes",
        p_value=found.p_value,
        classes=(k,),
        per_class=tuple(values.tolist()),
        trigger=replace(trigger, success=rate.value if rate.total else None),
        class_p_values=tuple(found.p_values.tolist()),
    )
    verdict: Verdict = "backdoor found" if found.p_value <= cfg.level else "no evidence found"
    return ScanReport(verdict, (finding,), coverage=("comparison with twins",))

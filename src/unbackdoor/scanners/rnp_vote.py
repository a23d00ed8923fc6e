"""Vote of the unlearned: the class that clean images fall to, whatever the network is unlearned on.

A backdoor survives unlearning, so that forgetful networks send clean images to its class. But so do clean
networks: they fall to one class as well, and often to the same one every time, because it is a property of
the network and not of the draws. Hence two questions with two answers:

1. Is there such a class? Each repeat names one winner; were there none, winners would be uniform. The exact
   probability of the largest count, times the number of depths (Bonferroni), must be at most alpha.
2. Do clean networks have one as strong? Only clean networks can tell. Their attractions are given as
   ``references``; the conformal p-value must be at most alpha, which takes at least 1/alpha - 1 of them.

Without an answer to the second, "undecided" is the most that is said. With references that are exchangeable
with the model if it is clean (architecture, data, training), "backdoor found" is wrong with probability
alpha at most.

Paper:   Li et al., ICML 2023, arXiv 2305.14876, backdoor-label detection; EBYD, arXiv 2410.19427.
Needs:   clean images and labels.
Departs: the papers read one network at one depth, and hold the variance of its votes against 0.01, which
         clean networks exceed.
Cost:    see engine/repeated_unlearning.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

from unbackdoor.engine.repeated_unlearning import REMAINING, Exposure, ExposureConfig, expose
from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.exact_tests import conformal, critical_count, crowding
from unbackdoor.engine.unlearned_inversion import ExposedTrigger, InversionConfig, invert_exposed
from unbackdoor.errors import InputError, MethodFailed
from unbackdoor.registry import References, option, scanner
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport, Verdict

STABILITY, ATTRACTION, RECOVERED = "share of repeats won", "attraction", "success of the recovered trigger"


class RNPVoteConfig(ExposureConfig):
    """Options of the vote."""

    alpha: float = option(0.05, "accepted probability of a false alarm", source="convention", gt=0, lt=1)
    references: tuple[float, ...] = option(
        (),
        "attractions of clean networks of the same kind, found with the same options",
        source="there is no default that fits all networks",
    )
    recover_trigger: bool = option(False, "also recover a trigger", source="off: it costs more")
    target: int = option(
        -1, "class to recover the trigger of; -1: the one with most votes", source="this project", ge=-1
    )


@scanner(
    "rnp_vote",
    config=RNPVoteConfig,
    paper="arXiv:2305.14876",
    needs={"images", "labels"},
    cost=50,
    quick={"repeats": 2, "batch_size": 32, "max_steps": 40, "unlearn_lr": 0.1},
    references=References(ATTRACTION, "references", frozenset({"alpha", "recover_trigger", "target"})),
)
def scan(model: Classifier, data: CleanData, cfg: RNPVoteConfig, *, run: Run) -> ScanReport:
    """Unlearn again and again, judge the winners of the votes, and show a trigger if asked for."""
    if cfg.target >= model.classes:
        raise InputError("there is no such class", expected=f"0..{model.classes - 1}", got=cfg.target)
    exposure = expose(model, data, cfg, run)
    report = weigh(exposure, cfg)
    if not cfg.recover_trigger:
        return report
    try:
        target = exposure.leader() if cfg.target < 0 else cfg.target
        exposed = invert_exposed(model, data, exposure, target, InversionConfig(), run)
    except MethodFailed as error:
        return replace(report, errors={"trigger recovery": str(error)})
    return replace(report, findings=(*report.findings, recovered(exposed)))


def weigh(exposure: Exposure, cfg: RNPVoteConfig) -> ScanReport:
    """Return the verdict over votes that were taken before, and the votes as further findings."""
    report = _judged(exposure, cfg)
    reported = () if cfg.references else (attraction(exposure, cfg),)  # what others may take as a reference
    return replace(report, findings=(*report.findings, *reported, *votes(exposure)))


def _judged(exposure: Exposure, cfg: RNPVoteConfig) -> ScanReport:
    skipped = {}
    if not exposure.held_out:
        skipped["held-out votes"] = "too few images to hold any out; the images voted that were unlearned"
    if exposure.failed:
        skipped["repeats"] = f"{len(exposure.failed)} of {len(exposure.networks)} ended early"
    stable = stability(exposure, cfg.alpha)
    findings = [stable]
    assert stable.p_value is not None
    if math.isinf(stable.threshold):
        skipped["stability"] = f"{len(exposure.networks)} repeats that agree cannot reach {cfg.alpha:g}"
        return ScanReport("undecided", tuple(findings), skipped=skipped, coverage=("votes",))
    if stable.p_value > cfg.alpha:
        return ScanReport("no evidence found", tuple(findings), skipped=skipped, coverage=("stability",))
    least = math.ceil(1 / cfg.alpha - 1e-9) - 1
    if not cfg.references:
        skipped["calibration"] = (
            f"no attractions of clean networks were given; at least {least} are needed, because clean "
            "networks are often drawn to one class as well"
        )
        return ScanReport("undecided", tuple(findings), skipped=skipped, coverage=("stability",))
    compared = attraction(exposure, cfg)
    assert compared.p_value is not None
    verdict: Verdict = "backdoor found" if compared.p_value <= cfg.alpha else "no evidence found"
    if len(cfg.references) < least:
        verdict = "undecided"
        skipped["calibration"] = f"{len(cfg.references)} references cannot reach {cfg.alpha:g}; give {least}"
    # The class of the verdict is the one that is stable and strongest; where the two differ, none is sure.
    if verdict == "backdoor found" and compared.classes != stable.classes:
        verdict = "undecided"
        skipped["agreement"] = "the class that wins most often is not the one with the most votes"
    findings.insert(0, compared)
    return ScanReport(verdict, tuple(findings), skipped=skipped, coverage=("stability", "attraction"))


def recovered(exposed: ExposedTrigger) -> Finding:
    """Return a recovered trigger as further evidence; no verdict rests on it."""
    trigger = exposed.trigger
    return Finding(
        statistic=RECOVERED,
        value=exposed.success.value if exposed.success.total else 0.0,
        direction="large: the pattern sends held-out images to this class in the model itself; clean nets "
        "have such patterns as well, with larger masks",
        threshold=math.inf,
        threshold_source="none: it is shown, not judged; made on an unlearned network that sent "
        f"{exposed.share_before:.1%} of the images there without it, and {exposed.fitted.value:.1%} of the "
        "others with it",
        classes=(trigger.label,),
        trigger=trigger,
    )


def stability(exposure: Exposure, alpha: float) -> Finding:
    """Return how often one class won, at the depth where that is least likely by chance."""
    winners = exposure.winners()  # (R, D)
    repeats, depths = winners.shape
    classes = exposure.shares.shape[2]
    counts = [winners[:, d][winners[:, d] >= 0].bincount(minlength=classes) for d in range(depths)]
    depth = max(range(depths), key=lambda d: int(counts[d].max()))  # the shallowest of equals
    most = int(counts[depth].max())
    needed = critical_count(repeats, classes, alpha / depths)
    return Finding(
        statistic=STABILITY,
        value=most / repeats,
        direction="large: unlearning sends clean images to this class whatever it is done on, as it does in "
        "networks with a backdoor and in many without",
        threshold=needed / repeats if needed is not None else math.inf,
        threshold_source=f"uniform winners, {depths} depths, alpha {alpha:g}; "
        f"best at {REMAINING[depth]:.0%} of the skill",
        p_value=min(1.0, depths * crowding(most, repeats, classes)),
        classes=(int(counts[depth].argmax()),),
        per_class=tuple((counts[depth] / repeats).tolist()),
    )


def votes(exposure: Exposure) -> list[Finding]:
    """Return, for each depth that was reached, the mean share of votes of every class."""
    out = []
    for shares, remaining in zip(exposure.shares.nanmean(0), REMAINING, strict=True):  # (K,)
        if not bool(shares.isnan().any()):
            depth = f"with {remaining:.0%} of the skill left" if remaining else "at the stop"
            out.append(
                Finding(
                    statistic=f"share of votes {depth}",
                    value=float(shares.max()),
                    direction="large: clean images of other classes go to this class",
                    threshold=math.inf,
                    threshold_source="none: it is shown, not judged",
                    classes=(int(shares.argmax()),),
                    per_class=tuple(shares.tolist()),
                )
            )
    return out


def attraction(exposure: Exposure, cfg: RNPVoteConfig) -> Finding:
    """Return the mean share of votes of the strongest class beside those of clean networks."""
    shares = exposure.attraction()  # (K,)
    value, references = float(shares.max()), sorted(cfg.references, reverse=True)
    allowed = math.floor(cfg.alpha * (len(references) + 1) + 1e-9) - 1  # references that may be as large
    return Finding(
        statistic=ATTRACTION,
        value=value,
        direction="large: more clean images of other classes go to this class than in clean networks",
        threshold=references[allowed] if allowed >= 0 else math.inf,
        threshold_source=f"{len(references)} clean networks, alpha {cfg.alpha:g}",
        p_value=conformal(value, references) if references else None,
        classes=(exposure.leader(),),
        per_class=tuple(shares.tolist()),
    )

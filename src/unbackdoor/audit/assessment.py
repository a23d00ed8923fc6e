"""What an audit came to: the result of each step, and the decision that follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unbackdoor.audit.cases import Case
from unbackdoor.audit.outcome import OutcomeVerdict
from unbackdoor.audit.purifying import Purification, Residue
from unbackdoor.audit.result import Result
from unbackdoor.audit.scanning import Audit
from unbackdoor.audit.steps import Step
from unbackdoor.audit.verification import Verification
from unbackdoor.metrics import Rate
from unbackdoor.opening.inspection import Inspection
from unbackdoor.result_views import Bars
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Verdict


@dataclass(frozen=True, repr=False)
class Assessment(Result):
    """What an audit found, did, and left out.

    Attributes:
        verdict: That of the scan; ``undecided`` where none was made.
        reasons: Sentences that explain it.
        steps: All steps in their order, with what came of each.
        inspection: What the file is; None of a model in memory.
        scan: The scan; None where only the plan was asked for.
        triggers: Triggers that were recovered or brought, towards suspected classes first.
        success: Success of each of them on the model as it is.
        purification: The repaired model with its proof; None where nothing was repaired.
        verification: The independent comparison of both models; None where there was none.
        accuracy: Clean accuracy of the model as it is, on all labelled images; None without labels.
        budget: Seconds that it was given; None without a limit.
        seconds: Wall time.
        cost: Seconds of one image's pass forward; None where the model was not opened.
        interrupted: True where Ctrl-C or SIGTERM ended it.
        planned_only: True where only the plan was asked for.
        case: The model and the images as the caller gave them.
        written: Files that were written so far.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    steps: tuple[Step, ...]
    inspection: Inspection | None = None
    scan: Audit | None = None
    triggers: tuple[RecoveredTrigger, ...] = ()
    success: tuple[Rate, ...] = ()
    purification: Purification | None = None
    verification: Verification | None = None
    accuracy: Rate | None = None
    budget: float | None = None
    seconds: float = 0.0
    cost: float | None = None
    interrupted: bool = False
    planned_only: bool = False
    case: Case | None = field(default=None, repr=False)
    written: dict[str, str] = field(default_factory=dict, compare=False)

    def headline(self) -> str:
        """Return the verdict and what became of the model in one line."""
        names = self.case.model.class_names if self.case is not None else ()
        named = [names[k] if k < len(names) else str(k) for k in self.classes[:3]]
        towards = f", towards {', '.join(named)}" if named else ""
        outcome = f"; {self.outcome}" if self.purification is not None else ""
        done, planned = self.checks_done
        return f"{self.verdict}{towards}{outcome}; {done} of {planned} checks ran, {self.seconds:.0f} s"

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each step."""
        return [
            {"step": s.name, "status": s.status, "seconds": s.seconds, "result": s.result} for s in self.steps
        ]

    def bars(self) -> Bars | None:
        """Return what the repair changed, else the statistic of the scan for each class."""
        if self.purification is not None:
            return self.purification.bars()
        return None if self.scan is None else self.scan.bars()

    @property
    def classes(self) -> tuple[int, ...]:
        """Suspected target classes, strongest evidence first."""
        return () if self.scan is None else self.scan.classes

    @property
    def partial(self) -> bool:
        """True where a planned check did not finish, so that finding nothing proves less."""
        return self.scan is None or self.scan.partial

    @property
    def checks_done(self) -> tuple[int, int]:
        """How many checks came to their end, and how many there were."""
        checks = () if self.scan is None else self.scan.checks
        return sum(c.status == "ran" for c in checks), len(checks)

    @property
    def residues(self) -> tuple[Residue, ...]:
        """What the triggers do before and after the repair."""
        if self.verification is not None:
            return self.verification.residues
        return () if self.purification is None else self.purification.residues

    @property
    def outcome(self) -> OutcomeVerdict | None:
        """What the repair achieved; None without one. The checks may still accuse what is called repaired."""
        if self.purification is None:
            return None
        verdict = self.purification.outcome.verdict
        accused = self.verification is not None and self.verification.after.verdict == "backdoor found"
        return "weakened" if verdict == "repaired" and accused else verdict

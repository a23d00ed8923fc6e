"""From a suspicious file to a decision: inspect, scan, recover the trigger, repair, verify, within a budget.

The plan comes first: a forward pass is timed, and every step gets an estimate. The checks run from the
cheapest to the dearest; one that cannot end within the time left is left out, and the verdict says so. Where
the passes over all images would take most of the time, the checks look at a draw of them. Once a
class is suspected its trigger is recovered next, and the time that a repair needs is kept back. A step that
fails or is cut short ends itself alone: what was found before it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from unbackdoor.audit import purifying, scanning, verification
from unbackdoor.audit.assessment import Assessment
from unbackdoor.audit.budget import BudgetSpent, end_of, watched, within_budget
from unbackdoor.audit.cases import Case, Data, Model, open_case, require_inputs
from unbackdoor.audit.checks import Check, plan_checks
from unbackdoor.audit.comparison import trigger_success
from unbackdoor.audit.cost import (
    FEWEST_RECOVERY_STEPS,
    LONGEST_JUDGING,
    MOST_RECOVERY_STEPS,
    RECOVERY_BATCH,
    Cost,
    measured,
)
from unbackdoor.audit.devices import resolved_device
from unbackdoor.audit.notebook import shown
from unbackdoor.audit.outcome import WORKS
from unbackdoor.audit.own_methods import defense_of
from unbackdoor.audit.purifying import Purification
from unbackdoor.audit.references import read_references
from unbackdoor.audit.scanning import LEVEL, Audit, Checked
from unbackdoor.audit.steps import Status, Step, Steps
from unbackdoor.audit.suspicion import read_suspicion
from unbackdoor.audit.trigger_files import read_triggers, require_trigger_files
from unbackdoor.audit.verbs import require_points
from unbackdoor.audit.verification import Verification
from unbackdoor.confinement import now
from unbackdoor.engine.inference import mode, predict
from unbackdoor.engine.precision import Policy
from unbackdoor.engine.run import Run
from unbackdoor.engine.unlearned_inversion import InversionConfig, invert
from unbackdoor.errors import InputError, UnbackdoorError
from unbackdoor.metrics import Rate, agreement
from unbackdoor.opening.inspection import Inspection, inspect
from unbackdoor.opening.write_back import stored_types
from unbackdoor.registry import Config, Part
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Augmentation, CleanData, Images, Progress, silent
from unbackdoor.weights.source import Source, open_source

T = TypeVar("T")
_SLACK = 1.5  # times the time left: an estimate beyond is no reason to begin
_REASON_BUDGET = "the budget was spent before it began"
_STATUS: dict[str, Status] = {"ran": "done", "failed": "failed", "interrupted": "interrupted"}  # of a check
_CHEAP_SHARE = 0.4  # of the time left, at most, for the passes of the cheap checks over the images
_MEASURED, _FEWEST_MEASURED = 0.03, 16  # share of the time left for one pass over images; images at least


@within_budget
def audit(
    model: Model,
    data: Data | None = None,
    method: str | Part[Any] | Callable[..., Any] | None = None,
    *,
    preset: str | None = None,
    method_options: Mapping[str, Any] | Config | None = None,
    max_accuracy_drop: float | None = None,
    promise: purifying.Rule = "evidence",
    triggers: Sequence[Path | str | RecoveredTrigger] | None = None,
    proof: Data | None = None,
    checks: Sequence[Check | str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    references: Sequence[Path] | None = None,
    level: float = LEVEL,
    budget: float | None = None,
    plan: bool = False,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    weights: str | None = None,
    output: str | None = None,
    clean: int | None = None,
    per_class: int | None = None,
    fraction: float | None = None,
    augmentation: Augmentation | None = None,
    data_root: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_damaged: bool = False,
    seed: int = 0,
    device: str = "auto",
    precision: Policy = "auto",
    progress: Progress = silent,
) -> Assessment:
    """Audit a model: inspect, scan, recover the suspect's trigger, repair, verify.

    Args:
        model: A file of weights, what :func:`unbackdoor.open_model` returned, or a classifier; only read.
        data: Clean images, as for :func:`unbackdoor.scan`; None leaves the checks that need none.
        method: Defense of the repair, as for :func:`unbackdoor.purify`. It is made where a backdoor is found,
            or a trigger that was brought works; None: ``auto``.
        preset: Named set of its options.
        method_options: Its options, laid over the preset.
        max_accuracy_drop: Largest loss of clean accuracy that is accepted, in points of 100.
        promise: See :func:`unbackdoor.purify`.
        triggers: Known triggers, their files, or pictures, as for :func:`unbackdoor.purify`.
        proof: Further images, for measuring the repair alone.
        checks: Which checks; None is all.
        options: For checks by name: options laid over those of the check.
        references: Records of scans of clean models of the same kind.
        level: Accepted probability that the scan accuses a clean model, in (0, 1).
        budget: Seconds, opening included; None is no limit.
        plan: Whether to stop when the plan is made.
        arch: See :func:`unbackdoor.open_model`, as for the six that follow; only for a file.
        mean: Per-channel mean.
        std: Per-channel deviation.
        size: (H, W) of the model's input.
        class_names: K names, in logit order.
        weights: Which of several sets of weights in the file, such as ``state_dict_ema``.
        output: Which of several outputs of an ONNX graph gives the logits.
        clean: Images to draw from a named data set, equally from all classes.
        per_class: Likewise: images of each class.
        fraction: Likewise: share of the images set aside for defenders, in (0, 1].
        augmentation: What may be done to an image without changing its class; None: what the named data set
            allows, else nothing.
        data_root: Folder that holds the data sets.
        image_column: Column of the images in a Parquet file; None: the first of a usual name.
        label_column: Column of the labels, likewise.
        skip_damaged: Whether images that cannot be decoded are left out and counted.
        seed: Seed of every draw.
        device: Where to compute; ``auto`` is CUDA, else MPS, else the CPU.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display.

    Returns:
        Verdict, steps, repaired model; ``save_report`` writes all of it into one folder.

    Raises:
        UnbackdoorError: If the model or the images cannot be used, or arguments contradict each other.

    Example:
        >>> done = unbackdoor.audit("model.pth", "images/", budget=600)  # doctest: +SKIP
        >>> done.verdict, done.outcome  # doctest: +SKIP
        ('backdoor found', 'repaired')
    """
    start, end = now(), end_of(budget)
    # What is wrong with the question is said before anything slow.
    part = defense_of(purifying.DEFAULT_METHOD if method is None else method)
    if not isinstance(method_options, Config):
        part.configure(method_options, preset=preset)
    planned = plan_checks([checks] if isinstance(checks, str) else checks, options)
    if max_accuracy_drop is not None:
        require_points(max_accuracy_drop)
    purifying.require_rule(promise)
    if not 0 < level < 1:
        raise InputError("the level does not fit", expected="a probability in (0, 1)", got=level)
    read_references(references or ())
    require_trigger_files(triggers)
    require_inputs(model, data, proof)
    device, progress = resolved_device(device), shown(progress)
    run = Run.create(seed=seed, device=device, policy=precision, progress=progress)

    steps = Steps(progress, end)
    steps.add(*_first_steps(model), *(Step(c.name, c.question) for c in planned), *_last_steps(part.name))
    source, inspection = _inspected(model, steps, progress)
    with steps.running("open"):
        case = open_case(
            source,
            data,
            run=run,
            arch=arch,
            mean=mean,
            std=std,
            size=size,
            class_names=class_names,
            weights=weights,
            output=output,
            clean=clean,
            per_class=per_class,
            fraction=fraction,
            augmentation=augmentation,
            data_root=data_root,
            image_column=image_column,
            label_column=label_column,
            skip_damaged=skip_damaged,
            proof=proof,
        )
        brought = read_triggers(triggers, case.model)
        cost = measured(case.model, case.images, run)
        steps.end("open", _opened(case, cost))
    if checks is None:
        everything, planned = planned, plan_checks(None, options, case.model.classes)
        steps.remove(*(c.name for c in everything if c not in planned))
    _estimate(steps, planned, cost, part)
    work = _Work(
        case,
        part,
        {
            "preset": preset,
            "options": method_options,
            "max_accuracy_drop": None if max_accuracy_drop is None else max_accuracy_drop / 100,
            "promise": promise,
        },
        {"seed": seed, "device": device, "precision": precision, "progress": progress},
        run,
        steps,
        cost,
        end,
        level,
        planned,
    )
    facts: dict[str, Any] = {
        "inspection": inspection, "budget": budget, "case": case, "cost": cost.seconds, "planned_only": plan,
    }  # fmt: skip
    if plan:
        return Assessment(
            "undecided", ("Only the plan was asked for.",), tuple(steps), seconds=now() - start, **facts
        )
    scan, interrupted = None, False
    try:
        work.brought = work.tried(brought)
        facts["accuracy"] = work.accuracy()
        looked_at = work.for_checks(case.split(seed))
        scan = scanning.scan(
            case.model,
            looked_at,
            reservations=case.reservations,
            checks=planned,
            references=references,
            level=level,
            thorough=True,  # a trigger is to be recovered, whatever has answered the question
            budget=None if end is None else max(end - now(), 0.0),
            observer=work,
            seed=seed,
            device=device,
            precision=precision,
            progress=progress,
        )
        scan = replace(scan, case=case)
        interrupted = scan.interrupted
        if not interrupted:
            work.finish(scan)
    except KeyboardInterrupt:
        interrupted = True
        scan = scan or replace(scanning.unscanned(case.model, planned, level, case.reservations), case=case)
    if interrupted:
        steps.leave_out("it was interrupted", status="interrupted")
    pairs = work.triggers(scan)
    return Assessment(
        scan.verdict,
        (*scan.reasons, *work.remarks),
        tuple(steps),
        scan=scan,
        triggers=tuple(trigger for trigger, _ in pairs),
        success=tuple(rate for _, rate in pairs),
        purification=work.purification,
        verification=work.verification,
        seconds=now() - start,
        interrupted=interrupted,
        **facts,
    )


def _first_steps(model: Model) -> list[Step]:
    steps = [Step("open", "Recognise the network, read the images, time a pass")]
    if isinstance(model, str | Path | Source):
        steps.insert(0, Step("inspect", "Is it safe to load, and what is in it?"))
    return steps


def _last_steps(method: str) -> list[Step]:
    return [
        Step("trigger", "Recover the trigger of the suspected class"),
        Step("repair", f"Repair a copy with {method}"),
        Step("verify", "Compare both models anew: triggers, accuracy, the checks that accused"),
    ]


def _inspected(model: Model, steps: Steps, progress: Progress) -> tuple[Model, Inspection | None]:
    if not isinstance(model, str | Path | Source):
        return model, None
    with steps.running("inspect"):
        source = open_source(model) if isinstance(model, str | Path) else model
        inspection = inspect(source, progress)
        steps.end("inspect", f"{inspection.format}, {inspection.loading}, {inspection.parameters:,} numbers")
    return source, inspection


def _opened(case: Case, cost: Cost) -> str:
    images = f"{cost.images} clean images" if cost.images else "no clean images"
    what = case.model.architecture or "a network"
    return f"{what}, {cost.classes} classes, {images}, {1000 * cost.seconds:.3g} ms an image"


def _estimate(steps: Steps, planned: Sequence[Check], cost: Cost, part: Part[Any]) -> None:
    estimates = {check.name: cost.of_check(check) for check in planned}
    estimates |= {"trigger": cost.recovery, "repair": cost.repair, "verify": cost.comparison}
    steps.add(*(replace(steps[name], estimate=seconds) for name, seconds in estimates.items()))
    if not cost.images:
        steps.leave_out("it needs clean images, and there are none", "trigger", "repair", "verify")


class _Work:
    """The work of one audit behind its scan, and the observer that chooses the checks."""

    def __init__(
        self,
        case: Case,
        part: Part[Any],
        repair_options: Mapping[str, Any],
        surroundings: Mapping[str, Any],
        run: Run,
        steps: Steps,
        cost: Cost,
        end: float | None,
        level: float,
        planned: Sequence[Check],
    ) -> None:
        self.case, self.part, self.run, self.steps, self.cost = case, part, run, steps, cost
        self.repair_options, self.surroundings = repair_options, surroundings
        self.deadline, self.level, self.planned = end, level, planned
        self.brought: list[tuple[RecoveredTrigger, Rate]] = []
        self.recovered: list[tuple[RecoveredTrigger, Rate]] = []
        self.scanned: list[tuple[RecoveredTrigger, Rate]] | None = None
        self.attempted: set[int] = set()
        self.checking = cost  # with the images that the checks look at
        self.remarks: list[str] = []
        self.purification: Purification | None = None
        self.verification: Verification | None = None
        images = case.images
        self.method_images, self.proof_images = images, images if case.proof is None else case.proof
        if case.proof is None and images is not None:
            self.method_images, self.proof_images, _ = purifying.split_proof(images, seed=run.seed)

    # -- time ---------------------------------------------------------------------------------------

    def left(self) -> float | None:
        """Return the seconds that are left; None without a budget."""
        return None if self.deadline is None else max(self.deadline - now(), 0.0)

    @property
    def _kept_back(self) -> float:
        """Seconds that a repair of what is suspected already will need."""
        if not (self.attempted or self.brought) or not self.cost.images:
            return 0.0
        return self.cost.repair + self.cost.comparison

    # -- the observer of the scan -------------------------------------------------------------------

    def for_checks(self, data: CleanData | None) -> CleanData | None:
        """Return the images for the checks: all, or as many as the cheap ones pass over in good time."""
        left = self.left()
        if data is None or left is None or not len(data):
            return data
        whole, room = len(data), max(left - self._kept_back, 0.0)
        wanted = replace(self.cost, images=whole).images_within(_CHEAP_SHARE * room, self.planned)
        if wanted >= whole:
            return data
        draws = self.run.generator("images for the checks")

        def some(images: Images) -> Images:
            count = max(1, wanted * len(images) // whole)
            return images.subset(torch.randperm(len(images), generator=draws)[:count].sort().values)

        fit = some(data.fit)
        drawn = replace(data, fit=fit, select=fit if data.select_is_fit else some(data.select))
        self.checking = replace(self.cost, images=len(drawn))
        self.remarks.append(
            f"The checks looked at {len(drawn)} of the {whole} images, because a pass over all of them "
            f"takes about {_about(whole * self.cost.seconds)}; with more time they look at more."
        )
        self.steps.add(
            *(
                replace(self.steps[check.name], estimate=self.checking.of_check(check))
                for check in self.planned
                if self.steps[check.name].status == "to come"
            )
        )
        return drawn

    def begin(self, check: Check) -> str:
        """Leave a check out that cannot end within the time left."""
        left, estimate = self.left(), self.checking.of_check(check)
        if left is not None and estimate > _SLACK * max(left - self._kept_back, 0.0):
            reason = _REASON_BUDGET
            if left > 1:
                kept = " beside the repair" if self._kept_back else ""
                reason = f"it takes about {_about(estimate)}, and {_about(left)} were left{kept}"
            self.steps.leave_out(reason, check.name)
            return reason
        self.steps.begin(check.name)
        return ""

    def end(self, done: Sequence[Checked]) -> None:
        """Note a check, and recover the trigger of its suspect next."""
        last = done[-1]
        if self.steps[last.check.name].status != "left out":
            status = _STATUS.get(last.status, "left out")
            self.steps.end(last.check.name, _result(last, self.case), status, last.seconds)
        p_value = 1.0 if last.p_value is None else last.p_value * len(self.planned)
        if p_value <= self.level and len(last.classes) == 1:
            self.recover(last.classes[0], last.check.name)

    # -- triggers -----------------------------------------------------------------------------------

    def tried(self, triggers: Iterable[RecoveredTrigger]) -> list[tuple[RecoveredTrigger, Rate]]:
        """Return triggers with their success on the model as it is, on as many images as time allows."""
        images = None if self.proof_images is None else self._affordable(self.proof_images)
        out = []
        for trigger in triggers:
            rate = Rate(0, 0)
            if images is not None:
                with suppress(BudgetSpent), self._limited():
                    rate = trigger_success(self.case.model, images, trigger, self.run)
            out.append((trigger, rate))
        return out

    def accuracy(self) -> Rate | None:
        """Return the clean accuracy of the model as it is, likewise; None without labels."""
        if self.case.images is None or self.case.images.labels is None:
            return None
        images = self._affordable(self.case.images)
        with suppress(BudgetSpent), self._limited():
            return agreement(self._answers(images), images.truth.cpu())
        return None

    def _affordable(self, images: Images) -> Images:
        """Return the images, or a draw of them whose pass takes no more than a share of the time left."""
        left = self.left()
        most = len(images) if left is None else int(_MEASURED * left / max(self.cost.seconds, 1e-9))
        if most >= len(images):
            return images
        order = torch.randperm(len(images), generator=self.run.generator("measured images"))
        return images.subset(order[: max(most, _FEWEST_MEASURED)])

    def _answers(self, images: Images) -> Tensor:
        """Return the class (N,) that the model gives to each image."""
        device = self.case.model.mean.device
        try:
            with mode(self.case.model, training=False):
                return predict(self.case.model.to(self.run.device), images, self.run).argmax(1)
        finally:
            self.case.model.to(device)

    def recover(self, label: int, check: str) -> None:
        """Recover the trigger of a suspected class, unless that was tried already."""
        images = self.method_images
        if label in self.attempted or images is None or not len(images):
            return
        self.attempted.add(label)
        name = "trigger" if len(self.attempted) == 1 else f"trigger {len(self.attempted)}"
        step = Step(name, f"Recover the trigger towards {_named(label, self.case)}", self.cost.recovery)
        self.steps.insert(step, after=check if check in {step.name for step in self.steps} else "trigger")
        wanted = MOST_RECOVERY_STEPS
        left = self.left()
        if left is not None:
            share = max(left - self._kept_back, 0.4 * left) / max(self.cost.recovery, 1e-9)
            wanted = min(wanted, int(MOST_RECOVERY_STEPS * share))
        if wanted < FEWEST_RECOVERY_STEPS:
            shortest = _about(self.cost.shortest_recovery)
            self.steps.leave_out(f"it takes {shortest} or more, and {_about(left or 0)} were left", name)
            return
        self.steps.begin(name)
        cfg = InversionConfig(steps=wanted, batch_size=RECOVERY_BATCH)
        try:
            labelled = self._labelled(images)
            with self._limited():
                device = self.case.model.mean.device
                try:
                    found = invert(self.case.model.to(self.run.device), labelled, [label], cfg, self.run)
                finally:
                    self.case.model.to(device)
        except BudgetSpent:
            self.steps.end(name, "the budget was spent while it ran", "left out")
            return
        except (UnbackdoorError, RuntimeError, MemoryError) as error:
            self.steps.end(name, str(error), "failed")
            return
        ((trigger, _),) = found
        ((_, rate),) = self.tried([trigger])
        trigger = replace(trigger, check=f"inversion towards the suspect of {check}", success=rate.value)
        self.recovered.append((trigger, rate))
        self.steps.end(
            name, f"towards {_named(label, self.case)}: turns {rate.value:.0%} of {rate.total} images"
        )

    def _labelled(self, images: Images) -> Images:
        """Return the images with labels: without any, what the model says of each."""
        return images if images.labels is not None else replace(images, labels=self._answers(images))

    def _limited(self) -> Any:
        return watched(self.deadline)

    def triggers(self, scan: Audit) -> list[tuple[RecoveredTrigger, Rate]]:
        """Return all triggers with their success: those that work towards suspects first."""
        if self.scanned is None:
            self.scanned = self.tried(scan.triggers)
        ranked = [*self.brought, *self.recovered, *self.scanned]

        def order(pair: tuple[RecoveredTrigger, Rate]) -> tuple[bool, bool]:
            trigger, rate = pair
            return trigger.label not in scan.classes, not (rate.total and rate.value > WORKS)

        return sorted(ranked, key=order)

    # -- what follows the scan ----------------------------------------------------------------------

    def finish(self, scan: Audit) -> None:
        """Recover what is missing, repair, verify."""
        for label in scan.classes[:1]:
            if not any(trigger.label == label for trigger, _ in self.recovered):
                self.recover(label, scan.noticed[0].checks[0] if scan.noticed else "the scan")
        self.steps.leave_out("no class is suspected", "trigger")
        working = [t for t, rate in self.brought if rate.total and rate.value > WORKS]
        if scan.verdict != "backdoor found" and not working:
            self.steps.leave_out("there is no evidence of a backdoor to remove", "repair", "verify")
            return
        self.repair(scan)
        if self.purification is not None and not _refused(self.purification):
            self.verify(scan)
        else:
            self.steps.leave_out("there is no repaired model", "verify")

    def repair(self, scan: Audit) -> None:
        """Repair a copy of the model."""
        images, name = self.method_images, "repair"
        left = self.left()
        if images is None or not len(images):
            return
        if images.labels is None and "labels" in self.part.needs:
            self.steps.leave_out(f"{self.part.name} needs labelled images, and these have no labels", name)
            return
        if left is not None and left <= 1:
            self.steps.leave_out(_REASON_BUDGET, name)
            return
        opened = self.case.opened
        known = self._leads()
        self.steps.begin(name)
        try:
            with self._limited():
                self.purification = purifying.purify(
                    self.case.model,
                    images,
                    self.part,
                    triggers=known,
                    suspicion=read_suspicion(scan, self.case.model),
                    proof=self.proof_images,
                    search_budget=None if left is None else min(LONGEST_JUDGING, left / 2),
                    types=stored_types(opened) if opened is not None else None,
                    augmentation=self.case.augmentation,
                    **self.repair_options,
                    **self.surroundings,
                )
        except purifying.PromiseBroken as error:
            self.purification = replace(error.refused, case=self.case)
            self.steps.end(name, str(error), "failed")
            return
        except UnbackdoorError as error:
            spent = self.left() == 0.0
            words = "the budget was spent while it ran" if spent else str(error)
            self.steps.end(name, words, "left out" if spent else "failed")
            return
        self.purification = replace(self.purification, case=self.case)
        self.steps.end(name, _repaired(self.purification))

    def _leads(self) -> tuple[RecoveredTrigger, ...]:
        """Return the triggers beside those of the scan: those brought, and recovered ones that work."""
        recovered = [t for t, rate in self.recovered if not rate.total or rate.value >= WORKS]
        return (*(t for t, _ in self.brought), *recovered)

    def verify(self, scan: Audit) -> None:
        """Compare the repaired model with the original anew."""
        assert self.purification is not None and self.case.images is not None
        name, left = "verify", self.left()
        if left is not None and left <= 1:
            self.steps.leave_out(_REASON_BUDGET, name)
            return
        self.steps.begin(name)
        known = self._leads()
        try:
            with self._limited():
                done = verification.verify(
                    self.case.model,
                    self.purification.model,
                    self.case.images,
                    triggers=known,
                    reservations=(self.case.reservations, ()),
                    scanned=scan,
                    proof=self.proof_images,
                    level=self.level,
                    budget=left,
                    **self.surroundings,
                )
        except (UnbackdoorError, RuntimeError, MemoryError) as error:
            spent = self.left() == 0.0
            words = "the budget was spent while it ran" if spent else str(error)
            self.steps.end(name, words, "left out" if spent else "failed")
            return
        repaired = Case(self.purification.model, self.case.images)
        self.verification = replace(done, cases=(self.case, repaired))
        self.steps.end(name, f"the checks that accused it say: {done.after.verdict}")


def _named(label: int, case: Case) -> str:
    name = case.model.class_names[label][:60]
    return f"class {label}" if name == str(label) else f"{name} (class {label})"


def _result(checked: Checked, case: Case) -> str:
    if checked.report is None:
        return checked.reason
    p = "" if checked.p_value is None else f", p = {checked.p_value:.2g}"
    suspects = ", ".join(_named(k, case) for k in checked.classes[:3])
    return checked.report.verdict + p + (f", strongest: {suspects}" if suspects and p else "")


def _refused(done: Purification) -> bool:
    return done.promise is not None and done.promise.refused


def _repaired(done: Purification) -> str:
    said = f"{done.outcome.verdict}; {len(done.changes)} tensors changed"
    if done.accuracy is None:
        return said
    then, later = done.accuracy.before.value, done.accuracy.after.value
    return f"{said}, clean accuracy {then:.1%} to {later:.1%}"


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"

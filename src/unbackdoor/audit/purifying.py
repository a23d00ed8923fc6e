"""Repair a model and measure the repair: what changed, what it cost, and what is left of the trigger.

The method does not get all images: on the others the accuracy before and after is measured, and a repair that
breaks the promise about it is refused. Without the attacker's trigger, only the success rate of the
*recovered* trigger can be measured; it does not bound that of the attacker's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from unbackdoor.audit.cases import Case
from unbackdoor.audit.comparison import (
    Accuracy,
    TensorChange,
    changed_tensors,
    compare_accuracy,
    paired_interval,
    trigger_success,
)
from unbackdoor.audit.outcome import Evidence, Outcome, Searched, conclude, search_anew
from unbackdoor.audit.result import Result
from unbackdoor.engine import trusted_caller
from unbackdoor.engine.precision import Policy
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, UnbackdoorError
from unbackdoor.files import writing
from unbackdoor.metrics import Rate
from unbackdoor.opening.provenance import key_in_words
from unbackdoor.opening.write_back import output_name, repair_patch, write_repaired
from unbackdoor.registry import DEFENSES, SUSPICION, Config, Part
from unbackdoor.result_views import Bars
from unbackdoor.triggers import RecoveredTrigger, Suspicion
from unbackdoor.types import (
    Augmentation,
    Classifier,
    CleanData,
    Images,
    Progress,
    Purified,
    as_images,
    require_classifier,
    silent,
)
from unbackdoor.weights.patch import write_patch

DEFAULT_METHOD = "auto"  # of the command and of unbackdoor.purify
PROOF_FRACTION = 0.3  # of every class, for the proof
FEWEST_FOR_PROOF = 4  # images a class; with fewer, all go to the method and the proof is marked


_MOST_REMARKS, _LONGEST_REMARK = 20, 500  # remarks and characters: a method may be of anybody
MAX_NAMED = 10  # classes that a sentence lists
SEEN_IN_TRAINING = 0.995  # accuracy from which images look like those that the model was trained on
Rule = Literal["evidence", "strict"]
LossBias = Literal["fair", "flattered", "pessimistic", "unknown"]
UNJUDGED = Outcome("undecided", ("It was not judged.",))


class PromiseBroken(UnbackdoorError):
    """The repair lost more accuracy than was allowed, or cannot be shown not to.

    Attributes:
        refused: What was measured. Its record and its report can be written, and the model cannot.
    """

    refused: Purification


@dataclass(frozen=True)
class Promise:
    """The promise of a largest loss of accuracy, and what was measured on clean images.

    All losses are fractions, so that 0.04 is 4 points.

    Attributes:
        asked: Largest loss that is accepted.
        measured: Loss on the images of the proof.
        low: Lower end of its 95 % interval.
        high: Upper end.
        images: Number of these images.
        rule: ``evidence`` refuses a repair where the interval lies above ``asked``; ``strict`` refuses it
            unless the interval lies below.
    """

    asked: float
    measured: float
    low: float
    high: float
    images: int
    rule: Rule = "evidence"

    @property
    def kept(self) -> bool | Literal["cannot be told"]:
        """True or False where the 95 % interval decides it."""
        if self.high <= self.asked:
            return True
        return False if self.low > self.asked else "cannot be told"

    @property
    def refused(self) -> bool:
        """Whether the repair is thrown away."""
        return self.kept is not True if self.rule == "strict" else self.kept is False

    @property
    def points_per_image(self) -> float:
        """Points of accuracy that one image is worth."""
        return 100 / self.images

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON; all losses are fractions."""
        return {
            "asked": self.asked,
            "measured": self.measured,
            "low": self.low,
            "high": self.high,
            "images": self.images,
            "points_per_image": self.points_per_image,
            "rule": self.rule,
            "kept": self.kept,
        }

    def in_words(self) -> str:
        """Return the answer as a sentence."""
        answer = "cannot be told from so few images"
        if isinstance(self.kept, bool):
            answer = "is kept" if self.kept else "is broken"
        return (
            f"The promise of at most {100 * self.asked:.1f} points {answer}: {100 * self.measured:.1f} "
            f"points were lost (95 % interval {100 * self.low:.1f} to {100 * self.high:.1f}) on "
            f"{self.images} images, each of which is worth {self.points_per_image:.2g} points."
        )


@dataclass(frozen=True)
class Residue:
    """The success of a recovered trigger on the model before and after the repair.

    Attributes:
        trigger: The trigger.
        before: Its success on the original, where possible on images that were not used to recover it.
        after: Its success on the repaired model.
    """

    trigger: RecoveredTrigger
    before: Rate
    after: Rate

    @property
    def held_out(self) -> Rate:
        """Success before, on images that the trigger was not made from where that was measured."""
        success = self.trigger.success
        if success is None or success >= self.before.value:
            return self.before
        return Rate(round(success * self.before.total), self.before.total)


@dataclass(frozen=True, repr=False)
class Purification(Result):
    """A repaired model with the proof of what was changed.

    Attributes:
        model: The repaired classifier.
        purified: What the method returned.
        accuracy: Clean accuracy before and after; None without labels.
        proof_is_fit: True where the method got all images, so that the measured accuracy is too high.
        changes: What differs in the weights.
        residues: Success of the known triggers before and after.
        facts: JSON-ready: hashes and numbers of images.
        promise: The promise with its measurement; None where none was made.
        suspicion: What was suspected before; empty where a scan named no class, None without any.
        led: Whether the method began with that; some methods cannot.
        outcome: What was achieved, as far as can be known.
        case: The original and the images as the caller gave them.
        written: Files that were written so far: ``model``, ``card`` and ``patch``.
    """

    model: Classifier
    purified: Purified
    accuracy: Accuracy | None
    proof_is_fit: bool
    changes: tuple[TensorChange, ...]
    residues: tuple[Residue, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    promise: Promise | None = None
    suspicion: Suspicion | None = None
    led: bool = False
    outcome: Outcome = UNJUDGED
    case: Case | None = field(default=None, repr=False)
    written: dict[str, str] = field(default_factory=dict, compare=False)

    def headline(self) -> str:
        """Return what was done in one line."""
        name = self.purified.method.get("name", "a method")
        accuracy = ""
        if self.accuracy is not None:
            accuracy = f", clean accuracy {self.accuracy.before.value:.1%} to {self.accuracy.after.value:.1%}"
        entries = sum(c.changed for c in self.changes)
        return f"{name}{accuracy}; {entries:,} numbers changed in {len(self.changes)} tensors"

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each tensor that was changed."""
        return change_rows(self.changes)

    def bars(self) -> Bars | None:
        """Return clean accuracy, and the success of recovered triggers, before and after."""
        return before_and_after(self.accuracy, self.residues)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the method has to say of its repair, as sentences, and how it used what was suspected."""
        own = self.purified.evidence.get("remarks", ())
        own = own if isinstance(own, list | tuple) else ()
        return (*self._of_the_suspicion(), *(str(text)[:_LONGEST_REMARK] for text in own[:_MOST_REMARKS]))

    def _of_the_suspicion(self) -> tuple[str, ...]:
        suspicion = self.suspicion
        if suspicion is None:
            return ()
        if not suspicion.classes:
            return ("The scan came to no finding, so that the method had nothing to begin with.",)
        named = ", ".join(map(str, suspicion.classes[:MAX_NAMED]))
        if len(suspicion.classes) > MAX_NAMED:
            named += f" and {len(suspicion.classes) - MAX_NAMED} more"
        triggers = f" and {len(suspicion.triggers)} recovered triggers" if suspicion.triggers else ""
        name = self.purified.method.get("name", "")
        how = "began with" if self.led else "cannot use what was suspected, and began anew without"
        return (f"The method {name} {how} class {named}{triggers}.",)

    @property
    def flattered(self) -> tuple[str, ...]:
        """Reasons why the measured accuracies may be higher than on new images."""
        out = []
        if self.proof_is_fit:
            out.append("the method saw the images that its repair is measured on")
        if self.case is not None and self.case.proof_of_training_part:
            out.append(
                f"the images are of the training part of {self.case.data_set}, which a model that somebody "
                "else trained has most likely seen"
            )
        if self.accuracy is not None and self.accuracy.before.value >= SEEN_IN_TRAINING:
            right = f"{self.accuracy.before.hits} of {self.accuracy.before.total}"
            out.append(
                f"the original has {right} images right, as a model has of those that it was trained on"
            )
        return tuple(out)

    @property
    def seen_in_training(self) -> bool:
        """Whether the images of the proof look like some that the original was trained on."""
        of_training_part = self.case is not None and self.case.proof_of_training_part
        accuracy = self.accuracy
        return of_training_part or (accuracy is not None and accuracy.before.value >= SEEN_IN_TRAINING)

    @property
    def loss_bias(self) -> LossBias:
        """How the measured loss of accuracy relates to the loss on new images.

        It is ``pessimistic`` where the original has seen the images, and so has more of them right than it
        would have of new ones; ``flattered`` where the method has; ``unknown`` where both have.
        """
        if self.proof_is_fit:
            return "unknown" if self.seen_in_training else "flattered"
        return "pessimistic" if self.seen_in_training else "fair"

    @property
    def left_behind(self) -> tuple[str, ...]:
        """What the file of the original holds and the repaired one will not, as sentences without an end."""
        opened = self.case.opened if self.case is not None else None
        if opened is None:
            return ()
        in_file, out = opened.provenance.in_file, []
        if in_file.other_weights:
            keys = ", ".join(map(key_in_words, in_file.other_weights))
            out.append(
                f"the further weights of the file ({keys}) were not repaired and are not in what is written"
            )
        if in_file.other_tensors:
            keys = ", ".join(map(key_in_words, in_file.other_tensors[:10]))
            out.append(f"the further tensors of the file ({keys}) are not in what is written")
        if in_file.dequantised:
            out.append(
                f"the whole numbers of {len(in_file.dequantised)} quantised tensors, and their scales, are "
                "not in what is written: it holds floating point, under names as before quantisation"
            )
        if in_file.program and not in_file.examined:
            out.append("the file's own program was not examined and is not in what is written")
        return tuple(out)

    def save(self, path: Path | str, *, force: bool = False) -> Path:
        """Write the repaired model under the names and number types of its owner; floats if it is quantised.

        Args:
            path: The suffix decides: ``.safetensors`` with a card of this package; ``.pt``, ``.pth``,
                ``.th``, ``.tar``, ``.ckpt`` or ``.bin`` as the original was; ``.onnx`` where the original is
                ONNX. Without one, it is ONNX for an ONNX graph, else safetensors. What is no card is a
                record beside it.
            force: Whether files that exist may be replaced; the original never is.

        Returns:
            The file that was written.

        Raises:
            InputError: If the file exists, or the model cannot be written as that.
            IntegrityError: If the file of the original has changed since it was opened.
            PromiseBroken: If the repair was refused.
        """
        self._require_kept()
        opened = self.case.opened if self.case is not None else None
        out = output_name(Path(path), opened)
        card = out.with_suffix(".json")
        written = {"model": str(out), "card": str(card)}
        record = {**self.to_dict(), **written}
        step = {
            "step": "purified",
            "of": self.facts["before_sha256"],
            "method": dict(self.purified.method),
            **{
                key: record[key]
                for key in ("seconds", "accuracy", "images_for_the_method", "images_for_the_proof")
            },
            "changed_tensors": len(self.changes),
            "changed_entries": self.facts["changed_entries"],
            "residual_triggers": record["residual_triggers"],
        }
        with writing((out, card), force=force, inputs=self._inputs()):
            write_repaired(out, self.model, opened, step=step, record=record)
        self.written.update(written)
        return out

    def save_patch(self, path: Path | str, *, force: bool = False) -> Path:
        """Write the repair as a patch that applies to the file of the original, and can be reverted.

        Raises:
            InputError: If the model is of no file, the repair changed more than values, or the file exists.
            IntegrityError: If the file of the original has changed since it was opened.
            PromiseBroken: If the repair was refused.
        """
        self._require_kept()
        out = Path(path)
        opened = self.case.opened if self.case is not None else None
        if opened is None or opened.source is None:
            raise InputError("a patch belongs to a file, and the model is of none")
        with writing((out,), force=force, inputs=self._inputs()):
            opened.source.require_unchanged()
            facts = {"method": dict(self.purified.method), "source": opened.source.path.name}
            write_patch(out, repair_patch(self.model, opened, facts))
        self.written["patch"] = str(out)
        return out

    def _require_kept(self) -> None:
        if self.promise is not None and self.promise.refused:
            raise broken(self)

    def _inputs(self) -> list[Path]:
        source = self.case.source if self.case is not None else None
        return [] if source is None else [file.path for file in source.files]


def change_rows(changes: Sequence[TensorChange]) -> list[dict[str, Any]]:
    """Return what changed in each tensor as rows of a table."""
    return [
        {
            "tensor": c.name,
            "changed": c.changed,
            "entries": c.entries,
            "channels": c.channels,
            "of_channels": c.of_channels,
            "relative": c.relative,
        }
        for c in changes
    ]


def before_and_after(accuracy: Accuracy | None, residues: Sequence[Residue]) -> Bars | None:
    """Return rates of two models beside each other, for a chart."""
    pairs = [] if accuracy is None else [("clean accuracy", accuracy.before, accuracy.after)]
    pairs += [(f"trigger to {r.trigger.label}", r.before, r.after) for r in residues]
    shown = [(f"{name}, {when}", r.value) for name, *rates in pairs
             for when, r in zip(("before", "after"), rates, strict=True) if r.total]  # fmt: skip
    if not shown:
        return None
    after = [i for i, (name, _) in enumerate(shown) if name.endswith("after")]
    return Bars(
        "before and after", [n for n, _ in shown], [v for _, v in shown], "share of images", None, after
    )


def broken(refused: Purification) -> PromiseBroken:
    """Return the error of a promise that was not kept."""
    promise = refused.promise
    assert promise is not None
    error = PromiseBroken(
        "the repaired model loses more accuracy than was allowed, so it was thrown away"
        if promise.kept is False
        else "whether the repaired model keeps the promise cannot be told, so it was thrown away",
        expected=f"at most {100 * promise.asked:.1f} points less",
        got=promise.in_words().rstrip("."),
        remedy="Allow more, give more images, or choose a milder method or preset",
    )
    error.refused = refused
    return error


def split_proof(
    images: Images, *, fraction: float = PROOF_FRACTION, seed: int = 0
) -> tuple[Images, Images, bool]:
    """Return the images for the method, those for the proof, and whether the two are the same.

    Every class gives the same share. Where the mean class has fewer than four images nothing is kept back.
    """
    if not 0 < fraction < 1:
        raise InputError("the share does not fit", expected="a number in (0, 1)", got=fraction)
    classes = len(images.truth.unique()) if images.labels is not None else 1
    if not len(images) or len(images) < FEWEST_FOR_PROOF * classes:
        return images, images, True
    parts = CleanData.split(images, select_fraction=fraction, seed=seed)
    return parts.fit, parts.select, parts.select_is_fit


def purify(
    model: Classifier,
    images: Images | CleanData,
    method: str | Part[Any],
    *,
    preset: str | None = None,
    options: Mapping[str, Any] | Config | None = None,
    max_accuracy_drop: float | None = None,
    promise: Rule = "evidence",
    triggers: tuple[RecoveredTrigger, ...] = (),
    suspicion: Suspicion | None = None,
    proof: Images | CleanData | None = None,
    types: Mapping[str, torch.dtype] | None = None,
    search_budget: float | None = None,
    select_fraction: float = 0.3,
    augmentation: Augmentation = "none",
    seed: int = 0,
    device: str = "cpu",
    precision: Policy = "auto",
    progress: Progress = silent,
) -> Purification:
    """Repair a model with a method and measure what a defender can.

    Args:
        model: The suspicious classifier; never changed.
        images: Clean images; labels are needed by most methods, and no image by some. They are split inside:
            the parts of clean data are joined, and its augmentation holds where none is given.
        method: Registered defense, or a part.
        preset: Named set of its options.
        options: Options laid over the preset.
        max_accuracy_drop: Largest loss of clean accuracy that is accepted, a fraction in 0..1; None accepts
            any.
        promise: ``evidence`` refuses the repair where the 95 % interval of the loss lies above that;
            ``strict`` refuses it unless the interval lies below.
        triggers: Recovered triggers, such as those of a scan: a method that can begins with them, and their
            success is measured before and after.
        suspicion: What a scan suspects; it comes after the triggers, and its own are treated likewise.
        proof: Images for the proof; None keeps a part of ``images`` back, where there are enough.
        types: Types that tensors of the network will be stored in, by name: they are rounded to these before
            anything is measured, so that what is measured is what is stored.
        search_budget: Seconds for the searches that judge the repair; None: four minutes.
        select_fraction: Share of the method's images that it only chooses thresholds on.
        augmentation: What may be done to an image without changing its class.
        seed: Seed of every draw.
        device: Where to compute.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display.

    Raises:
        PromiseBroken: If the promise is broken; under ``strict`` also where it cannot be told. Its attribute
            ``refused`` is what was measured.
        InputError: If there are too few images for a strict promise, or none with labels.
        UnbackdoorError: See :func:`unbackdoor.run`.
    """
    require_classifier(model)
    if isinstance(images, CleanData) and augmentation == "none":
        augmentation = images.augmentation
    images = as_images(images)
    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop <= 1:
        raise InputError(
            "the largest drop does not fit",
            expected="a fraction in 0..1, so that 0.04 is 4 points",
            got=max_accuracy_drop,
        )
    require_rule(promise)
    if proof is None:
        method_images, proof_images, same = split_proof(images, seed=seed)
    else:
        method_images, proof_images = images, as_images(proof, what="the images for the proof")
        # Compared by content, because a file that is read twice gives two sets.
        same = proof_images is method_images or proof_images.fingerprint() == method_images.fingerprint()
    if max_accuracy_drop is not None and proof_images.labels is None:
        raise InputError("a promise about accuracy needs labelled images", got="no labels", where=images.name)
    if max_accuracy_drop is not None and promise == "strict":
        _require_enough(len(proof_images), max_accuracy_drop)
    part = DEFENSES[method] if isinstance(method, str) else method
    if len(method_images) or "images" in part.needs:  # which refuses an empty set
        data = CleanData.split(
            method_images, select_fraction=select_fraction, augmentation=augmentation, seed=seed
        )
    else:
        data = CleanData.empty(model.input_shape, model.class_names)
    part = DEFENSES[method] if isinstance(method, str) else method
    if triggers or suspicion is not None:
        suspicion = Suspicion.of_triggers(triggers).joined(suspicion or Suspicion())
    purified = trusted_caller.run(
        part,
        model,
        data,
        options=options,
        preset=preset,
        seed=seed,
        device=device,
        precision=precision,
        progress=progress,
        suspicion=suspicion,
    )
    _round(purified.model, types or {})
    run = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    accuracy = compare_accuracy(model, purified.model, proof_images, run)
    answer = None
    if max_accuracy_drop is not None:
        assert accuracy is not None  # labels were asked for above
        answer = Promise(
            max_accuracy_drop, accuracy.drop, *accuracy.drop_interval, accuracy.before.total, promise
        )
    residues = tuple(
        Residue(
            trigger,
            trigger_success(model, proof_images, trigger, run),
            trigger_success(purified.model, proof_images, trigger, run),
        )
        for trigger in (suspicion.triggers if suspicion is not None else ())
    )
    before, after = model.network.state_dict(), purified.model.network.state_dict()
    changes = tuple(changed_tensors(before, after))
    if answer is not None and answer.refused:
        outcome = Outcome("not repaired", ("The repaired model was thrown away, as the promise asks.",))
    else:
        targets = repaired_classes(purified.evidence, model.classes)
        suspected = tuple(dict.fromkeys((*(() if suspicion is None else suspicion.classes), *targets)))
        searches: tuple[Searched, ...] = ()
        if changes:
            searches = search_anew(
                model,
                purified.model,
                CleanData(
                    method_images if len(method_images) else proof_images,
                    proof_images,
                    augmentation,
                    select_is_fit=same or not len(method_images),
                ),
                suspected,
                run,
                seconds=search_budget,
            )
        outcome = conclude(
            Evidence(
                bool(changes),
                searches,
                tuple((r.trigger.label, r.held_out, r.after) for r in residues),
                _shares(purified.evidence.get("held_out_success")),
                accuracy,
                suspected,
            )
        )
    done = Purification(
        purified.model,
        purified,
        accuracy,
        same,
        changes,
        residues,
        {
            "before_sha256": model.sha256(),
            "after_sha256": purified.model.sha256(),
            "images_for_the_method": len(method_images),
            "images_for_the_proof": len(proof_images),
            "images_sha256": images.fingerprint(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "changed_entries": int(
                sum(int((before[n] != after[n]).sum()) for n in before if before[n].dtype.is_floating_point)
            ),
            "torch": torch.__version__,
        },
        answer,
        suspicion,
        led=suspicion is not None and bool(suspicion.classes) and SUSPICION in part.traits,
        outcome=outcome,
    )
    if answer is not None and answer.refused:
        raise broken(done)
    return done


def repaired_classes(evidence: Mapping[str, Any], classes: int) -> tuple[int, ...]:
    """Return the classes that a method says it acted on (``targets`` or ``target``); it may be of anybody."""
    named = evidence.get("targets", evidence.get("target"))
    listed = named if isinstance(named, list | tuple) else [named]
    return tuple(k for k in listed if type(k) is int and 0 <= k < classes)


def _shares(values: object) -> tuple[float, ...]:
    """Return those of what a method reported that are shares; it may be of anybody."""
    listed = values if isinstance(values, list | tuple) else [values]
    return tuple(float(v) for v in listed if isinstance(v, int | float) and 0 <= v <= 1)


def require_rule(promise: str) -> None:
    """Raise InputError unless it is a rule of a promise."""
    if promise not in get_args(Rule):
        raise InputError("there is no such rule of a promise", expected=get_args(Rule), got=promise)


def _require_enough(images: int, max_drop: float) -> None:
    # The interval has a width even if the repair changes no answer; it must fit under the promise.
    best = paired_interval(0, 0, images)[1]
    if best > max_drop:
        fewest = images
        while paired_interval(0, 0, fewest)[1] > max_drop and fewest < 1_000_000:
            fewest += max(fewest // 100, 1)
        raise InputError(
            "so strict a promise cannot be shown with so few images, whatever the repair does",
            expected=f"about {fewest} images, or a promise of {100 * best:.1f} points"
            if max_drop
            else "a promise of more than 0 points",
            got=f"{images} images and a promise of {100 * max_drop:.1f} points",
            remedy="Give more images for the proof, or leave the promise to be refused on evidence only",
        )


@torch.no_grad()
def _round(model: Classifier, types: Mapping[str, torch.dtype]) -> None:
    for name, tensor in model.network.state_dict().items():
        stored = types.get(name, tensor.dtype)
        if tensor.is_floating_point() and stored.is_floating_point and stored != tensor.dtype:
            tensor.copy_(tensor.to(stored))

"""Repair a model, and prove what was done: what changed, what it cost, and what is left of the trigger.

Part of the images is kept from the method: on these the accuracy before and after is measured, and the
promise about it is kept or the repair is refused. A success rate of the *recovered* trigger is the most that
can be said of the backdoor without the attacker's own; it is an upper bound of nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from unbackdoor.audit.comparison import (
    Accuracy,
    TensorChange,
    changed_tensors,
    compare_accuracy,
    trigger_success,
)
from unbackdoor.audit.scanning import ShownTrigger
from unbackdoor.engine import trusted_caller as caller
from unbackdoor.engine.precision import Policy
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, UnbackdoorError
from unbackdoor.metrics import Rate
from unbackdoor.registry import Config, Part
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

PROOF_FRACTION = 0.3  # of every class, for the proof
FEWEST_FOR_PROOF = 4  # images a class; with fewer, all go to the method and the proof is marked


class PromiseBroken(UnbackdoorError):
    """The repair lost more accuracy than was allowed; nothing may be written."""


@dataclass(frozen=True)
class Residue:
    """What a recovered trigger does to the model before and after.

    Attributes:
        trigger: The trigger.
        before: Its success on the original, on images that it was not made from where there were any.
        after: Its success on the repaired model.
    """

    trigger: ShownTrigger
    before: Rate
    after: Rate


@dataclass(frozen=True)
class Purification:
    """A repaired model with the proof of what was changed.

    Attributes:
        model: The repaired classifier.
        purified: What the method returned.
        accuracy: Clean accuracy before and after; None without labels.
        proof_is_fit: True where no images could be kept from the method, so that the accuracy is flattered.
        changes: What differs in the weights.
        residues: What the known triggers still do.
        facts: JSON-ready: hashes and numbers of images.
    """

    model: Classifier
    purified: Purified
    accuracy: Accuracy | None
    proof_is_fit: bool
    changes: tuple[TensorChange, ...]
    residues: tuple[Residue, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


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
    held = CleanData.split(images, select_fraction=fraction, seed=seed)
    return held.fit, held.select, held.select_is_fit


def purify(
    model: Classifier,
    images: Images | CleanData,
    method: str | Part[Any],
    *,
    preset: str | None = None,
    options: Mapping[str, Any] | Config | None = None,
    max_accuracy_drop: float | None = None,
    triggers: tuple[ShownTrigger, ...] = (),
    proof: Images | CleanData | None = None,
    types: Mapping[str, torch.dtype] | None = None,
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
        images: Clean images; labels are needed by most methods. They are split inside: the parts of clean
            data are joined, and its augmentation holds where none is given.
        method: Registered defense, or a part.
        preset: Named set of its options.
        options: Options laid over the preset.
        max_accuracy_drop: Largest loss of clean accuracy that is accepted, in 0..1; None accepts any.
        triggers: Recovered triggers, such as those of a scan, whose success is measured before and after.
        proof: Images for the proof; None keeps a part of ``images`` back, where there are enough.
        types: Types that tensors of the network will be stored in, by name: they are rounded to these before
            anything is measured, so that what is measured is what is stored.
        select_fraction: Share of the method's images that it only chooses thresholds on.
        augmentation: What may be done to an image without changing its class.
        seed: Seed of every draw.
        device: Where to compute.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display.

    Raises:
        PromiseBroken: If the repaired model lost more accuracy than allowed, or it cannot be measured.
        UnbackdoorError: See :func:`unbackdoor.run`.
    """
    require_classifier(model)
    if isinstance(images, CleanData) and augmentation == "none":
        augmentation = images.augmentation
    same = proof is images
    images = as_images(images)
    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop <= 1:
        raise InputError("the largest drop does not fit", expected="0..1", got=max_accuracy_drop)
    if proof is None:
        given, shown, same = split_proof(images, seed=seed)
    else:
        given, shown = images, as_images(proof, what="the images for the proof")
    if max_accuracy_drop is not None and shown.labels is None:
        raise InputError("a promise about accuracy needs labelled images", got="no labels", where=images.name)
    data = CleanData.split(given, select_fraction=select_fraction, augmentation=augmentation, seed=seed)
    purified = caller.run(
        method,
        model,
        data,
        options=options,
        preset=preset,
        seed=seed,
        device=device,
        precision=precision,
        progress=progress,
    )
    _round(purified.model, types or {})
    run = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    accuracy = compare_accuracy(model, purified.model, shown, run)
    if max_accuracy_drop is not None:
        assert accuracy is not None  # labels were asked for above
        # The last term is for rounding: a drop of exactly the limit keeps the promise.
        if accuracy.drop > max_accuracy_drop + 1e-9:
            low, high = accuracy.drop_interval
            asked, total = 100 * max_accuracy_drop, accuracy.before.total
            raise PromiseBroken(
                "the repaired model loses more accuracy than was allowed, so it was thrown away",
                expected=f"at most {asked:.1f} points less on {total} images",
                got=f"{100 * accuracy.drop:.1f} points (95 % interval {100 * low:.1f} to {100 * high:.1f})",
                remedy="Allow more, give more images, or choose a milder method or preset",
            )
    residues = tuple(
        Residue(
            trigger,
            trigger_success(model, shown, trigger.label, trigger.pattern, trigger.mask, run),
            trigger_success(purified.model, shown, trigger.label, trigger.pattern, trigger.mask, run),
        )
        for trigger in triggers
    )
    before, after = model.network.state_dict(), purified.model.network.state_dict()
    return Purification(
        purified.model,
        purified,
        accuracy,
        same,
        tuple(changed_tensors(before, after)),
        residues,
        {
            "before_sha256": model.sha256(),
            "after_sha256": purified.model.sha256(),
            "images_for_the_method": len(given),
            "images_for_the_proof": len(shown),
            "images_sha256": images.fingerprint(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "changed_entries": int(
                sum(int((before[n] != after[n]).sum()) for n in before if before[n].dtype.is_floating_point)
            ),
            "torch": torch.__version__,
        },
    )


@torch.no_grad()
def _round(model: Classifier, types: Mapping[str, torch.dtype]) -> None:
    for name, tensor in model.network.state_dict().items():
        stored = types.get(name, tensor.dtype)
        if tensor.is_floating_point() and stored.is_floating_point and stored != tensor.dtype:
            tensor.copy_(tensor.to(stored))

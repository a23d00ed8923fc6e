"""The verbs: open the caller's model and images, do the work, and attach both to the result.

The command line parses, calls one of these and prints. :func:`unbackdoor.audit.scanning.scan` and its
siblings do the work on a classifier and images in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unbackdoor.audit import purifying, scanning, verification
from unbackdoor.audit.budget import within_budget
from unbackdoor.audit.cases import (
    Data,
    Model,
    open_case,
    open_pair_sources,
    open_second,
    options_for,
    require_inputs,
    require_share,
)
from unbackdoor.audit.checks import Check, plan_checks
from unbackdoor.audit.devices import resolved_device
from unbackdoor.audit.notebook import shown
from unbackdoor.audit.own_methods import defense_of
from unbackdoor.audit.references import read_references
from unbackdoor.audit.scanning import LEVEL, Audit
from unbackdoor.audit.suspicion import Scan, read_suspicion
from unbackdoor.audit.trigger_files import read_triggers, require_trigger_files
from unbackdoor.audit.verification import Verification
from unbackdoor.engine import trusted_caller
from unbackdoor.engine.precision import Policy
from unbackdoor.engine.run import Run
from unbackdoor.errors import ConfigError, InputError
from unbackdoor.opening.write_back import stored_types
from unbackdoor.registry import Config, Part
from unbackdoor.triggers import RecoveredTrigger, Suspicion
from unbackdoor.types import Augmentation, CleanData, Progress, Purified, silent


@within_budget
def scan(
    model: Model,
    data: Data | None = None,
    *,
    checks: Sequence[Check | str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    references: Sequence[Path] | None = None,
    level: float = LEVEL,
    thorough: bool = False,
    budget: float | None = None,
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
) -> Audit:
    """Look for a backdoor with all checks that apply, cheapest first.

    Args:
        model: A file of weights, ``hf://ORG/MODEL``, what :func:`unbackdoor.open_model` returned, a
            classifier, or a network (a ``torch.nn.Module``, which takes what ``mean`` and ``std`` make of
            pixels in [0, 1]); only read.
        data: Clean images: a data set's name, a file or folder, ``Images``, ``CleanData``, an array of
            pixels (uint8, or in [0, 1]), a pair ``(pixels, labels)``, or a ``torch.utils.data.Dataset``; None
            where there are none, which leaves the checks that need none.
        checks: Which checks; None is all.
        options: For checks by name: options laid over those of the check.
        references: Records of scans of clean models of the same kind (``result.json`` of a report), for the
            checks that are calibrated by them.
        level: Accepted probability that the whole scan accuses a clean model, in (0, 1).
        thorough: Whether the checks go on after one has answered the question, for more evidence and
            triggers.
        budget: Seconds, opening included, after which no check is begun or goes on; None is no limit.
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
        progress: Progress display; in a notebook a bar, unless UNBACKDOOR_PROGRESS is 0.

    Returns:
        The verdict with its evidence; ``save_report`` writes it as a page.

    Raises:
        UnbackdoorError: If the model or the images cannot be used, or arguments contradict each other.

    Example:
        >>> audit = unbackdoor.scan("model.pth", "images/", budget=600)  # doctest: +SKIP
        >>> audit.verdict  # doctest: +SKIP
        'backdoor found'
    """
    # What is wrong with these is said before anything slow.
    plan_checks([checks] if isinstance(checks, str) else checks, options)
    read_references(references or ())
    device, progress = resolved_device(device), shown(progress)
    run = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    case = open_case(
        model,
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
    )
    audit = scanning.scan(
        case.model,
        case.split(seed),
        reservations=case.reservations,
        doubts=case.doubts,
        checks=checks,
        options=options,
        references=references,
        level=level,
        thorough=thorough,
        budget=budget,
        seed=seed,
        device=device,
        precision=precision,
        progress=progress,
    )
    return replace(audit, case=case)


def purify(
    model: Model,
    data: Data | None = None,
    method: str | Part[Any] | Callable[..., Any] | None = None,
    *,
    preset: str | None = None,
    options: Mapping[str, Any] | Config | None = None,
    max_accuracy_drop: float | None = None,
    promise: purifying.Rule = "evidence",
    scan: Scan | None = None,
    triggers: Sequence[Path | str | RecoveredTrigger] | None = None,
    proof: Data | None = None,
    search_budget: float | None = None,
    select_fraction: float = 0.3,
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
) -> purifying.Purification:
    """Repair a model with a method, and measure what a defender can.

    Args:
        model: A file of weights, what :func:`unbackdoor.open_model` returned, or a classifier; only read.
        data: Clean images, as for :func:`scan`; None: those that the model was opened with, or none, for a
            method that needs none.
        method: Registered defense, a part, or a function of your own, as for :func:`run`; None: ``auto``.
        preset: Named set of its options.
        options: Options laid over the preset.
        max_accuracy_drop: Largest loss of clean accuracy that is accepted, in points of 100, as on the
            command line; None accepts any.
        promise: ``evidence`` refuses the repair where the 95 % interval of the loss lies above that;
            ``strict`` refuses it unless the interval lies below.
        scan: The scan of the model, or the folder of its report: a method that can begins with the classes
            that it suspects and with the triggers that it recovered towards them.
        triggers: Recovered triggers, their files, or pictures such as ``patch.png,class=3,place=24x24``: they
            lead the method likewise, before those of the scan, and their success is measured before and
            after.
        proof: Further images, for measuring alone; None keeps a part of ``data`` from the method.
        search_budget: Seconds for the searches that judge the repair, with other draws than the method's;
            None: four minutes. What they do not come to cannot speak for the repair.
        select_fraction: Share of the method's images that it only chooses thresholds on.
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
        progress: Progress display; in a notebook a bar, unless UNBACKDOOR_PROGRESS is 0.

    Returns:
        The repaired model with its proof; ``save`` writes it as its owner wrote the original,
        ``save_patch`` as a patch, ``save_report`` as a page. Its numbers are rounded to the types of the
        original's file, so that what was measured is what is written.

    Raises:
        PromiseBroken: If the promise is broken; under ``strict`` also where it cannot be told. Its attribute
            ``refused`` is what was measured, whose report can be saved.
        UnbackdoorError: If the model or the images cannot be used, or arguments contradict each other.

    Example:
        >>> done = unbackdoor.purify("model.pth", "images/", "unlearned_prune")  # doctest: +SKIP
        >>> done.save("repaired.pth")  # doctest: +SKIP
    """
    part = defense_of(purifying.DEFAULT_METHOD if method is None else method)
    if max_accuracy_drop is not None:
        require_points(max_accuracy_drop)
    require_share(select_fraction)
    if not isinstance(options, Config):
        part.configure(options, preset=preset)
    purifying.require_rule(promise)
    require_trigger_files(triggers)
    device, progress = resolved_device(device), shown(progress)
    run = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    case = open_case(
        model,
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
    images = case.data if case.data is not None else case.images
    if images is None:
        if "images" in part.needs:
            raise InputError("there is no clean image", expected="clean images to repair with", where="data")
        images = CleanData.empty(case.model.input_shape, case.model.class_names)
    try:
        done = purifying.purify(
            case.model,
            images,
            part,
            preset=preset,
            options=options,
            max_accuracy_drop=None if max_accuracy_drop is None else max_accuracy_drop / 100,
            promise=promise,
            triggers=read_triggers(triggers, case.model),
            suspicion=read_suspicion(scan, case.model),
            proof=case.proof,
            search_budget=search_budget,
            types=stored_types(case.opened) if case.opened is not None else None,
            select_fraction=select_fraction,
            augmentation=case.augmentation,
            seed=seed,
            device=device,
            precision=precision,
            progress=progress,
        )
    except purifying.PromiseBroken as error:
        error.refused = replace(error.refused, case=case)
        raise
    return replace(done, case=case)


_SMALLEST_DROP = 0.2  # points; a smaller number is most likely meant as a fraction


def require_points(drop: float) -> None:
    """Raise ConfigError unless a loss of accuracy is in points of 100, and warn of what may be a fraction."""
    if not 0 <= drop <= 100:
        raise ConfigError("the option --max-accuracy-drop", [f"expected points in 0..100, got {drop}"])
    if 0 < drop < _SMALLEST_DROP:
        warnings.warn(
            f"--max-accuracy-drop counts points of 100; {drop:g} is less than any image", stacklevel=3
        )


def run(
    method: str | Part[Any] | Callable[..., Any],
    model: Model,
    data: Data | None = None,
    *,
    options: Mapping[str, Any] | Config | None = None,
    preset: str | None = None,
    seed: int = 0,
    device: torch.device | str = "auto",
    precision: Policy = "auto",
    progress: Progress = silent,
    suspicion: Suspicion | None = None,
) -> Purified:
    """Run a defense on a model and verify what it did; nothing is measured.

    Args:
        method: Registered name, a part, or a function of your own: ``function(model, data)``, whose other
            parameters with defaults are its options, and which gets ``run`` if it has such a parameter. It
            returns the repaired classifier or network, or None where it changed the copy that it was given. A
            text ``FILE.py:FUNCTION`` runs that file.
        model: As for :func:`scan`; never changed.
        data: Clean images, as for :func:`scan`; a part is held out of those that are not split yet. None:
            those that the model was opened with.
        options: Options of the method, or its whole config.
        preset: Named set of options that ``options`` are laid over.
        seed: Seed of every draw of the method.
        device: Where to compute, such as ``cpu`` or ``cuda:0``; ``auto`` is CUDA, else MPS, else the CPU.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display; in a notebook a bar, unless UNBACKDOOR_PROGRESS is 0.
        suspicion: Suspected classes and recovered triggers that a method which can use them begins with.

    Returns:
        The repaired model on the CPU in evaluation mode, with evidence, seconds and the options used.

    Raises:
        UnbackdoorError: If the model or the images cannot be used, an option does not fit, the method raised,
            returned something unusable, or changed what it must not change.

    Example:
        >>> def shrink(model, data, factor=0.9):
        ...     for weight in model.parameters():
        ...         weight.data *= factor
        >>> repaired = unbackdoor.run(shrink, model, (pixels, labels))  # doctest: +SKIP
    """
    part = defense_of(method)
    device, progress = resolved_device(device), shown(progress)
    surroundings = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    case = open_case(model, data, run=surroundings)
    clean = case.split(seed)
    if clean is None and "images" in part.needs:
        raise InputError("there is no clean image", expected="clean images to repair with", where="data")
    if clean is None:
        clean = CleanData.empty(case.model.input_shape, case.model.class_names)
    return trusted_caller.run(
        part,
        case.model,
        clean,
        options=options,
        preset=preset,
        seed=seed,
        device=device,
        precision=precision,
        progress=progress,
        suspicion=suspicion,
    )


@within_budget
def verify(
    before: Model,
    after: Model,
    data: Data | None = None,
    *,
    triggers: Sequence[Path | str | RecoveredTrigger] | None = None,
    checks: Sequence[Check | str] | None = None,
    level: float = LEVEL,
    budget: float | None = None,
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
    data_root: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_damaged: bool = False,
    seed: int = 0,
    device: str = "auto",
    precision: Policy = "auto",
    progress: Progress = silent,
) -> Verification:
    """Compare two models without trusting whoever made the second.

    Args:
        before: The original: a file of weights, what :func:`unbackdoor.open_model` returned, or a classifier.
        after: What is said to be its repair; of the same input and classes.
        data: Clean images, as for :func:`scan`; None: those that the first was opened with.
        triggers: Known triggers, their files, or pictures, as for :func:`purify`, to try beside the
            recovered ones.
        checks: Checks of both scans; None is all. On ``after`` those that accused ``before`` come first.
        level: Accepted probability of a false alarm in each scan.
        budget: Seconds for opening and both scans together; None is no limit.
        arch: See :func:`unbackdoor.open_model`, as for the six that follow; of both models, but of none that
            has a card.
        mean: Per-channel mean.
        std: Per-channel deviation.
        size: (H, W) of the models' input.
        class_names: K names, in logit order.
        weights: Which of several sets of weights in the file, such as ``state_dict_ema``.
        output: Which of several outputs of an ONNX graph gives the logits.
        clean: Images to draw from a named data set, equally from all classes.
        per_class: Likewise: images of each class.
        fraction: Likewise: share of the images set aside for defenders, in (0, 1].
        data_root: Folder that holds the data sets.
        image_column: Column of the images in a Parquet file; None: the first of a usual name.
        label_column: Column of the labels, likewise.
        skip_damaged: Whether images that cannot be decoded are left out and counted.
        seed: Seed of every draw.
        device: Where to compute; ``auto`` is CUDA, else MPS, else the CPU.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display; in a notebook a bar, unless UNBACKDOOR_PROGRESS is 0.

    Raises:
        UnsupportedModel: If the two do not take the same images or do not know the same classes.
        UnbackdoorError: If a model or the images cannot be used, or arguments contradict each other.
    """
    plan_checks([checks] if isinstance(checks, str) else checks)
    require_trigger_files(triggers)
    require_inputs(before, data)
    require_inputs(after)
    device, progress = resolved_device(device), shown(progress)
    run = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    model_options: dict[str, Any] = {
        "arch": arch, "mean": mean, "std": std, "size": size, "class_names": class_names,
        "weights": weights, "output": output,
    }  # fmt: skip
    before, after = open_pair_sources(before, after, model_options)
    first = open_case(
        before,
        data,
        run=run,
        clean=clean,
        per_class=per_class,
        fraction=fraction,
        data_root=data_root,
        image_column=image_column,
        label_column=label_column,
        skip_damaged=skip_damaged,
        **options_for(before, model_options),
    )
    second = open_second(after, first, run=run, **model_options)
    if first.images is None:
        raise InputError("there is no clean image", expected="clean images to compare on", where="data")
    done = verification.verify(
        first.model,
        second.model,
        first.images,
        triggers=read_triggers(triggers, first.model),
        reservations=(first.reservations, second.reservations),
        doubts=(first.doubts, second.doubts),
        checks=checks,
        level=level,
        budget=budget,
        seed=seed,
        device=device,
        precision=precision,
        progress=progress,
    )
    return replace(done, cases=(first, second))

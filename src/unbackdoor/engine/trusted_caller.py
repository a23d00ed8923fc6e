"""The trusted caller: the only way a method is run.

A method is untrusted code. It receives a deep copy of the model, copies of the clean images, its options
and a seed, and nothing else; what comes back is checked before anybody uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from unbackdoor.engine import rng
from unbackdoor.engine.inference import settle_layout
from unbackdoor.engine.precision import Policy
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, IntegrityError, MethodFailed, UnbackdoorError
from unbackdoor.registry import (
    DEFENSES,
    INPUT_LABELS,
    ONE_A_CLASS,
    SCANNERS,
    SCREENERS,
    SUSPICION,
    Config,
    Part,
)
from unbackdoor.triggers import Suspicion
from unbackdoor.types import (
    Classifier,
    CleanData,
    Images,
    Progress,
    Purified,
    ScanReport,
    Screening,
    Verdict,
    as_clean_data,
    as_images,
    require_classifier,
    require_fit,
    require_labels,
    require_one_a_class,
    silent,
)

PROBED = 8  # images that the repaired model is tried on before it is returned


def run(
    method: str | Part[Any],
    model: Classifier,
    data: CleanData | Images,
    *,
    options: Mapping[str, Any] | Config | None = None,
    preset: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: Policy = "auto",
    progress: Progress = silent,
    suspicion: Suspicion | None = None,
) -> Purified:
    """Run a defense on a model and verify what it did.

    Args:
        method: Registered name, or a part.
        model: The suspicious classifier; never changed.
        data: The defender's clean images; a part is held out of those that are not split yet.
            ``CleanData.empty`` will do for a method that needs none.
        options: Options of the method, or its whole config.
        preset: Named set of options that ``options`` are laid over.
        seed: Seed of every draw of the method.
        device: Where to compute, such as ``cpu`` or ``cuda:0``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display.
        suspicion: Suspected classes and recovered triggers that a method which can use them begins with.

    Returns:
        The repaired model on the CPU in evaluation mode, with evidence, seconds and the options used.

    Raises:
        InputError: If the images or the weights cannot be used.
        ConfigError: If an option does not fit.
        UnsupportedModel: If the method cannot work on this network.
        MethodFailed: If the method raised, or returned something unusable.
        IntegrityError: If it changed what it must not change, or left something behind.

    Example:
        >>> import unbackdoor
        >>> repaired = unbackdoor.run("none", model, data)  # doctest: +SKIP
    """
    part = DEFENSES[method] if isinstance(method, str) else method
    require_classifier(model)
    data = as_clean_data(data, seed=seed)
    config = options if isinstance(options, Config) else part.configure(options, preset=preset)
    surroundings = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    check_suspicion(suspicion, model)
    if suspicion is not None and suspicion.classes and SUSPICION in part.traits:
        surroundings = replace(surroundings, suspicion=_lent(suspicion))
    returned, seconds = _call_with_copies(part, model, data, config, surroundings)
    repaired = check_output(part, returned, model, data, surroundings)
    repaired.origin = model.origin
    vars(repaired.network).pop(_RATES, None)
    purified: Purified = returned
    return replace(
        purified,
        model=repaired,
        seconds=seconds,
        method=_described(part, preset, config, surroundings),
    )


class Form(Protocol):
    """A model and images in another form, and the way back for a report on them."""

    @property
    def model(self) -> Classifier:
        """The model that a scanner is given."""
        ...

    @property
    def data(self) -> CleanData:
        """The images that it is given."""
        ...

    def restored(self, report: ScanReport, names: Sequence[str]) -> ScanReport:
        """Return a report on these as one on the original model, whose classes have these names."""
        ...


def scan(
    scanner: str | Part[Any],
    model: Classifier,
    data: CleanData | Images,
    *,
    options: Mapping[str, Any] | Config | None = None,
    preset: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: Policy = "auto",
    progress: Progress = silent,
    form: Form | None = None,
) -> ScanReport:
    """Run a scanner on a model and verify that it changed nothing.

    Args:
        scanner: Registered name, or a part.
        model: The suspicious classifier; never changed.
        data: As in :func:`run`; ``CleanData.empty`` will do for a scanner that needs none.
        options: Options of the scanner, or its whole config.
        preset: Named set of options that ``options`` are laid over.
        seed: Seed of every draw of the scanner.
        device: Where to compute, such as ``cpu`` or ``cuda:0``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display.
        form: What the scanner is given in the place of the model and the images; see
            :mod:`unbackdoor.engine.canonical_form`. None: these themselves.

    Returns:
        Its report, with seconds and the options used.

    Raises:
        InputError: If the images or the weights cannot be used.
        ConfigError: If an option does not fit.
        UnsupportedModel: If the scanner cannot work on this network.
        MethodFailed: If the scanner raised, or returned something unusable.
        IntegrityError: If it changed what it must not change, or left something behind.
    """
    part = SCANNERS[scanner] if isinstance(scanner, str) else scanner
    require_classifier(model)
    data = as_clean_data(data, seed=seed)
    config = options if isinstance(options, Config) else part.configure(options, preset=preset)
    surroundings = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    described = _described(part, preset, config, surroundings)
    if part.scanning.as_it_is:
        form = None
    given_model, given_data = (model, data) if form is None else (form.model, form.data)
    originals = model, data
    returned, seconds = _call_with_copies(
        part, given_model, given_data, config, surroundings, originals=originals
    )
    check_report(part, returned, given_model)
    report: ScanReport = returned if form is None else form.restored(returned, model.class_names)
    return replace(report, seconds=seconds, method=described)


def screen(
    screener: str | Part[Any],
    model: Classifier,
    data: CleanData | Images,
    inputs: Images | CleanData,
    *,
    options: Mapping[str, Any] | Config | None = None,
    preset: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: Policy = "auto",
    progress: Progress = silent,
) -> Screening:
    """Run a screener on images of unknown origin and verify that it changed nothing.

    Args:
        screener: Registered name, or a part.
        model: The suspicious classifier; never changed.
        data: As in :func:`run`; ``CleanData.empty`` will do for a screener that needs none.
        inputs: The images. Their labels are shown only to a screener of training sets.
        options: Options of the screener, or its whole config.
        preset: Named set of options that ``options`` are laid over.
        seed: Seed of every draw of the screener.
        device: Where to compute, such as ``cpu`` or ``cuda:0``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display.

    Returns:
        A score and a p-value for each image, with seconds and the options used.

    Raises:
        InputError: If the images or the weights cannot be used.
        ConfigError: If an option does not fit.
        UnsupportedModel: If the screener cannot work on this network.
        MethodFailed: If the screener raised, or returned something unusable.
        IntegrityError: If it changed what it must not change, or left something behind.
    """
    part = SCREENERS[screener] if isinstance(screener, str) else screener
    require_classifier(model)
    data = as_clean_data(data, seed=seed)
    inputs = as_images(inputs, what="the images to screen")
    config = options if isinstance(options, Config) else part.configure(options, preset=preset)
    if not len(inputs):
        raise InputError("there is no image to screen", expected="at least 1", got=0, where=inputs.name)
    require_fit(model, inputs)
    if INPUT_LABELS not in part.needs:
        inputs = replace(inputs, labels=None)
    elif inputs.labels is None:
        raise InputError(f"the screener {part.name!r} needs labelled images", where=inputs.name)
    surroundings = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    returned, seconds = _call_with_copies(part, model, data, config, surroundings, inputs)
    check_screening(part, returned, model, inputs)
    screening: Screening = returned
    return replace(screening, seconds=seconds, method=_described(part, preset, config, surroundings))


def _call_with_copies(
    part: Part[Any],
    model: Classifier,
    data: CleanData,
    config: Config,
    surroundings: Run,
    inputs: Images | None = None,
    originals: tuple[Classifier, CleanData] | None = None,
) -> tuple[Any, float]:
    """Call a part with copies, and refuse what it returns if it touched anything else.

    Args:
        part: The part.
        model: What it gets a copy of.
        data: Likewise.
        config: Its options.
        surroundings: Its run.
        inputs: Further images that it gets.
        originals: What must not change; None: the model and the images themselves.
    """
    check_inputs(part, model, data)
    # The method gets a copy of the inputs, never the inputs themselves, so no hash of them is needed.
    model_before, data_before = originals or (model, data)
    before = (model_before.sha256(), data_before.fingerprint())
    process_state = Surroundings.take()
    # Names could give away the truth: the copy carries no origin and the images no name.
    model_copy = model.copy().to(surroundings.device)
    model_copy.origin = ""
    if hasattr(model_copy.network, _RATES):
        setattr(model_copy.network, _RATES, _alike)
    data_copy = replace(data, fit=_anonymous(data.fit), select=_anonymous(data.select))
    arguments = (model_copy, data_copy) if inputs is None else (model_copy, data_copy, _anonymous(inputs))
    start = time.perf_counter()
    try:
        settle_layout(model_copy, surroundings)
        returned = part.function(*arguments, config, run=surroundings)
    except Exception as error:
        _refuse_traces(part, process_state, model_before, data_before, before, error)
        if isinstance(error, UnbackdoorError):
            raise
        raise MethodFailed(f"the {part.kind} {part.name!r} raised {type(error).__name__}: {error}") from error
    except BaseException:
        process_state.restore()
        raise
    seconds = time.perf_counter() - start
    _refuse_traces(part, process_state, model_before, data_before, before, None)
    return returned, seconds


# Rates of their own are for a training from scratch. A network that was handed over is fine-tuned as any
# other would be: at 64 times the rate, which airbench gives to its biases, a few steps destroy it.
_RATES = "learning_rates"


def _alike(epoch: int) -> dict[str, float]:
    return {}


def _described(part: Part[Any], preset: str | None, config: Config, surroundings: Run) -> dict[str, Any]:
    return {
        "name": part.name,
        "version": part.version,
        "preset": preset or "default",
        "options": config.model_dump(),
        "seed": surroundings.seed,
        "precision": surroundings.precision.name,
        "device": str(surroundings.device),
    }


def check_inputs(part: Part[Any], model: Classifier, data: CleanData) -> None:
    """Refuse weights and images that no method can do anything with.

    Raises:
        InputError: No image, missing labels, one class only, or weights that are not finite.
        TooFewImages: Fewer than a part needs.
        UnsupportedModel: Images or labels that do not fit the model.
    """
    for images in (data.fit, data.select):
        require_fit(model, images)
    if "images" in part.needs and not len(data):
        raise InputError(
            f"the {part.kind} {part.name!r} needs clean images",
            expected="at least 1",
            got=0,
            where=data.fit.name,
            remedy="Give clean images, or choose a check that needs none",
        )
    if "labels" in part.needs:
        require_labels(data, f"the {part.kind} {part.name!r}")
        if len(torch.unique(data.all.truth)) < 2:
            raise InputError(
                "the clean images are all of one class",
                expected="at least 2 classes",
                got=1,
                where=data.fit.name,
                remedy="Add images of the other classes",
            )
    if ONE_A_CLASS in part.needs:
        require_one_a_class(model, data.all)
    for name, value in model.network.state_dict().items():
        if not _finite(value):
            raise InputError("a weight is not a finite number", where=name, remedy="Check the weights file")


def check_suspicion(suspicion: Suspicion | None, model: Classifier) -> None:
    """Raise InputError unless suspected classes and triggers fit the model."""
    if suspicion is None:
        return
    if not isinstance(suspicion, Suspicion):
        raise InputError(
            "the suspicion is of another type", expected="Suspicion", got=type(suspicion).__name__
        )
    faults = suspicion.faults(model.input_shape, model.classes)
    if faults:
        raise InputError("the suspicion does not fit the model", got=faults[0])


def check_output(
    part: Part[Any], returned: object, model: Classifier, data: CleanData, surroundings: Run
) -> Classifier:
    """Return the repaired model on the CPU, or refuse it.

    Raises:
        MethodFailed: If it is no classifier of the same shape, or not finite.
        IntegrityError: If it still carries hooks, gradients, parametrisations or the training mode.
    """

    def failed(problem: str, **facts: Any) -> MethodFailed:
        return MethodFailed(f"the method {part.name!r} {problem}", **facts)

    if not isinstance(returned, Purified) or not isinstance(returned.model, Classifier):
        raise failed("returned no repaired classifier", expected="Purified", got=type(returned).__name__)
    out = returned.model
    if out is model:
        raise IntegrityError(f"the method {part.name!r} returned the model it must not touch")
    traces = _traces(out)
    if traces:
        raise IntegrityError(f"the method {part.name!r} left traces on the model", got="; ".join(traces[:5]))
    out = out.to("cpu")
    then, now = model.network.state_dict(), out.network.state_dict()
    if {n: (v.shape, v.dtype) for n, v in then.items()} != {n: (v.shape, v.dtype) for n, v in now.items()}:
        differing = sorted(
            n for n in {*then, *now} if n not in then or n not in now or then[n].shape != now[n].shape
        )
        raise failed("changed the form of the network", where=", ".join(differing[:5]) or "tensor types")
    for name, value in now.items():
        if not _finite(value):
            raise failed("returned weights that are not finite", where=name)
    same = [p.requires_grad for p in out.parameters()] == [p.requires_grad for p in model.parameters()]
    if not same:
        raise IntegrityError(f"the method {part.name!r} changed which parameters learn")
    # Grey images where the method had none.
    probe = data.fit.pixels[:PROBED] if len(data) else torch.full((PROBED, *model.input_shape), 128)
    with torch.inference_mode():
        logits = out(probe.float() / 255)
    if logits.shape != (len(probe), model.classes) or not _finite(logits):
        raise failed("returned a model whose logits are not finite", got=tuple(logits.shape))
    return out


def check_report(part: Part[Any], returned: object, model: Classifier) -> None:
    """Refuse a report that cannot be used.

    Raises:
        MethodFailed: If it is no report, names a class that does not exist, gives a probability outside of
            0..1, or a trigger that does not fit the model.
    """

    def failed(problem: str, **facts: Any) -> MethodFailed:
        return MethodFailed(f"the scanner {part.name!r} {problem}", **facts)

    if not isinstance(returned, ScanReport):
        raise failed("returned no report", expected="ScanReport", got=type(returned).__name__)
    if returned.verdict not in get_args(Verdict):
        raise failed("gave an unknown verdict", expected=" | ".join(get_args(Verdict)), got=returned.verdict)
    for finding in returned.findings:
        if any(not 0 <= k < model.classes for k in finding.classes):
            raise failed("named a class that there is none of", got=finding.classes)
        if finding.p_value is not None and not 0.0 <= finding.p_value <= 1.0:
            raise failed("gave a p-value outside of 0..1", got=finding.p_value, where=finding.statistic)
        if len(finding.per_class) not in (0, model.classes):
            raise failed("gave a table that does not fit the classes", where=finding.statistic)
        if len(finding.class_p_values) not in (0, model.classes):
            raise failed("gave p-values that do not fit the classes", where=finding.statistic)
        outside = [p for p in finding.class_p_values if p < 0 or p > 1]
        if outside:
            raise failed("gave a p-value outside of 0..1", got=outside[0], where=finding.statistic)
        if any(not 0 <= k < model.classes for pair in finding.mapping for k in pair):
            raise failed("named a class that there is none of", got=finding.mapping)
        if finding.trigger is not None:
            faults = finding.trigger.faults(model.input_shape, model.classes)
            if faults:
                raise failed("gave a trigger that cannot be used", got=faults[0], where=finding.statistic)


def check_screening(part: Part[Any], returned: object, model: Classifier, inputs: Images) -> None:
    """Refuse a screening that cannot be used.

    Raises:
        MethodFailed: If it is none, has not one finite number for each image, or gives a probability outside
            of 0..1 or a class that does not exist.
    """

    def failed(problem: str, **facts: Any) -> MethodFailed:
        return MethodFailed(f"the screener {part.name!r} {problem}", **facts)

    if not isinstance(returned, Screening):
        raise failed("returned no screening", expected="Screening", got=type(returned).__name__)
    columns = {name: getattr(returned, name) for name in ("scores", "p_values", "predicted", "suspicious")}
    for name, column in columns.items():
        if not isinstance(column, Tensor) or tuple(column.shape) != (len(inputs),):
            got = tuple(column.shape) if isinstance(column, Tensor) else type(column).__name__
            raise failed("has not one number for each image", expected=(len(inputs),), got=got, where=name)
        if not _finite(column):
            raise failed("gave a number that is not finite", where=name)
    if bool(((returned.p_values < 0) | (returned.p_values > 1)).any()):
        raise failed("gave a p-value outside of 0..1")
    if bool(((returned.predicted < 0) | (returned.predicted >= model.classes)).any()):
        raise failed("named a class that there is none of")
    if returned.suspicious.dtype != torch.bool:
        raise failed(
            "does not say which images are suspicious", expected="bool", got=returned.suspicious.dtype
        )


# ---------------------------------------------------------------------------------------------------
# Traces


@dataclass(frozen=True)
class Surroundings:
    """The state of the process that no method may change."""

    randomness: rng.GlobalRandomness
    flags: Mapping[str, object]

    @classmethod
    def take(cls) -> Surroundings:
        """Read the current state."""
        return cls(rng.GlobalRandomness.take(), {name: read() for name, (read, _) in _FLAGS.items()})

    def changed(self) -> list[str]:
        """Return in words what has changed."""
        flags = [name for name, (read, _) in _FLAGS.items() if read() != self.flags[name]]
        return self.randomness.changed() + flags

    def restore(self) -> None:
        """Put everything back that has changed."""
        self.randomness.restore()
        for name, (read, write) in _FLAGS.items():
            if read() != self.flags[name]:  # writing some of them loads torch's compiler, one second
                write(self.flags[name])


def _hook_table(table: dict[int, Any]) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    def write(saved: Any) -> None:
        for key in [key for key in table if key not in saved]:
            del table[key]

    return lambda: tuple(table), write


_HOOKS = nn.modules.module
_FLAGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "the gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default type": (torch.get_default_dtype, torch.set_default_dtype),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the deterministic mode": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "CPU autocast": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda on: torch.set_autocast_enabled("cpu", on),
    ),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch's global forward hooks": _hook_table(_HOOKS._global_forward_hooks),
    "torch's global forward-pre hooks": _hook_table(_HOOKS._global_forward_pre_hooks),
    "torch's global backward hooks": _hook_table(_HOOKS._global_backward_hooks),
}


def _refuse_traces(
    part: Part[Any],
    process_state: Surroundings,
    model: Classifier,
    data: CleanData,
    before: tuple[str, str],
    cause: BaseException | None,
) -> None:
    changed = process_state.changed()
    process_state.restore()
    if model.sha256() != before[0]:
        changed.append("the weights it was given to read")
    if data.fingerprint() != before[1]:
        changed.append("the clean images")
    if changed:
        raise IntegrityError(
            f"the {part.kind} {part.name!r} changed what it must not change", got=", ".join(changed)
        ) from cause


def _traces(model: nn.Module) -> list[str]:
    traces = []
    for name, module in model.named_modules():
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            if getattr(module, table):
                traces.append(f"a hook on {name or 'the classifier'}")
        if hasattr(module, "parametrizations"):
            traces.append(f"a parametrisation on {name}")
        if module.training:
            traces.append(f"training mode on {name or 'the classifier'}")
    traces += [f"a gradient on {name}" for name, p in model.named_parameters() if p.grad is not None]
    return traces


def _anonymous(images: Images) -> Images:
    labels = None if images.labels is None else images.labels.clone()
    return replace(images, pixels=images.pixels.clone(), labels=labels, name="clean images")


def _lent(suspicion: Suspicion) -> Suspicion:
    """Return a copy for a method, without the names of files."""
    copies = [
        replace(t, pattern=t.pattern.clone(), mask=None if t.mask is None else t.mask.clone(), check="")
        for t in suspicion.triggers
    ]
    return replace(suspicion, triggers=tuple(copies))


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())

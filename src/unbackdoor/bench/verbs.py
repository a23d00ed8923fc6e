"""The verbs of experiments: ``train`` plants a backdoor, ``evaluate`` measures one that is on record.

The command line parses, calls one of these and prints.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from unbackdoor.attacks import AttackTruth
from unbackdoor.audit.cases import Case, Data, Model, fitting, open_case, open_pair_sources, options_for
from unbackdoor.audit.comparison import rate_facts
from unbackdoor.audit.devices import resolved_device
from unbackdoor.audit.notebook import shown
from unbackdoor.bench.judge import Scores, der, judge, judge_images, rir
from unbackdoor.bench.picture_truth import ATTACK as PICTURE
from unbackdoor.bench.picture_truth import picture_options, truth_of_picture
from unbackdoor.bench.truth_files import TENSORS_SUFFIX, TRUTH_SUFFIX, load_truth
from unbackdoor.bench.victims import VictimSpec, save_victim, train_victim
from unbackdoor.data.datasets import DataSet, dataset_names, load_dataset
from unbackdoor.data.in_memory import images_in_memory, is_in_memory, unusable
from unbackdoor.data.loaders import load_images
from unbackdoor.data.own_set import is_own_set, load_own_set
from unbackdoor.data.splits import draw_clean
from unbackdoor.engine.precision import Policy
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, recipe_named
from unbackdoor.errors import ConfigError, InputError
from unbackdoor.files import require_writable, writing
from unbackdoor.hub import data_file, is_hub
from unbackdoor.networks.build import canonical
from unbackdoor.opening.open_model import Opened
from unbackdoor.registry import ATTACKS, Part, near_match
from unbackdoor.result_views import Bars, Viewed
from unbackdoor.types import Classifier, CleanData, Images, Progress, as_images, silent
from unbackdoor.weights.source import Source, existing_file, open_source

SUFFIX = ".safetensors"
_Stored = Source | Path | str
_FOR_OPENING = 500  # images by which a foreign file's architecture and normalisation are recognised


@dataclass(frozen=True, repr=False)
class Victim(Viewed):
    """A network that was trained with a planted backdoor, and the truth about it.

    Attributes:
        model: The network, on the CPU.
        truth: The attack, for the judge alone.
        scores: ACC, ASR and RA on the test images.
        dataset: Name of the data set.
        recipe: Name of the recipe.
        recipe_options: How it was trained.
        seed: Seed of every draw.
        precision: Number format of the training.
        seconds: Wall time of the training.
        written: Files that were written so far: ``model``, ``card`` and ``truth``.
    """

    model: Classifier
    truth: AttackTruth
    scores: Scores
    dataset: str
    recipe: str
    recipe_options: Recipe
    seed: int
    precision: str
    seconds: float
    written: dict[str, str] = field(default_factory=dict, compare=False)

    def save(self, path: Path | str, *, force: bool = False) -> Path:
        """Write the weights with their card, and the truth into files of its own that no defender is given.

        Args:
            path: The weights; ``.safetensors`` is appended where it is missing.
            force: Whether files that exist may be replaced.

        Returns:
            The file of the weights.

        Raises:
            InputError: If a file exists or cannot be written.
        """
        out = victim_file(path, force=force)
        step = {
            "step": "trained",
            "dataset": self.dataset,
            "recipe": self.recipe,
            "options": self.recipe_options.model_dump(),
            "seconds": self.seconds,
            "seed": self.seed,
            "precision": self.precision,
        }
        card, truth = out.with_suffix(".json"), out.with_suffix(TRUTH_SUFFIX)
        with writing((out, card, truth, out.with_suffix(TENSORS_SUFFIX)), force=force):
            save_victim(self.model, self.truth, out, history=[step])
        self.written.update({"model": str(out), "card": str(card), "truth": str(truth)})
        return out

    def headline(self) -> str:
        """Return the rates in one line."""
        setting = f"{self.model.architecture} on {self.dataset}, attack {self.truth.attack}"
        return f"{setting}: {_in_words(self.scores)}"

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each rate."""
        return score_rows({"trained": self.scores})

    def bars(self) -> Bars | None:
        """Return the rates."""
        return _score_bars(self.headline(), self.rows())

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors as plain values for JSON."""
        return {
            **self.written,
            "dataset": self.dataset,
            "architecture": self.model.architecture,
            "recipe": self.recipe,
            "attack": self.truth.spec(),
            "seed": self.seed,
            "seconds": self.seconds,
            "scores": scores_facts(self.scores),
        }


@dataclass(frozen=True, repr=False)
class Evaluation(Viewed):
    """What the judge says of a model whose attack is on record.

    Attributes:
        scores: ACC, ASR and RA of the model.
        before: Those of the same model before its repair; None where it was not given.
        truth: The attack.
        truth_file: Its record; None where it was given in memory.
        dataset: Name of the data set whose test images were used.
        precision: Number format of the measurement.
        case: The model.
        case_before: The model before its repair.
    """

    scores: Scores
    before: Scores | None
    truth: AttackTruth | OwnImages
    truth_file: Path | None
    dataset: str
    precision: str
    case: Case = field(repr=False)
    case_before: Case | None = field(default=None, repr=False)

    def headline(self) -> str:
        """Return the rates in one line."""
        return f"{self.case.name} on {self.dataset}: {_in_words(self.scores)}"

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each rate of each model."""
        both = (
            {"model": self.scores} if self.before is None else {"before": self.before, "after": self.scores}
        )
        return score_rows(both)

    def bars(self) -> Bars | None:
        """Return the rates."""
        return _score_bars(self.headline(), self.rows())

    @property
    def der(self) -> float | None:
        """Defense effectiveness in 0..1; None without a model before the repair, or without an attack."""
        return None if self.before is None else der(self.before, self.scores)

    @property
    def rir(self) -> float | None:
        """Robust improvement in 0..1, likewise."""
        return None if self.before is None else rir(self.before, self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors as plain values for JSON."""
        gains = {} if self.before is None else {"der": self.der, "rir": self.rir}
        return {
            "model": _path(self.case),
            "before_model": None if self.case_before is None else _path(self.case_before),
            "truth": None if self.truth_file is None else str(self.truth_file),
            "dataset": self.dataset,
            "attack": self.truth.spec(),
            "precision": self.precision,
            "scores": scores_facts(self.scores),
            "before": None if self.before is None else scores_facts(self.before),
            **gains,
        }


def train(
    dataset: str | Path | DataSet = "cifar10",
    *,
    architecture: str = "preact_resnet18[width=16]",
    attack: str = "badnets",
    poison_rate: float | None = None,
    target: int | None = None,
    attack_options: Mapping[str, Any] | None = None,
    trigger: str | None = None,
    recipe: str = "plain",
    options: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    data_root: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Policy = "auto",
    progress: Progress = silent,
) -> Victim:
    """Train a network with a planted backdoor, and measure it.

    Args:
        dataset: Name of the data set to train on, what :func:`unbackdoor.load_dataset` returned, or the path
            of labelled images of your own, of which a fifth is held out for the test unless there are parts
            ``train`` and ``test``.
        architecture: Network, with options in brackets.
        attack: Registered attack; ``none`` trains a clean network.
        poison_rate: Share of the training images that carry the trigger, in [0, 1]; None: the attack's.
        target: Class that triggered images are sent to; None: the attack's.
        attack_options: Further options of the attack.
        trigger: A picture as the trigger, such as ``patch.png,class=3,place=24x24``: short for the attack
            ``picture``.
        recipe: Named way to train.
        options: Options laid over those of the recipe.
        checkpoint: Where an interrupted training is kept, and continued when the same call is made again;
            removed at the end. None keeps nothing.
        data_root: Folder that holds the data sets.
        seed: Seed of the initial weights, the trigger, the poisoned rows and the order of the images.
        device: Where to compute; ``auto`` is CUDA, else MPS, else the CPU.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display; in a notebook a bar, unless UNBACKDOOR_PROGRESS is 0.

    Returns:
        The network with its truth and its scores; ``save`` writes both.

    Raises:
        ConfigError: If an option does not fit.
        UnbackdoorError: If the data set cannot be used, or there is no such device.

    Example:
        >>> victim = unbackdoor.train("digits", architecture="small_cnn")  # doctest: +SKIP
        >>> victim.save("victim.safetensors")  # doctest: +SKIP
    """
    if not all(isinstance(name, str) for name in (architecture, attack, recipe)):
        raise InputError("a name is of another type", expected="texts as architecture, attack and recipe")
    # What is wrong with the names is said before a data set is read, or downloaded.
    architecture, changed = canonical(architecture), recipe_named(recipe, **(options or {}))
    given = attack_config(ATTACKS[attack], poison_rate, target, attack_options) if trigger is None else {}
    device, progress = resolved_device(device), shown(progress)
    run = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    data = _loaded(dataset, data_root, progress)
    if trigger is not None:
        attack = PICTURE
        named = picture_options(trigger, data.train.class_names, target=target)
        given = attack_config(ATTACKS[attack], poison_rate, None, {**(attack_options or {}), **named})
    spec = VictimSpec(data.name, architecture, changed, recipe, attack, given, seed)
    start = time.perf_counter()
    model, truth = train_victim(spec, data, run, checkpoint=None if checkpoint is None else Path(checkpoint))
    seconds = round(time.perf_counter() - start, 3)
    scores = judge(model, truth, data.test, run)
    return Victim(model.cpu(), truth, scores, data.name, recipe, changed, seed, run.precision.name, seconds)


def evaluate(
    model: Model,
    dataset: str | Path | DataSet,
    *,
    before: Model | None = None,
    truth: AttackTruth | Path | str | None = None,
    trigger: str | None = None,
    triggered: Data | None = None,
    target: int | str | None = None,
    data_root: Path | None = None,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    weights: str | None = None,
    output: str | None = None,
    device: str = "auto",
    precision: Policy = "auto",
    progress: Progress = silent,
) -> Evaluation:
    """Measure ACC, ASR and RA of a model whose attack is on record.

    Args:
        model: A file of weights, what :func:`unbackdoor.open_model` returned, or a classifier; only read.
        dataset: Name of the data set whose test images are used, what :func:`unbackdoor.load_dataset`
            returned, or the path of labelled images of your own: their part ``test``, else all of them.
        before: The same model before its repair; adds DER and RIR.
        truth: The attack, or its record; None: the ``.truth.json`` beside ``model``, else beside ``before``.
        trigger: A picture as the trigger in the place of a record, as for :func:`train`.
        triggered: Images that carry the trigger already, of an attack of your own, in the place of a record:
            a path, ``Images``, arrays or a data set. With the labels that they had, those of ``target`` are
            left out, and RA is measured; without, all count, and RA is not.
        target: The class that the attacker wants for ``triggered``, by index or name.
        data_root: Folder that holds the data sets.
        arch: See :func:`unbackdoor.open_model`, as for the six that follow; only for files.
        mean: Per-channel mean; None: the card's, else the data set's, else what fits your images best.
        std: Per-channel deviation, likewise.
        size: (H, W) of the model's input.
        class_names: K names, in logit order.
        weights: Which of several sets of weights in the file.
        output: Which of several outputs of an ONNX graph gives the logits.
        device: Where to compute; ``auto`` is CUDA, else MPS, else the CPU.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display; in a notebook a bar, unless UNBACKDOOR_PROGRESS is 0.

    Returns:
        The scores, with their counts and intervals. ACC is on the whole test set, ASR and RA on triggered
        images that are not of the attacker's class already.

    Raises:
        InputError: If there is no record of the attack, or it is of images of another form.
        UnbackdoorError: If the model or the data set cannot be used.

    Example:
        >>> unbackdoor.evaluate("repaired", "cifar10", before="victim").der  # doctest: +SKIP
        0.98
    """
    answers = {"truth": truth, "trigger": trigger, "triggered": triggered}
    given_answers = [name for name, value in answers.items() if value is not None]
    if len(given_answers) > 1:
        count = "two" if len(given_answers) == 2 else "three"
        raise ConfigError(
            "the attack", [f"{' and '.join(given_answers)} are {count} answers to one question"]
        )
    if (triggered is None) != (target is None):
        raise ConfigError("the attack", ["triggered images and their target belong together"])
    if triggered is not None:
        triggered = _read(triggered, progress)
    known = (
        None
        if trigger is not None or triggered is not None
        else _truth(truth, [model] if before is None else [model, before])
    )
    device, progress = resolved_device(device), shown(progress)
    run = Run.create(device=device, policy=precision, progress=progress)
    data = _loaded(dataset, data_root, progress, whole=True)
    attack: AttackTruth | OwnImages
    record: Path | None = None
    if triggered is not None:
        attack = OwnImages.of(triggered, target, data.test.class_names)
    else:
        if known is not None:
            attack, record = known
        else:
            attack = truth_of_picture(str(trigger), data.test, run)
        _require_same_form(attack, data, record)
    model_options: dict[str, Any] = {
        "arch": arch, "mean": mean, "std": std, "size": size, "class_names": class_names,
        "weights": weights, "output": output,
    }  # fmt: skip
    if before is not None:
        before, model = open_pair_sources(before, model, model_options)
    one_is_stored = isinstance(model, _Stored) or isinstance(before, _Stored)

    def measured(given: Model) -> tuple[Case, Scores]:
        in_memory = one_is_stored and not isinstance(given, _Stored)  # the options are of the other one
        own = model_options if before is None else options_for(given, model_options)
        case = _opened(given, data, run, {} if in_memory else own)
        _require_same_order(case, data)
        label = f"judging {case.name}"
        network = case.model.copy().to(run.device)
        if isinstance(attack, OwnImages):
            test = fitting(data.test, case.model, run)
            return case, judge_images(network, test, attack.fitted(case.model, run), attack.target, run)
        return case, judge(network, attack, data.test, run, label=label)

    first = None if before is None else measured(before)
    case, scores = measured(model)
    return Evaluation(
        scores,
        None if first is None else first[1],
        attack,
        record,
        data.name,
        run.precision.name,
        case,
        None if first is None else first[0],
    )


def victim_file(path: Path | str, *, force: bool = False) -> Path:
    """Return the file of a victim's weights, after a check that nothing is lost and that it can be written.

    Raises:
        InputError: If a file exists or cannot be written.
    """
    path = Path(path)
    out = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
    beside = (out.with_suffix(suffix) for suffix in (".json", TRUTH_SUFFIX, TENSORS_SUFFIX))
    require_writable((out, *beside), force=force)
    return out


def attack_config(
    part: Part[Any], poison_rate: float | None, target: int | None, options: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return all options of an attack.

    Raises:
        ConfigError: If an option does not fit, or stands twice.
    """
    own = {"poison_rate": poison_rate, "target": target}
    named = {name: value for name, value in own.items() if value is not None}
    twice = [f"{name!r} stands twice" for name in named if name in (options or {})]
    if twice:
        raise ConfigError(f"the attack {part.name!r}", twice)
    return part.configure({**(options or {}), **named}).model_dump()


@dataclass(frozen=True)
class OwnImages:
    """Triggered images of an attack that is not on record.

    Attributes:
        images: With the trigger in them, and the labels that they had without, if these are known.
        target: The class that the attacker wants.
    """

    images: Images
    target: int
    attack: str = "of your own"

    @classmethod
    def of(cls, images: Images, target: int | str | None, class_names: Sequence[str]) -> OwnImages:
        """Return images with the index of their target, which may be named.

        Raises:
            InputError: If there is no such class.
        """
        text = str(target)
        if text in class_names:
            return cls(images, list(class_names).index(text))
        if text.isdecimal() and int(text) < len(class_names):
            return cls(images, int(text))
        raise InputError(
            f"there is no class {text!r}{near_match(text, list(class_names))}",
            expected=f"an index in 0..{len(class_names) - 1}, or a name such as {class_names[0]!r}",
            where="--target (target=...)",
        )

    def fitted(self, model: Classifier, run: Run) -> Images:
        """Return the images in a model's form, without those that are of the target anyway."""
        images = fitting(self.images, model, run)
        if images.labels is None:
            return images
        return images.subset((images.truth != self.target).nonzero().flatten())

    def spec(self) -> dict[str, Any]:
        """Return what is known of the attack as JSON."""
        options = {"target": self.target, "images": len(self.images)}
        shape, classes = list(self.images.shape), self.images.classes
        return {"attack": self.attack, "options": options, "shape": shape, "classes": classes, "seed": 0}


def _read(triggered: Data, progress: Progress) -> Images:
    if is_in_memory(triggered):
        return images_in_memory(triggered, what="the triggered images", progress=progress)
    if isinstance(triggered, Path | str):
        path = data_file(triggered) if is_hub(triggered) else Path(triggered)
        if not path.exists():
            raise InputError("there is no such file or folder", where=path)
        # Images of the class itself are of no use here, and most sets leave them out.
        return load_images(path, partial=True, progress=progress)
    if not isinstance(triggered, Images | CleanData):
        raise unusable(triggered, "the triggered images")
    return as_images(triggered, what="the triggered images")


def score_rows(models: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Return the rates of models as rows of a table, those that were measured."""
    return [
        {"model": model, "rate": name.upper(), "value": rate.value, "low": rate.interval[0],
         "high": rate.interval[1], "images": rate.total}
        for model, scores in models.items()
        for name in ("acc", "asr", "ra")
        if (rate := getattr(scores, name)).total
    ]  # fmt: skip


def _score_bars(title: str, rows: Sequence[Mapping[str, Any]]) -> Bars:
    names = [f"{row['rate']} {row['model']}" for row in rows]
    marked = [i for i, row in enumerate(rows) if row["rate"] == "ASR"]
    return Bars(title, names, [row["value"] for row in rows], "share of images", None, marked)


def _in_words(scores: Scores) -> str:
    rates = ((name, getattr(scores, name)) for name in ("acc", "asr", "ra"))
    return ", ".join(f"{name.upper()} {rate.value:.1%}" for name, rate in rates if rate.total)


def scores_facts(scores: Scores) -> dict[str, Any]:
    """Return the three rates with counts and 95 % intervals; None where there was no attack."""
    return {name: rate_facts(getattr(scores, name)) for name in ("acc", "asr", "ra")}


def _loaded(
    dataset: str | Path | DataSet, root: Path | None, progress: Progress, *, whole: bool = False
) -> DataSet:
    if isinstance(dataset, DataSet):
        return dataset
    if not isinstance(dataset, str | Path):
        raise InputError(
            "the data set is of another type",
            expected="a name, a path, or what unbackdoor.load_dataset returns",
            got=type(dataset).__name__,
        )
    if isinstance(dataset, Path) or is_own_set(dataset):
        return load_own_set(Path(dataset), whole=whole, progress=progress)
    return load_dataset(dataset, root=root, progress=progress)


def _opened(model: Model, data: DataSet, run: Run, options: Mapping[str, Any]) -> Case:
    """Open a model; where nothing else states its normalisation, it is the data set's."""
    bare = isinstance(model, nn.Module) and not isinstance(model, Classifier)
    if not bare and not isinstance(model, _Stored):
        return open_case(model, run=run, **options)
    opened = open_source(model) if isinstance(model, Path | str) else model
    card = opened.card() if isinstance(opened, Source) else None
    # Of images of the user nothing is known: they decide between the usual normalisations.
    stated = bare or data.name in dataset_names()
    if stated and card is None and options.get("mean") is None and options.get("std") is None:
        options = {**options, "mean": data.mean, "std": data.std}
    sample = draw_clean(data.test, count=min(_FOR_OPENING, len(data.test)), seed=0)
    return open_case(opened, sample, run=run, **options)


def _path(case: Case) -> str | None:
    return None if case.source is None else str(case.source.path)


def _file(model: Model) -> Path | None:
    if isinstance(model, Path | str):
        return existing_file(Path(model))
    if isinstance(model, Opened | Case):
        model = model.source or ""
    return model.path if isinstance(model, Source) else None


def _truth(
    given: AttackTruth | Path | str | None, models: Sequence[Model]
) -> tuple[AttackTruth, Path | None]:
    if isinstance(given, AttackTruth):
        return given, None
    if not isinstance(given, Path | str | None):
        raise InputError("the attack is of another type", expected="a record", got=type(given).__name__)
    files = [file for file in map(_file, models) if file is not None]
    candidates = [file.with_suffix(TRUTH_SUFFIX) for file in files] if given is None else [Path(given)]
    record = next((path for path in candidates if path.exists()), None)
    if record is None:
        raise InputError(
            "there is no record of the attack",
            expected=" or ".join(map(str, candidates)) or "truth, of a model in memory",
            remedy="Name it with --truth (truth=...), or name the model that was repaired with --before "
            "(before=...)",
        )
    return load_truth(record), record


def _require_same_form(attack: AttackTruth, data: DataSet, record: Path | None) -> None:
    if (attack.shape, attack.classes) != (data.test.shape, data.test.classes):
        raise InputError(
            "the attack was made for images of another form",
            expected=f"{attack.classes} classes, (C, H, W) = {attack.shape}",
            got=f"{data.test.classes} classes, (C, H, W) = {data.test.shape}",
            where=f"{record or 'the attack'} and the data set {data.name!r}",
            remedy="Give the --dataset that the model was trained on",
        )


def _require_same_order(case: Case, data: DataSet) -> None:
    """Refuse a model whose classes stand in another order: labels and target are indices of the data set."""
    own, expected = case.model.class_names, data.test.class_names
    if own != expected and sorted(own) == sorted(expected):
        raise InputError(
            "the classes of the model stand in another order than those of the data set",
            expected=", ".join(expected[:5]),
            got=", ".join(own[:5]),
            where=case.name,
        )

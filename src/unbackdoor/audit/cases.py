"""The inputs of an audit, a model and images in any form, opened once for all verbs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.audit.budget import opening
from unbackdoor.audit.comparison import compare_logits
from unbackdoor.data.clean_images import resolve_clean_images
from unbackdoor.data.conform import conform
from unbackdoor.data.datasets import dataset_names
from unbackdoor.data.in_memory import InMemory, images_in_memory, is_in_memory, unusable
from unbackdoor.data.loaders import ImageFiles
from unbackdoor.engine.run import Run
from unbackdoor.errors import ConfigError, InputError, UnsupportedModel
from unbackdoor.files import is_there
from unbackdoor.hub import is_hub
from unbackdoor.opening.open_model import Opened, load_images_of, open_model
from unbackdoor.registry import near_match
from unbackdoor.types import Augmentation, Classifier, CleanData, Images
from unbackdoor.weights.card import normalisation
from unbackdoor.weights.source import Source, existing_file, open_source

Data = Images | CleanData | Path | str | InMemory


@dataclass(frozen=True)
class Case:
    """A model with the images of the caller.

    Attributes:
        model: The classifier.
        images: The clean images in its form; None where there are none.
        data: The same, where the caller has split them.
        augmentation: What may be done to them.
        proof: Further images for measuring a repair; None: a part of ``images`` serves.
        proof_of_training_part: Whether what a repair is measured on is of the training part of a public data
            set, which the model may have seen.
        data_set: Name of the data set that the images are a sample of, or None.
        opened: How the model was opened; None of a classifier in memory.
        notes: Remarks about the images that the user should read.
    """

    model: Classifier
    images: Images | None = None
    data: CleanData | None = None
    augmentation: Augmentation = "none"
    proof: Images | None = None
    data_set: str | None = None
    opened: Opened | None = None
    proof_of_training_part: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def source(self) -> Source | None:
        """The file of the model as it was opened; None of a classifier in memory."""
        return None if self.opened is None else self.opened.source

    @property
    def reservations(self) -> tuple[str, ...]:
        """What no check of the model can see, as sentences."""
        return () if self.opened is None else self.opened.provenance.reservations

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the model as it was opened may not be the model of the file, as sentences."""
        return () if self.opened is None else self.opened.provenance.doubts

    @property
    def name(self) -> str:
        """What to call the model."""
        return self.source.path.name if self.source is not None else "a model in memory"

    def require_unchanged(self) -> None:
        """Raise IntegrityError unless the path of the model still leads to what was opened."""
        if self.source is not None:
            self.source.require_unchanged()

    def split(self, seed: int, select_fraction: float = 0.3) -> CleanData | None:
        """Return the images split into a part to fit on and one to select on."""
        if self.data is not None or self.images is None:
            return self.data
        return CleanData.split(
            self.images, select_fraction=select_fraction, augmentation=self.augmentation, seed=seed
        )


def require_share(select_fraction: float) -> None:
    """Raise ConfigError unless the share of the images that only thresholds are chosen on lies in (0, 1)."""
    if not 0 < select_fraction < 1:
        raise ConfigError(
            "the split of the clean images",
            [f"--select-fraction must lie in (0, 1), got {select_fraction} (select_fraction=...)"],
        )


Model = Classifier | nn.Module | Opened | Source | Path | str | Case


def require_inputs(model: Model, *images: Data | None) -> None:
    """Raise InputError where the file of a model or the path of images is not there; nothing is read.

    What is read first takes minutes, and the user must not learn only then that the other one is missing.
    """
    if isinstance(model, Path | str) and not is_there(existing_file(Path(model))):
        raise InputError("the file does not exist", where=model)
    names = dataset_names()
    for data in images:
        if not isinstance(data, Path | str) or str(data) in names or is_hub(data) or is_there(Path(data)):
            continue
        if "/" in str(data) or "." in str(data):
            raise InputError("there is no such file or folder", where=data)
        raise InputError(
            f"unknown data set {str(data)!r}{near_match(str(data), names)}",
            expected="one of " + ", ".join(names) + ", or the path of a file or folder that exists",
        )


@opening()
def open_case(
    model: Model,
    data: Data | None = None,
    *,
    run: Run,
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
    proof: Data | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_damaged: bool = False,
) -> Case:
    """Open a model and load the images in the form that it takes.

    Args:
        model: A file of weights, what was opened of it, a classifier, or a network in memory, which takes
            what ``mean`` and ``std`` make of pixels in [0, 1].
        data: Clean images: a data set's name, a file or folder, images that are loaded, or arrays or a data
            set of torch (see :func:`unbackdoor.data.in_memory.images_in_memory`); None for none, or for those
            that the model was opened with.
        run: Device, precision, seed and progress.
        arch: See :func:`unbackdoor.open_model`, as for the six that follow; only for a file.
        mean: Per-channel mean.
        std: Per-channel deviation.
        size: (H, W) of the model's input.
        class_names: K names, in logit order.
        weights: Which of several sets of weights in the file.
        output: Which of several outputs of an ONNX graph gives the logits.
        clean: Images to draw from a named data set, equally from all classes.
        per_class: Likewise: images of each class.
        fraction: Likewise: share of the images set aside for defenders.
        augmentation: What may be done to an image without changing its class; None: what the named data set
            allows, else nothing.
        data_root: Folder that holds the data sets.
        proof: Further images, for measuring a repair alone.
        image_column: Column of the images in a Parquet file; None: the first of a usual name.
        label_column: Column of the labels, likewise.
        skip_damaged: Whether images that cannot be decoded are left out and counted.

    Raises:
        UnbackdoorError: If the model or the images cannot be used, or arguments contradict each other.
    """
    model_options: dict[str, Any] = {
        "arch": arch, "mean": mean, "std": std, "size": size, "class_names": class_names,
        "weights": weights, "output": output,
    }  # fmt: skip
    amounts: dict[str, Any] = {"clean": clean, "per_class": per_class, "fraction": fraction}
    reading: dict[str, Any] = {
        "image_column": image_column, "label_column": label_column, "skip_damaged": skip_damaged
    }  # fmt: skip
    if isinstance(model, Case):
        conflicting = [
            name
            for name, value in {**model_options, **amounts, "data": data, **reading}.items()
            if value is not None and value is not False
        ]
        if conflicting:
            raise ConfigError(
                "the model", [f"it is opened already, with its images: {', '.join(conflicting)}"]
            )
        return model
    if not isinstance(model, nn.Module | Opened | Source | Path | str):
        raise InputError(
            "the model is of another type",
            expected="a file, what unbackdoor.open_model returns, a Classifier or a torch.nn.Module",
            got=type(model).__name__,
        )
    from_arrays = is_in_memory(data)
    if from_arrays:
        data = images_in_memory(data, progress=run.show)
    if data is not None and not isinstance(data, Images | CleanData | Path | str):
        raise unusable(data)
    if is_in_memory(proof):
        proof = images_in_memory(proof, what="the images of the proof", progress=run.show)
    require_inputs(model, data, proof)
    split = data if isinstance(data, CleanData) else None
    own_augmentation: Augmentation = split.augmentation if split is not None else "none"
    images: Images | ImageFiles | None = None
    proof_images: Images | None = None
    data_set: str | None = None
    notes: tuple[str, ...] = ()
    if isinstance(data, Path | str):
        loaded = resolve_clean_images(
            data,
            clean=clean,
            per_class=per_class,
            fraction=fraction,
            root=data_root,
            seed=run.seed,
            progress=run.show,
            **reading,
        )
        images, proof_images, own_augmentation = loaded.images, loaded.proof, loaded.augmentation
        data_set, notes = loaded.data_set, loaded.notes
    elif any(value is not None and value is not False for value in reading.values()):
        raise ConfigError("the clean images", ["columns and damaged images are of files, and there are none"])
    elif any(value is not None for value in amounts.values()):
        raise ConfigError("the clean images", ["clean, per_class and fraction draw from a named data set"])
    elif data is not None:
        images = data.all if isinstance(data, CleanData) else data
    if isinstance(model, nn.Module) and not isinstance(model, Classifier):
        model, model_options = _of_module(model, images, model_options, run), {}
    opened = model if isinstance(model, Opened) else None
    if isinstance(model, Classifier | Opened):
        if any(value is not None for value in model_options.values()):
            conflicting = [name for name, value in model_options.items() if value is not None]
            raise ConfigError("the model", [f"it is opened already: {', '.join(conflicting)}"])
        classifier = model.model if isinstance(model, Opened) else model
        if images is None and opened is not None:
            images = opened.images
        elif isinstance(images, ImageFiles) or data_set is not None or from_arrays:
            images = fitting(images, classifier, run)
    else:
        opened = open_model(model, images=images, run=run, **model_options)
        classifier, images = opened.model, opened.images
    assert not isinstance(images, ImageFiles)
    if proof is not None:
        proof_data = resolve_clean_images(proof, **reading).images if isinstance(proof, Path | str) else proof
        if not isinstance(proof_data, Images | ImageFiles | CleanData):
            raise unusable(proof, "the images of the proof")
        proof_images = fitting(
            proof_data.all if isinstance(proof_data, CleanData) else proof_data, classifier, run
        )
    elif proof_images is not None:
        proof_images = fitting(proof_images, classifier, run)
    elif data_set is not None:
        proof_images = images  # the method gets as many as were asked for, and the proof is marked
    of_training_part = data_set is not None and proof is None
    notes += () if images is None else images.notes
    return Case(
        classifier,
        images,
        split,
        augmentation or own_augmentation,
        proof_images,
        data_set,
        opened,
        of_training_part,
        notes,
    )


@opening()
def open_second(model: Model, first: Case, *, run: Run, **model_options: Any) -> Case:
    """Open the model that a first one is compared with, under the same assumptions unless it has a card.

    Raises:
        UnbackdoorError: See :func:`open_case`.
    """
    if isinstance(model, nn.Module) and not isinstance(model, Classifier):
        model = _of_module(model, first.images, model_options, run)
    if isinstance(model, Case | Classifier | Opened):
        return open_case(model, run=run)
    source = model if isinstance(model, Source) else open_source(model)
    if source.card_file is not None:
        model_options = {}
    elif source.graph is not None and (first.source is None or first.source.graph is None):
        # An export of the first: its own graph says which network it is.
        model_options = {**model_options, "arch": None}
    elif first.opened is not None:
        # None where the first is the graph of its own file: so is the second.
        model_options = {
            **model_options,
            "arch": model_options.get("arch") or first.model.architecture or None,
        }
    model_options = options_for(source, model_options)
    export = source.graph is not None and model_options.get("mean") is None and not model_options.get("arch")
    scales = [normalisation(first.model), ((), ())] if export else []
    for mean, std in dict.fromkeys(scales):
        # An export holds the normalisation of the first model, or leaves it to its caller.
        opened = open_model(
            source, images=first.images, run=run, **{**model_options, "mean": mean, "std": std}
        )
        if first.images is not None and compare_logits(first.model, opened.model, first.images, run).same:
            return Case(opened.model, opened.images, opened=opened, data_set=first.data_set)
    opened = open_model(source, images=first.images, run=run, **model_options)
    return Case(opened.model, opened.images, opened=opened, data_set=first.data_set)


def open_pair_sources(before: Model, after: Model, options: dict[str, Any]) -> tuple[Model, Model]:
    """Open the files of two models that are compared, and check that options that name parts fit one of them.

    Raises:
        InputError: If a file cannot be opened, or neither has the named set of weights.
        ConfigError: If an output is named and neither is an ONNX graph.
    """
    both = [open_source(model) if isinstance(model, Path | str) else model for model in (before, after)]
    sources = [model for model in both if isinstance(model, Source)]
    key, output = options.get("weights"), options.get("output")
    if key is not None and not any(key in source.contents.sets for source in sources):
        for source in sources:
            source.choose(key)
    if output is not None and all(source.graph is None for source in sources):
        raise ConfigError("the output of the model", ["neither file is an ONNX graph"])
    return both[0], both[1]


def options_for(model: Model, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a pair of models without those that name parts only the other one has."""
    if not isinstance(model, Source):
        return options
    out = dict(options)
    if out.get("weights") not in model.contents.sets:
        out["weights"] = None
    if model.graph is None or out.get("arch") is not None:
        out["output"] = None
    return out


def _of_module(
    module: nn.Module, images: Images | ImageFiles | None, options: dict[str, Any], run: Run
) -> Classifier:
    """Return a copy of a network in memory as a classifier; what it does not say comes from the images."""
    wrong = [name for name in ("arch", "weights", "output") if options[name] is not None]
    if wrong:
        raise ConfigError("the model", [f"it is a network in memory: {', '.join(wrong)} are of files"])
    loaded = load_images_of(images, options["size"], run.show)
    if loaded is None or not len(loaded):
        raise InputError(
            "the shape of the network's input is not known",
            expected="clean images beside it",
            remedy="Or give unbackdoor.Classifier(network, input_shape=(C, H, W), class_names=...)",
        )
    channels, *size = loaded.shape
    shape = (channels, *(options["size"] or size))
    network = copy.deepcopy(module).cpu().eval()
    try:
        with torch.no_grad():
            answers = network(torch.zeros(2, *shape))
    except Exception as error:
        raise UnsupportedModel(
            "the network does not take the images",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            where=f"input of shape {shape}",
        ) from error
    if not isinstance(answers, Tensor) or answers.dim() != 2 or len(answers) != 2:
        raise UnsupportedModel(
            "the network returns no logits",
            expected="a tensor of shape (images, classes)",
            got=tuple(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__,
        )
    classes = answers.shape[1]
    named = options["class_names"] or (loaded.class_names if len(loaded.class_names) == classes else ())
    return Classifier(
        network,
        input_shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        class_names=tuple(named) or tuple(map(str, range(classes))),
        mean=tuple(options["mean"] or ()),
        std=tuple(options["std"] or ()),
    )


def fitting(images: Images | ImageFiles | None, model: Classifier, run: Run) -> Images:
    """Return images in the form of a model: its size, its colours, its order of classes."""
    shape, names = model.input_shape, model.class_names
    loaded = load_images_of(images, shape[1:], run.show)
    assert loaded is not None
    return conform(loaded, input_shape=shape, class_names=names, progress=run.show)[0]

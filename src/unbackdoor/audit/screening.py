"""The verb ``screen``: look at images of unknown origin instead of the model.

:func:`unbackdoor.plugins.run_screener` does the work on a classifier and images in memory.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbackdoor.audit.cases import Case, Data, Model, open_case, require_share
from unbackdoor.audit.devices import resolved_device
from unbackdoor.audit.notebook import shown
from unbackdoor.data.conform import conform
from unbackdoor.data.in_memory import InMemory, images_in_memory, is_in_memory, unusable
from unbackdoor.data.loaders import load_labelled, load_unlabelled
from unbackdoor.engine import trusted_caller
from unbackdoor.engine.precision import Policy
from unbackdoor.engine.run import Run
from unbackdoor.errors import ConfigError, InputError
from unbackdoor.files import atomic_write, writing
from unbackdoor.hub import data_file, is_hub
from unbackdoor.registry import INPUT_LABELS, SCREENERS, Config, Part
from unbackdoor.result_views import Bars, Viewed
from unbackdoor.text import printable
from unbackdoor.types import Classifier, CleanData, Images, Progress, Screening, as_images, silent
from unbackdoor.weights.source import Source

CSV_COLUMNS = ("image", "label", "predicted", "score", "p_value", "suspicious")


@dataclass(frozen=True, repr=False)
class ScreenedImages(Viewed, Screening):
    """What a screener says of images, with what each of them is called.

    Attributes:
        names: (N,) the images' paths inside their folder, or their rows.
        labels: (N,) labels that the screener was shown, in the model's order; None where it was shown none.
        clean_images: Number of clean images that were compared with.
        case: The model and the clean images as the caller gave them.
        notes: What was done to the images.
    """

    names: tuple[str, ...] = ()
    labels: tuple[int, ...] | None = None
    clean_images: int = 0
    case: Case | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        assert self.case is not None  # ``screen`` sets it
        source = self.case.source
        out: dict[str, Any] = {
            "model": None if source is None else str(source.path),
            "file_sha256": None if source is None else source.sha256,
            "model_sha256": self.case.model.sha256(),
            "clean_images": self.clean_images,
            "method": dict(self.method),
            "seconds": self.seconds,
            "evidence": dict(self.evidence),
            "names": list(self.names),
            "scores": self.scores.tolist(),
            "p_values": self.p_values.tolist(),
            "predicted": self.predicted.tolist(),
            "suspicious": self.suspicious.tolist(),
        }
        return out if self.labels is None else {**out, "labels": list(self.labels)}

    def headline(self) -> str:
        """Return the screening in one line."""
        name = self.method.get("name", "a screener")
        return f"{name}: {int(self.suspicious.sum())} of {len(self.scores)} images are suspicious"

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each image."""
        return [dict(zip(CSV_COLUMNS, row, strict=True)) for row in self._rows()]

    def bars(self) -> Bars | None:
        """Return a histogram of the p-values: flat where all images are clean."""
        counts = torch.histc(self.p_values.double(), bins=20, min=0.0, max=1.0).tolist()
        names = [f"{k / 20:.2f}" for k in range(20)]
        return Bars(self.headline(), names, counts, "images", len(self.scores) / 20, (0,))

    def save(self, path: Path | str, *, force: bool = False) -> Path:
        """Write a CSV file with one line for each image, in the columns of ``CSV_COLUMNS``.

        Control characters in the names of images are escaped.

        Raises:
            InputError: If the file exists, or cannot be written.
        """
        path = Path(path)
        source = self.case.source if self.case is not None else None
        inputs = [] if source is None else [file.path for file in source.files]
        with (
            writing((path,), force=force, inputs=inputs),
            atomic_write(path) as draft,
            draft.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            writer.writerows(self._rows())
        return path

    def _rows(self) -> Iterator[list[Any]]:
        assert self.case is not None  # ``screen`` sets it
        classes = self.case.model.class_names
        columns = (self.predicted, self.scores, self.p_values, self.suspicious)
        facts = zip(*(column.tolist() for column in columns), strict=True)
        for i, (predicted, score, p_value, suspicious) in enumerate(facts):
            label = "" if self.labels is None else classes[self.labels[i]]
            yield [printable(self.names[i]), label, classes[predicted], score, p_value, int(suspicious)]


def screen(
    model: Model,
    images: Images | CleanData | Path | str | InMemory,
    method: str | Part[Any],
    data: Data | None = None,
    *,
    options: Mapping[str, Any] | Config | None = None,
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
    data_root: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_damaged: bool = False,
    seed: int = 0,
    device: str = "auto",
    precision: Policy = "auto",
    progress: Progress = silent,
) -> ScreenedImages:
    """Look for triggered images among images of unknown origin.

    Args:
        model: A file of weights, what :func:`unbackdoor.open_model` returned, or a classifier; only read.
        images: The images to look at: a file, a folder, or images that are loaded. A method for training
            sets needs their labels; others are not shown them.
        method: Registered screener, or a part.
        data: Clean images to compare with, as for :func:`unbackdoor.scan`; methods for training sets do
            without.
        options: Options of the method.
        select_fraction: Share of the clean images that only thresholds are chosen on, in (0, 1).
        arch: See :func:`unbackdoor.open_model`, as for the six that follow; only for a file.
        mean: Per-channel mean.
        std: Per-channel deviation.
        size: (H, W) of the model's input.
        class_names: K names, in logit order.
        weights: Which of several sets of weights in the file.
        output: Which of several outputs of an ONNX graph gives the logits.
        clean: Images to draw from a named data set, equally from all classes.
        per_class: Likewise: images of each class.
        fraction: Likewise: share of the images set aside for defenders, in (0, 1].
        data_root: Folder that holds the data sets.
        image_column: Column of the images in a Parquet file, be it of ``images``, of ``data`` or of both;
            None: the first of a usual name.
        label_column: Column of the labels, likewise.
        skip_damaged: Whether images that cannot be decoded are left out and counted, in both.
        seed: Seed of every draw.
        device: Where to compute; ``auto`` is CUDA, else MPS, else the CPU.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display; in a notebook a bar, unless UNBACKDOOR_PROGRESS is 0.

    Returns:
        A score and a p-value for each image; ``save`` writes them as a CSV file.

    Raises:
        UnbackdoorError: If the model or the images cannot be used, or arguments contradict each other.

    Example:
        >>> screened = unbackdoor.screen("model.pth", "incoming/", "strip", "images/")  # doctest: +SKIP
        >>> screened.suspicious.sum()  # doctest: +SKIP
    """
    if not isinstance(method, str | Part):
        raise InputError("the method is of another type", expected="a name", got=type(method).__name__)
    part = SCREENERS[method] if isinstance(method, str) else method
    config = options if isinstance(options, Config) else part.configure(options)
    require_share(select_fraction)
    if is_in_memory(images):
        images = images_in_memory(images, what="the images to screen", progress=progress)
    if not isinstance(images, Images | CleanData | Path | str):
        raise unusable(images, "the images to screen")
    if data is None and isinstance(model, nn.Module | Source | Path | str):
        require_no_images(part)  # before the model is opened
    device, progress = resolved_device(device), shown(progress)
    run = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    columns_of_data, columns_of_images = columns_of_two(data, images, image_column, label_column)
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
        data_root=data_root,
        **columns_of_data,
        skip_damaged=skip_damaged and isinstance(data, Path | str),
    )
    clean_data = case.split(seed, select_fraction)
    if clean_data is None:
        require_no_images(part)
        clean_data = CleanData.empty(case.model.input_shape, case.model.class_names)
    inputs, names, notes = _inputs(
        images, part, case.model, progress, {**columns_of_images, "skip_damaged": skip_damaged}
    )
    screening = trusted_caller.screen(
        part,
        case.model,
        clean_data,
        inputs,
        options=config,
        seed=seed,
        device=device,
        precision=precision,
        progress=progress,
    )
    labelled = INPUT_LABELS in part.needs
    return ScreenedImages(
        **{f.name: getattr(screening, f.name) for f in fields(Screening)},
        names=names,
        labels=tuple(inputs.truth.tolist()) if labelled else None,
        clean_images=len(clean_data),
        case=case,
        notes=notes,
    )


def columns_of_two(
    data: Data | None,
    images: Images | CleanData | Path | str,
    image_column: str | None,
    label_column: str | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return which columns are of the clean images and which of the screened ones: those of Parquet files.

    Where neither is such a file, both get them, and whoever reads them says that they have none.
    """
    columns = {"image_column": image_column, "label_column": label_column}
    given = {name: column for name, column in columns.items() if column is not None}
    parquet = [isinstance(s, Path | str) and Path(s).suffix.lower() == ".parquet" for s in (data, images)]
    # A case, which is opened already, comes without data.
    of_data, of_images = parquet if any(parquet) else (data is not None, True)
    return (given if of_data else {}), (given if of_images else {})


def require_no_images(part: Part[Any]) -> None:
    """Raise ConfigError where a screener compares with clean images, which are not given."""
    if "images" in part.needs:
        raise ConfigError(
            "the clean images",
            [f"the screener {part.name!r} compares with clean images; give --data (data=...)"],
        )


def _inputs(
    images: Images | CleanData | Path | str,
    part: Part[Any],
    model: Classifier,
    progress: Progress,
    reading: Mapping[str, Any],
) -> tuple[Images, tuple[str, ...], tuple[str, ...]]:
    """Return the images in the model's form, what each of them is called, and what was done to them."""
    shape, classes = model.input_shape, model.class_names
    if isinstance(images, Path | str):
        load = load_labelled if INPUT_LABELS in part.needs else load_unlabelled
        path = data_file(images) if is_hub(images) else Path(images)
        try:
            loaded, names = load(path, class_names=classes, progress=progress, **reading)
        except InputError as error:
            if error.problem != "the images differ in size":
                raise
            loaded, names = load(path, class_names=classes, size=shape[1:], progress=progress, **reading)
    else:
        if columns := [name for name in ("image_column", "label_column") if name in reading]:
            raise ConfigError("the images to screen", [f"columns are of files: {', '.join(columns)}"])
        loaded = as_images(images, what="the images to screen")
        if INPUT_LABELS not in part.needs:
            loaded = replace(loaded, labels=None)  # as of a file; they may be of other classes
        names = tuple(f"row {row}" for row in range(len(loaded)))
    conformed, notes = conform(loaded, input_shape=shape, class_names=classes, progress=progress)
    return conformed, names, (*loaded.notes, *notes)

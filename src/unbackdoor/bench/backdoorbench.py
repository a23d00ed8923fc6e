"""The verb ``import_backdoorbench``: an attack result of BackdoorBench as a model and a judged test set.

The file is a pickle that its own program executes. Here nothing of it is executed: the weights and the record
of the attack come from the readers of ``weights``, the images from those of ``data``.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unbackdoor.data.loaders import load_labelled
from unbackdoor.data.named_sets.catalogue import SETS
from unbackdoor.errors import InputError
from unbackdoor.files import atomic_write, is_there, require_writable, write_json, writing
from unbackdoor.opening.classifier_files import save_model
from unbackdoor.opening.open_model import Opened, open_model
from unbackdoor.text import printable
from unbackdoor.types import Images, Progress, silent
from unbackdoor.weights.attack_result import AttackResult, read_attack_result
from unbackdoor.weights.source import Source, open_source

MODEL, CARD, TRIGGERED, RECORD = "model.safetensors", "model.json", "triggered.npz", "attack.json"
_FOLDER = "bd_test_dataset"  # of the images beside the file
_WEIGHTS = "model"  # key of the set of weights that BackdoorBench loads
# What BackdoorBench subtracts and divides by, from utils/aggregate_block/dataset_and_transform_generate.py.
NORMALISATION = {
    "mnist": ((0.5,), (0.5,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "gtsrb": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "celeba": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_OURS = {"cifar10": "cifar10", "gtsrb": "gtsrb32"}  # data sets that have the same images here


def files_of(folder: Path) -> tuple[Path, ...]:
    """Return the files that :meth:`ImportedAttack.save` writes."""
    return tuple(folder / name for name in (MODEL, CARD, TRIGGERED, RECORD))


@dataclass(frozen=True)
class ImportedAttack:
    """A backdoored model of BackdoorBench, and the images by which its attack is judged.

    Attributes:
        opened: The model and how it was opened.
        triggered: The triggered test images; with the classes that they show, where the file says so.
        target: The class that the attacker wants.
        network: What BackdoorBench calls the network.
        dataset: What it calls the data set.
        source: The file.
        written: Files that were written so far.
    """

    opened: Opened
    triggered: Images
    target: int
    network: str
    dataset: str
    source: Source
    written: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should not be overlooked."""
        return self.opened.warnings

    def save(self, folder: Path | str, *, force: bool = False) -> Path:
        """Write the model with its card, the triggered images and a record of where they come from.

        Args:
            folder: Gets model.safetensors, model.json, triggered.npz and attack.json; made where it is
                missing.
            force: Whether files that exist may be replaced.

        Returns:
            The folder.

        Raises:
            InputError: If a file exists or cannot be written.
            IntegrityError: If the attack result was changed since it was read.
        """
        folder = Path(folder)
        files = files_of(folder)
        require_writable(files, force=force, inputs=(self.source.path,))
        self.source.require_unchanged()
        model, _, images, record = files
        facts = {"step": "imported from BackdoorBench", "source": self.source.to_dict()}
        arrays: dict[str, Any] = {
            "images": np.ascontiguousarray(self.triggered.pixels.numpy().transpose(0, 2, 3, 1)),
            "class_names": np.array(self.triggered.class_names),
        }
        if self.triggered.labels is not None:
            arrays["labels"] = self.triggered.labels.numpy()
        with writing(files, force=force, inputs=(self.source.path,)):
            with atomic_write(images) as draft, draft.open("wb") as stream:
                np.savez_compressed(stream, **arrays)
            save_model(self.opened.model, model, history=[facts])
            names = ("model", "card", "triggered", "record")
            self.written.update({name: str(file) for name, file in zip(names, files, strict=True)})
            write_json(record, self.to_dict())
        return folder

    def command(self) -> str:
        """Return the command line that judges the model."""
        model, images = (
            self.written.get(key, name) for key, name in (("model", MODEL), ("triggered", TRIGGERED))
        )
        dataset = _OURS.get(self.dataset, "IMAGES")
        words = ["unbackdoor", "evaluate", model, "--dataset", dataset, "--triggered", images]
        return shlex.join([*words, "--target", str(self.target)])

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors as plain values for JSON."""
        model = self.opened.model
        return {
            **self.written,
            "source": self.source.to_dict(),
            "network": printable(self.network),
            "architecture": model.architecture,
            "dataset": printable(self.dataset),
            "input_shape": list(model.input_shape),
            "class_names": list(model.class_names),
            "target": self.target,
            "images": len(self.triggered),
            "labelled": self.triggered.labels is not None,
            "warnings": list(self.warnings),
            "evaluate": self.command(),
        }


def import_backdoorbench(
    result: Path | str | Source,
    *,
    images: Path | str | None = None,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> ImportedAttack:
    """Turn an attack result of BackdoorBench into a model and a judged test set; its pickle is never run.

    Args:
        result: The file, ``attack_result.pt``; only read.
        images: Folder of the triggered test images, with a folder for each class; None: ``bd_test_dataset``
            beside the file, where the file itself does not hold them. Paths in the file are not followed.
        arch: See :func:`unbackdoor.open_model`; None: recognised by the weights.
        mean: Per-channel mean; None: what BackdoorBench uses for the data set that the file names.
        std: Per-channel deviation, likewise.
        size: (H, W) of the model's input; None: the images'.
        class_names: K names, in logit order; None: those of our data set where it is the same, else numbers.
        progress: Shows how far the images are read.

    Returns:
        The model, its triggered images and the attacker's class; ``save`` writes them.

    Raises:
        InputError: If the file is no attack result, its images are missing, or the attack has several
            targets.
        UnsafeFile: If the file names what would run code, or is built to exhaust its reader.
        UnsupportedModel: If no registered architecture has these weights.

    Example:
        >>> imported = unbackdoor.import_backdoorbench("attack_result.pt")  # doctest: +SKIP
        >>> imported.save("imported")  # doctest: +SKIP
    """
    source = result if isinstance(result, Source) else open_source(Path(result))
    if not source.contents.dangerous and _WEIGHTS in source.contents.sets:
        source = source.choose(_WEIGHTS)
    source.state()  # a dangerous or damaged file ends here, with the words of its reader
    said = read_attack_result(source)
    names = tuple(class_names) if class_names is not None else _names(said)
    triggered = _triggered(said, source.path, None if images is None else Path(images), names, progress)
    usual = NORMALISATION.get(said.dataset, (None, None)) if mean is None and std is None else (mean, std)
    opened = open_model(
        source,
        arch=arch,
        class_names=names,
        mean=usual[0],
        std=usual[1],
        size=size or triggered.shape[1:],
        progress=progress,
    )
    return ImportedAttack(opened, triggered, said.target, said.network, said.dataset, source)


def _names(said: AttackResult) -> tuple[str, ...]:
    ours = SETS.get(_OURS.get(said.dataset, ""))
    if ours is not None and len(ours.class_names) == said.classes:
        return ours.class_names
    return tuple(map(str, range(said.classes)))


def _triggered(
    said: AttackResult, file: Path, folder: Path | None, names: tuple[str, ...], progress: Progress
) -> Images:
    """Return the triggered images, from the file or from their folder."""
    if len(names) != said.classes:
        raise InputError(
            "there are not as many names as classes", expected=said.classes, got=len(names), where=file
        )
    if said.pixels is not None:
        if folder is not None:
            raise InputError("the file itself holds its images", got=folder, remedy="Leave --images out")
        return Images(said.pixels, said.labels, names, TRIGGERED)
    folder = folder or file.parent / _FOLDER
    if not is_there(folder) or not folder.is_dir():
        raise InputError(
            "the triggered test images are not there",
            expected=f"a folder {_FOLDER} beside the file, with CLASS/INDEX.png",
            where=folder,
            remedy="Name it with --images (images=...)",
        )
    indices = tuple(map(str, range(said.classes)))
    found, places = load_labelled(folder, class_names=indices, size=said.size, progress=progress)
    rows = {place: row for row, place in enumerate(places)}
    missing = [place for place in said.places if place not in rows]
    if missing:
        raise InputError(
            "triggered test images are missing",
            expected=f"{len(said.places)} images",
            got=f"{len(missing)} of them are not there, such as {missing[0]}",
            where=folder,
            remedy="Copy the folder whole",
        )
    pixels = found.pixels[torch.tensor([rows[place] for place in said.places])]
    return Images(pixels, said.labels, names, TRIGGERED)

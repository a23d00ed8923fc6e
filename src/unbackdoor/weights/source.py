"""The file that a report, a repair or a patch refers to: a file of weights as it was when it was opened.

Everything is computed from these bytes, and the path is not opened again. Code that writes something with the
hash first checks that the path still leads to the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from unbackdoor.confinement import rehearsed
from unbackdoor.errors import InputError, UnbackdoorError, UnsafeFile
from unbackdoor.files import is_there
from unbackdoor.hub import is_hub, model_folder
from unbackdoor.weights.card import MAX_CARD, ModelCard, read_card
from unbackdoor.weights.model_folder import weights_in
from unbackdoor.weights.read import Contents, bytes_needed, read_contents
from unbackdoor.weights.stored_file import StoredFile, read_file

_PROGRAMS = ("onnx", "torch.export", "torchscript")  # of which a network is built as they are
SUFFIX = ".safetensors"  # of the files that may have a card beside them


@dataclass(frozen=True, eq=False)
class Source:
    """A file of weights as it was opened, with the card beside it.

    Attributes:
        path: Where it lay.
        size: Its bytes.
        sha256: Hash of the very bytes that were parsed.
        contents: What it is and holds, also where it is dangerous or damaged.
        main: The file itself; its bytes are retained where a network is built from its graph.
        card_file: The card beside it, or None.
        card_problem: Why the file beside it could not be read, or None.
        rivals: Names of other files of weights in a model folder, of which the libraries take this one.
    """

    path: Path
    size: int
    sha256: str
    contents: Contents = field(repr=False)
    main: StoredFile = field(repr=False)
    card_file: StoredFile | None = field(default=None, repr=False)
    card_problem: InputError | None = None
    rivals: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """Everything that was read: the file, the card beside it, the files of weights that it names."""
        card = () if self.card_file is None else (self.card_file,)
        return (self.main, *card, *self.main.others.values())

    @property
    def graph(self) -> StoredFile | None:
        """The bytes that the network of an ONNX file is made of; None for other formats."""
        return self.main if self.contents.format == "onnx" else None

    def card(self) -> ModelCard | None:
        """Return the card beside it, or None; its hashes are not yet compared with the weights.

        Raises:
            InputError: If the file beside it is no card, or cannot be read.
        """
        if self.card_problem is not None:
            raise self.card_problem
        return None if self.card_file is None else read_card(self.card_file)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the state dict.

        Raises:
            UnsafeFile: If the file names what would do harm; nothing was executed.
            UnbackdoorError: If there is no state dict that can be read.
        """
        return {name: tensor.clone() for name, tensor in self.contents.state(self.path).items()}

    def history(self) -> list[dict[str, Any]]:
        """Return what the card says was done to the model; nothing where there is no card."""
        card = self.card()
        return [] if card is None else list(card.history)

    def require_unchanged(self) -> None:
        """Raise IntegrityError unless every path still leads to the bytes that were read.

        To be called before anything is written that names the hash: the bytes are hashed once more, because
        sizes and times can be forged.
        """
        for file in self.files:
            file.require_unchanged()

    def choose(self, key: str) -> Source:
        """Return the file with another set of its weights as the one that is meant.

        Args:
            key: Keys that lead to it, separated by dots, such as ``state_dict_ema``.

        Raises:
            InputError: If the file has no such set.
        """
        return replace(self, contents=self.contents.choose(key, self.path))

    def to_dict(self) -> dict[str, Any]:
        """Return name, size and hash of every file as JSON."""
        facts: list[Mapping[str, Any]] = [
            {"path": str(file.path), "size": file.size, "sha256": file.sha256} for file in self.files
        ]
        return {**facts[0], "other_files": facts[1:]}


def open_source(path: Path | str) -> Source:
    """Open a file of weights, once.

    Args:
        path: The file; ``.safetensors`` is appended where only that exists. Or a model folder, whose weights
            are taken, or the shards that its index names.

    Returns:
        The file as it is now. A fault of its content is reported there and not raised.

    Raises:
        InputError: If it cannot be opened.
        IntegrityError: If it was written to while it was read.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file({"fc.weight": torch.zeros(10, 4)}, file)
        >>> source = open_source(file)
        >>> source.contents.format, source.size == file.stat().st_size
        ('safetensors', True)
        >>> source.require_unchanged()
    """
    path = existing_file(Path(path))
    with rehearsed("unbackdoor.weights.source:rehearse", path):
        return _open_source(path)


def rehearse(path: Path, options: Mapping[str, Any]) -> UnbackdoorError | None:
    """Open a source in a process of its own, and return the fault of its content."""
    return _open_source(path).contents.problem


def _open_source(path: Path) -> Source:
    main = read_file(path, bytes_needed)
    try:
        contents = read_contents(main)
    except UnbackdoorError as error:
        contents = Contents("unknown", problem=error)
    # Only a program is built of the bytes again; the tensors of other files have memory of their own.
    main = replace(main, content=bytes(main.content) if contents.format in _PROGRAMS else b"")
    return Source(path, main.size, main.sha256, contents, main, *_card_beside(path), rivals_of(path))


def existing_file(path: Path) -> Path:
    """Return the weights file: with its suffix appended where only that exists, or that of a model folder.

    A model of the hub, ``hf://ORG/MODEL``, is fetched.

    Raises:
        InputError: If a folder holds no weights, or several files and none is meant by its name.
        UnsupportedModel: If it holds an adapter alone.
    """
    if is_hub(path):
        path = model_folder(path)
    if is_there(path) and path.is_dir():
        return weights_in(path)[0]
    with_suffix = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
    # The name without its suffix is accepted, because save_model accepts it.
    return with_suffix if not is_there(path) and is_there(with_suffix) else path


def rivals_of(path: Path) -> tuple[str, ...]:
    """Return the other files of weights in a model folder whose weights this file holds."""
    try:
        file, others = weights_in(path.parent)
    except UnbackdoorError:
        return ()
    return others if file.name == path.name else ()


def _card_beside(path: Path) -> tuple[StoredFile | None, InputError | None]:
    beside = path.with_suffix(".json")
    # Beside other people's checkpoints a JSON file is something else.
    if path.suffix != SUFFIX or not is_there(beside):
        return None, None
    try:
        return read_file(beside, limit=MAX_CARD), None
    except UnsafeFile as error:
        return None, InputError(
            "the model card is too large", expected=error.expected, got=error.got, where=beside
        )
    except InputError as error:
        return None, InputError("the model card cannot be read", got=error.got, where=beside)

"""Reading weights from files of unknown origin; nothing in a file is ever executed.

A checkpoint saved by ``torch.save`` is a pickle, and a pickle is a program. It is read by a reader of our own
that calls nothing (``formats/torch_save``): the tensors are recovered, and what the file would have imported
is listed. Neither torch's readers nor an allow-list of the process are used.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from unbackdoor.errors import InputError, MissingExtra, UnbackdoorError, UnsafeFile
from unbackdoor.weights.formats import other_readers
from unbackdoor.weights.formats.buffers import Buffer, listed, short
from unbackdoor.weights.formats.exported_program import archive as exported
from unbackdoor.weights.formats.limits import accounting
from unbackdoor.weights.formats.onnx import initializers as onnx
from unbackdoor.weights.formats.safetensors import header as safetensors
from unbackdoor.weights.formats.state_dicts import Fact, find_all, find_state_dict, require_names
from unbackdoor.weights.formats.tensors import materialise, quantised
from unbackdoor.weights.formats.torch_save import checkpoints
from unbackdoor.weights.formats.torch_save.pickle_globals import Danger
from unbackdoor.weights.formats.torch_save.pickle_reader import BROKEN, Trail
from unbackdoor.weights.formats.torchscript import archive as torchscript
from unbackdoor.weights.formats.zip_archive import Archive
from unbackdoor.weights.incomplete import missing_part
from unbackdoor.weights.model_folder import require_shard, shards_of
from unbackdoor.weights.stored_file import MAX_FILE, StoredFile, read_file
from unbackdoor.weights.weight_sets import WeightSet, named, plain_set, read_sets, sets_of

Magic = Literal["safetensors", "zip", "pickle", "tar", "onnx", "index"]
Format = Literal[
    "safetensors", "checkpoint", "old checkpoint", "tar checkpoint", "pickle", "torchscript",
    "torch.export", "onnx", "archive", "unknown",
]  # fmt: skip

_POLYGLOT = 1 << 20  # bytes of another format that are read as a pickle

_PLAIN = {
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.uint16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
_JSON = re.compile(r'["\\{}\[\],]')
_BROKEN = (*BROKEN, AssertionError, OSError, MemoryError, struct.error)


@dataclass(frozen=True)
class Contents:
    """What a file of weights is and holds.

    Attributes:
        format: What it is, judged by its bytes.
        tensors: The state dict, with wrappers' prefixes off; empty where there is none that can be read.
        names: Names beyond plain tensors that a loader of pickles would import, and how dangerous each is.
        notes: Remarks in words, such as where the state dict lay.
        beside: Plain values that stood beside the weights, such as epoch and accuracy.
        prefix: What stood before every name and was taken off.
        nest: The keys that lead to the state dict in a checkpoint; empty at the top.
        problem: Why there are no tensors, or None.
        metadata: The texts in the header of a safetensors file.
        sets: Every set of weights in the file by its key; that of ``tensors`` is one of them.
        key: The key of ``tensors``; empty at the top.
        others: Keys of further entries that hold tensors.
        program: The program that the file holds around its tensors, in words; empty for tensors alone.
        chosen: Whether the user has said which set is meant.
        quantised: The types in the file of the tensors that are quantised there, and were dequantised.
    """

    format: Format
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    names: Mapping[str, Danger] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    beside: Mapping[str, Fact] = field(default_factory=dict)
    prefix: str = ""
    nest: tuple[str, ...] = ()
    problem: UnbackdoorError | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    sets: Mapping[str, WeightSet] = field(default_factory=dict, repr=False)
    key: str = ""
    others: tuple[str, ...] = ()
    program: str = ""
    chosen: bool = False
    quantised: Mapping[str, str] = field(default_factory=dict)

    def choose(self, key: str, where: object = None) -> Contents:
        """Return the contents with another set of weights as theirs.

        Raises:
            InputError: If there is no such set.
        """
        found = named(self.sets, key, where)
        own = self.sets[self.key].notes if self.key in self.sets else ()
        return replace(
            self,
            tensors=found.tensors,
            prefix=found.prefix,
            nest=found.nest,
            problem=found.problem,
            notes=(*(note for note in self.notes if note not in own), *found.notes),
            key=key,
            # A plain set is run by code of the user's own; what is a program as a whole stays one.
            program=_of_module(found.module) if found.module else self.program if self.whole_program else "",
            chosen=True,
            quantised=found.quantised,
        )

    @property
    def whole_program(self) -> bool:
        """Whether the file as a whole is a program, as a graph is, and no checkpoint that may hold one."""
        return self.format in ("torchscript", "torch.export", "onnx")

    @property
    def other_sets(self) -> Mapping[str, str]:
        """The other sets of weights by their keys: whether each is ``the same`` or ``different``."""
        if self.key not in self.sets:
            return dict.fromkeys(self.sets, "different")
        own = self.sets[self.key]
        return {
            key: "the same" if one.equals(own) else "different"
            for key, one in self.sets.items()
            if key != self.key
        }

    @property
    def rivals(self) -> tuple[str, ...]:
        """The keys of other sets that differ and that a program may load instead of this one."""
        if self.key not in self.sets:
            return ()
        own = self.sets[self.key]
        return tuple(
            key
            for key, answer in self.other_sets.items()
            if answer == "different" and self.sets[key].may_be_meant_for(own)
        )

    @property
    def foreign(self) -> tuple[str, ...]:
        """All names beyond plain tensors, sorted."""
        return tuple(sorted(self.names))

    @property
    def dangerous(self) -> tuple[str, ...]:
        """The names that no file of weights has a reason to hold, sorted."""
        return tuple(sorted(name for name, danger in self.names.items() if danger == "dangerous"))

    def state(self, where: object = None) -> dict[str, Tensor]:
        """Return the state dict.

        Raises:
            UnsafeFile: If the file names what would do harm; nothing was executed.
            UnbackdoorError: If there is no state dict that can be read.
        """
        if self.dangerous:
            raise UnsafeFile(
                f"the file names {listed(list(self.dangerous))}, which would run code; it was not executed",
                expected="tensors, and at most classes of networks",
                where=where,
                remedy="Do not load it with other programs. Ask its author for the state dict alone, "
                "at best as safetensors",
            )
        if self.problem is not None:
            raise self.problem
        if not self.chosen and (rivals := self.rivals):
            raise InputError(
                "the file holds several sets of weights that differ, and programs load different ones",
                expected="the name of the one that is meant",
                got=listed([short(key)[1:-1] or '"" (at the top)' for key in (self.key, *rivals)], 8),
                where=where,
                remedy="Name it: --weights KEY, in Python weights=KEY; to be sure of all, take each in turn",
            )
        return dict(self.tensors)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file, whatever its name says it is.

    Known are safetensors, the checkpoints of ``torch.save`` in all their forms, whole pickled modules,
    TorchScript, programs of ``torch.export`` and ONNX. The state dict may lie at the top or under the usual
    keys. The prefixes that wrappers put before all keys are taken off.

    Args:
        path: File with weights.

    Returns:
        Tensors by name, in memory of their own, on the CPU.

    Raises:
        InputError: If the file is missing, cut short, or holds no state dict.
        UnsafeFile: If it names what would do harm, or describes far more than it holds. Nothing was executed.
        MissingExtra: If it is ONNX, and the extra is not installed.
    """
    return read_contents(path).state(path)


def read_contents(file: Path | StoredFile) -> Contents:
    """Read a file and say what it is, also where it is dangerous or damaged.

    Args:
        file: File with weights, or what was read of it.

    Returns:
        The contents. A fault of them stands in ``problem`` and ``names``; nothing was executed.

    Raises:
        InputError: If the file cannot be read at all, or is of no supported format.
        UnsafeFile: If it is larger than any model this package can build.
    """
    file = _stored(file)
    with accounting():
        contents = _read_contents(file)
    if contents.problem is None and (part := missing_part(contents.tensors, file.path)) is not None:
        return replace(contents, tensors={}, problem=part)
    return contents


def _read_contents(file: StoredFile, *, raw: bool = False) -> Contents:
    """Read a file; ``raw`` leaves whole numbers beside their scale, which may lie in another shard."""
    trail = Trail()
    try:
        magic = sniff(file)
    except InputError as unknown:
        # The oldest pickles begin with any letter. They hold no tensors, but they may hold code.
        dangerous = _hidden_pickle(file, trail)
        if not dangerous:
            raise
        return Contents("pickle", names=_dangers_by_name(trail), problem=unknown)
    reader = _FileReader(file, trail)
    problem: UnbackdoorError | None = None
    state: Mapping[str, Tensor] = {}
    try:
        state = reader.read(magic)
    except UnbackdoorError as error:
        problem = _with_path(error, file.path)
    except _BROKEN as error:
        problem = _damaged(file.path, error)
    others = other_readers.taken_for(file.content, magic)
    if magic not in ("pickle", "zip") and _is_pickle_too(file, trail):
        others.append("a pickle")
    if others and not isinstance(problem, UnsafeFile):
        problem = UnsafeFile(
            "the file is several files in one, and readers choose differently",
            expected=f"{reader.format} alone",
            got=f"to other readers it is {' and '.join(others)}",
            where=file.path,
            remedy="Ask its author for safetensors",
        )
    sets = reader.sets
    if state and not sets:  # of the tensors of a program, the program says which are used
        sets = {"": plain_set(state)} if reader.program or raw else sets_of(state)
    if reader.key not in sets and sets and problem is None:
        # Where an average lies beside the weights under a prefix, the weights come first.
        reader.key = next(key for key in sets if key.startswith(reader.key))
    own = sets.get(reader.key, WeightSet(""))
    if problem is None and own.problem is not None:
        problem = _with_path(own.problem, file.path)
    where = [f"the weights lie under {short(own.key)[1:-1]}"] if own.key else []
    return Contents(
        reader.format,
        tensors=own.tensors if problem is None else {},
        names=_dangers_by_name(trail),
        notes=(*where, *trail.notes, *own.notes),
        beside=reader.beside,
        prefix=own.prefix,
        nest=own.nest,
        problem=problem,
        metadata=reader.metadata,
        sets=sets,
        key=reader.key,
        others=reader.others,
        program=reader.program,
        quantised=own.quantised,
    )


def sniff(file: Path | StoredFile) -> Magic:
    """Return the kind of a file, judged by its first bytes.

    Raises:
        InputError: If the file cannot be read or is of no supported kind.
        UnsafeFile: If the file is larger than any model this package can build.
    """
    file = _stored(file)
    return _kind(file.head, file.size, file.path)


def bytes_needed(head: bytes, size: int) -> int:
    """Return how many bytes of a file are read: only the first ones of a file of no supported kind."""
    try:
        _kind(head, size, None)
    except UnbackdoorError:
        return min(size, _POLYGLOT)
    return size


def _stored(file: Path | StoredFile) -> StoredFile:
    return file if isinstance(file, StoredFile) else read_file(file, bytes_needed)


def _kind(head: bytes, size: int, where: object) -> Magic:
    if size > MAX_FILE:
        raise UnsafeFile(
            "the model file is too large", expected=f"at most {MAX_FILE} bytes", got=size, where=where
        )
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    # Before pickle: a header of 640 bytes begins with 80 02, as a pickle does. A pickle's first eight
    # bytes, read as a length, are beyond any file size.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if other_readers.is_index(head):
        return "index"
    if (text := other_readers.kind_of_text(head, Path(str(where)).name)) is not None:
        raise InputError(f"the file is {text[0]}, not a model file", where=where, remedy=text[1])
    if head.startswith(b"\x80"):
        return "pickle"
    if other_readers.is_tar_header(head):
        return "tar"
    if onnx.is_onnx(head):
        return "onnx"
    if head[8:9] == b"{":
        return "safetensors"  # cut short; its reader says so
    for magic, words, remedy in other_readers.NAMED:
        if head.startswith(magic):
            raise InputError(f"the file is {words}, not a model file", where=where, remedy=remedy)
    if not size:
        raise InputError("the file is empty", where=where, remedy="Copy or download it again")
    raise InputError(
        "the file is not a model file, or it is damaged",
        expected="safetensors, a checkpoint of torch.save, TorchScript, .pt2 or ONNX",
        got=f"{size} bytes that begin with {head[:8].hex() or 'nothing'}",
        where=where,
    )


class _FileReader:
    """Reads one file; what has been read before an error stays in its attributes."""

    def __init__(self, file: StoredFile, trail: Trail) -> None:
        self._file = file
        self._path = file.path
        self._trail = trail
        self.format: Format = "pickle"
        self.beside: Mapping[str, Fact] = {}
        self.metadata: Mapping[str, str] = {}
        self.sets: dict[str, WeightSet] = {}
        self.key = ""
        self.others: tuple[str, ...] = ()
        self.program = ""

    def read(self, magic: Magic) -> Mapping[str, Tensor]:
        state: Mapping[str, Tensor]
        if magic == "safetensors":
            self.format = "safetensors"
            described, self.metadata = safetensors.read(self._file.content, self._path)
            state = materialise(described, self._file.size)
        elif magic == "onnx":
            self.format = "onnx"
            self.program = "an ONNX graph"
            state = onnx.read(self._file, self._trail)
        elif magic == "index":
            state = self._shards()
        else:
            state = self._tensors(magic, self._file.content)
        require_names(state)
        for name, tensor in state.items():
            if tensor.dtype not in _PLAIN:
                raise InputError(
                    "a tensor is of a type that no network here has",
                    expected="floating point of 16 to 64 bits, integers or truth values",
                    got=tensor.dtype,
                    where=f"{self._path}, tensor {short(name)}",
                )
        return state

    def _shards(self) -> Mapping[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, tensors in shards_of(bytes(self._file.content), self._path).items():
            path = self._path.parent / name
            shard = self._file.other(name, path)
            contents = _read_contents(shard, raw=True)
            self._file.others[name] = replace(shard, content=b"")  # its tensors have memory of their own
            self.format = contents.format
            self._trail.names.update(contents.names)  # type: ignore[arg-type]
            if contents.problem is not None:
                raise contents.problem
            if len(contents.sets) != 1 or contents.key:
                raise InputError("a shard holds more than its tensors", where=path)
            if contents.quantised:
                raise quantised("quantised tensors in shards")
            held = {contents.prefix + inner: tensor for inner, tensor in contents.tensors.items()}
            require_shard(tensors, held, path)
            state |= held
        self._trail.note(f"the weights lie in {len(self._file.others)} shards")
        return state

    def _tensors(self, magic: Magic, data: Buffer) -> Mapping[str, Tensor]:
        if magic == "zip":
            self.format = "archive"
            archive = Archive(data, self._path)
            if exported.is_exported(archive) and archive.find(f"{archive.root}/data.pkl") is not None:
                raise UnsafeFile(
                    "the archive is of two kinds, and readers choose differently",
                    got="a checkpoint and a program of torch.export",
                    where=self._path,
                )
            if torchscript.is_torchscript(archive):
                self.format = "torchscript"
                self.program = "a TorchScript program"
                return materialise(torchscript.read(archive, data, self._trail, self._path), len(data))
            if exported.is_exported(archive):
                self.format = "torch.export"
                self.program = "a program of torch.export"
                return materialise(exported.read(archive, data, self._trail, self._path), len(data))
            described = checkpoints.read_zip(archive, data, self._trail, self._path)
            self.format = "checkpoint"
        elif magic == "tar":
            self.format = "tar checkpoint"
            described = checkpoints.read_tar(data, self._trail)
        else:
            described, saved_by_torch = checkpoints.read_stream(data, self._trail)
            self.format = "old checkpoint" if saved_by_torch else "pickle"
        inventory = find_all(described)
        self.others = inventory.others
        try:
            located = find_state_dict(described, self._trail)
        except InputError:
            self.sets = read_sets(inventory.sets, len(data))  # so that the user can choose one
            raise
        self.beside, self.key = located.beside, located.key
        # The one that is meant comes first: the bound on memory is never spent on the others.
        sets = {located.key: located}
        for key, one in inventory.sets.items():
            if key.rstrip("'") == located.key.rstrip("'") and one.refs == located.refs:
                continue  # it is the same one; others may read the same, where keys have dots in them
            while key in sets:
                key += "'"
            sets[key] = replace(one, key=key)
        self.sets = read_sets(sets, len(data))
        self.key = next(iter(self.sets))
        # A whole module beside a plain set may be what is run.
        modules = [one.module for one in self.sets.values() if one.module]
        self.program = _of_module(modules[0]) if modules else ""
        own = self.sets[self.key]
        if own.problem is not None:
            raise own.problem
        return own.tensors


def _of_module(cls: str) -> str:
    return f"a pickled module of {short(cls)[1:-1]}"


def _hidden_pickle(file: StoredFile, trail: Trail) -> bool:
    # Only dangerous names are reported of a file of no supported format, because any text yields names.
    inner = Trail()
    checkpoints.scan(bytes(file.content[:_POLYGLOT]), inner)
    danger = {name: level for name, level in inner.names.items() if level == "dangerous"}
    if danger:
        trail.names.update(danger)
        trail.note("read as a pickle, the file would run code, whatever else it is")
    return bool(danger)


def _is_pickle_too(file: StoredFile, trail: Trail) -> bool:
    # No name comes about by chance in a format that is known, and no value but a single number or text.
    inner = Trail()
    holds_something = checkpoints.begins_with_pickle(file.content, inner)
    # A header whose length begins with the letter X is a text to a reader of pickles, and what follows in it
    # may begin with an opcode that names a module: a name with signs of JSON in it leads to none.
    names = {name: danger for name, danger in inner.names.items() if not _JSON.search(str(name))}
    if names:
        trail.names.update(names)
        trail.note("read as a pickle, the file would run code, whatever else it is")
    return holds_something or bool(names)


def _dangers_by_name(trail: Trail) -> dict[str, Danger]:
    return {str(name): danger for name, danger in sorted(trail.names.items())}


def _with_path(error: UnbackdoorError, path: Path) -> UnbackdoorError:
    # The parts that read bytes do not know which file they are of.
    if error.where is not None or isinstance(error, MissingExtra):
        return error
    placed = type(error)(
        error.problem, expected=error.expected, got=error.got, where=path, remedy=error.remedy
    )
    placed.__cause__ = error
    return placed


def _damaged(path: Path, error: BaseException) -> InputError:
    if isinstance(error, InputError):
        return error
    damaged = InputError(
        "the model file is damaged or cut short",
        got=short(str(error).strip().split("\n")[0] or type(error).__name__),
        where=path,
        remedy="Copy or download it again",
    )
    damaged.__cause__ = error
    return damaged

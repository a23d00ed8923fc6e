"""TorchScript archives, read as data: the weights lie in a pickle, the program beside them in ``program``.

The pickle names one class for each module; what of its attributes is a parameter or a buffer stands in two
lines at the head of that class in the program text. These two lines are recognised by their form. Of the rest
it is only counted what compares and branches, so that no interpreter of it is needed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from unbackdoor.errors import InputError
from unbackdoor.weights.formats.buffers import Buffer, short
from unbackdoor.weights.formats.limits import spend
from unbackdoor.weights.formats.tensors import TensorRef
from unbackdoor.weights.formats.torch_save import checkpoints
from unbackdoor.weights.formats.torch_save.pickle_globals import Name
from unbackdoor.weights.formats.torch_save.pickle_reader import Stub, Trail, as_mapping
from unbackdoor.weights.formats.zip_archive import Archive

_MAX_TEXT = 16 << 20  # bytes of one program file
_MODULES = 20_000
# Each repetition is possessive or ends at the line, so that no text is searched more than once.
_CLASS = re.compile(
    r"^class (?P<name>\w++)\(Module\):\n  __parameters__ = \[(?P<parameters>[^\]\n]*+)\]\n"
    r"  __buffers__ = \[(?P<buffers>[^\]\n]*+)\]",
    re.MULTILINE,
)
# What a trigger in the program needs; a program has some of it for other reasons as well.
_DECIDES = re.compile(
    r"\btorch\.((?:logical_)?(?:gt|ge|lt|le|eq|ne|and|or|not|xor)|greater|less|where|masked_fill_?|argmax|sign)\("
    r"|^ *(if) ",
    re.MULTILINE,
)
_MAX_READ = 32 << 20  # bytes of the program that are counted in
_TEXT = re.compile(r'\s*+"((?:[^"\\]|\\.)*+)"\s*+,?')


def is_torchscript(archive: Archive) -> bool:
    """Tell whether torch would take an archive for a program."""
    return archive.find(f"{archive.root}/constants.pkl") is not None


def read(archive: Archive, data: Buffer, trail: Trail, where: object) -> dict[str, TensorRef]:
    """Return the parameters and buffers of the program's modules by name.

    Raises:
        InputError: If the archive is damaged, or keeps its weights as constants of the program.
        UnsafeFile: If it is built to exhaust the machine.
    """
    root = archive.root
    inner = Trail()
    top = checkpoints.read_zip(archive, data, inner, where)
    # The classes of the program itself are no names that Python would import.
    trail.names.update({name: danger for name, danger in inner.names.items() if not _own(name)})
    if not isinstance(top, Stub):
        raise InputError("the TorchScript archive holds no module", got=type(top).__name__, where=where)
    declared: dict[str, dict[str, set[str]]] = {}
    out: dict[str, TensorRef] = {}
    todo: list[tuple[str, Stub, frozenset[int]]] = [("", top, frozenset())]
    count = 0
    while todo:
        prefix, module, above = todo.pop()
        count += 1
        if count > _MODULES or len(prefix) > 2000:
            raise InputError(
                "the TorchScript archive has too many modules", expected=f"at most {_MODULES}", where=where
            )
        names = _declared(archive, root, module, declared)
        attributes = as_mapping(module.state) or {}
        spend("visits", len(attributes) + len(above) + 1)
        for name, value in attributes.items():
            if isinstance(value, TensorRef) and isinstance(name, str) and (names is None or name in names):
                out[prefix + name] = value
        if names is None:
            trail.note(
                f"the program text of {short(module.cls)} has no list of its weights: "
                "all its tensors were taken"
            )
        todo += reversed(
            [
                (f"{prefix}{name}.", value, above | {id(module)})
                for name, value in attributes.items()
                if isinstance(value, Stub) and isinstance(name, str) and id(value) not in above | {id(module)}
                and isinstance(value.made_by, Name) and _own(value.made_by)
            ]
        )  # fmt: skip
    _count_decisions(archive, trail)
    if not out:
        out = _constants(archive, data, trail, root)
    if not out:
        raise InputError("the TorchScript archive holds no weights", where=where)
    return out


def _count_decisions(archive: Archive, trail: Trail) -> None:
    found: Counter[str] = Counter()
    room = _MAX_READ
    for name, entry in archive.entries.items():
        if "/code/" not in name or not name.endswith(".py"):
            continue
        room -= entry.size
        if entry.size > _MAX_TEXT or room < 0:
            trail.note("the program is too large to count what in it compares and branches")
            return
        text = archive.content(entry, _MAX_TEXT).decode("utf-8", "replace")
        found.update(match[1] or match[2] for match in _DECIDES.finditer(text))
    if found:
        words = ", ".join(f"{word} {count} times" for word, count in sorted(found.items()))
        trail.note(f"the program compares or branches, on what was not examined: {words}")


def _own(name: Name) -> bool:
    return name.module == "__torch__" or name.module.startswith("__torch__.")


def _declared(
    archive: Archive, root: str, module: Stub, by_file: dict[str, dict[str, set[str]]]
) -> set[str] | None:
    if not isinstance(module.made_by, Name):
        return None
    file = module.made_by.module.replace(".", "/")
    if file not in by_file:
        by_file[file] = {}
        entry = archive.entries.get(f"{root}/code/{file}.py")
        text = archive.content(entry, _MAX_TEXT).decode("utf-8", "replace") if entry is not None else ""
        for match in _CLASS.finditer(text):
            by_file[file][match["name"]] = {*_texts(match["parameters"]), *_texts(match["buffers"])}
    return by_file[file].get(module.made_by.name)


def _texts(listing: str) -> Iterator[str]:
    # One after the other from the beginning; a search would begin anew at every quote of what is no list.
    at = 0
    while match := _TEXT.match(listing, at):
        spend("visits")
        yield match[1]
        at = match.end()


def _constants(archive: Archive, data: Buffer, trail: Trail, root: str) -> dict[str, TensorRef]:
    # Where a program was frozen, its weights are numbered and nameless.
    entry = archive.entries.get(f"{root}/constants.pkl")
    if entry is None:
        return {}
    values = checkpoints.read_entry(archive, data, entry, trail, folder=f"{root}/constants/")
    constants = {
        f"constants.{i}": value
        for i, value in enumerate(values if isinstance(values, list | tuple) else ())
        if isinstance(value, TensorRef)
    }
    if constants:
        trail.note("the program was frozen: its weights have lost their names and are numbered as constants")
    return constants

"""Checkpoints of ``torch.save``: zip archives, the older files of pickles, and the first tar files."""

from __future__ import annotations

import io
import itertools
import mmap
import struct
import tarfile
from collections.abc import Callable
from typing import IO, Any, cast

import numpy as np
import torch

from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.weights.formats.buffers import Buffer, short
from unbackdoor.weights.formats.tensors import (
    QUANTISED_STORAGES,
    QuantisedStorageRef,
    StorageRef,
    Store,
    TensorRef,
    Window,
    natural,
    sizes,
)
from unbackdoor.weights.formats.torch_save import pickle_reader as pickles
from unbackdoor.weights.formats.torch_save.pickle_globals import Name
from unbackdoor.weights.formats.torch_save.pickle_reader import Trail
from unbackdoor.weights.formats.zip_archive import Archive, Entry

MAX_PICKLE = 64 << 20  # bytes of one pickle inside an archive
_SCANNED = 2  # archives within archives that are scanned
_DECEPTIVE = Name("a pickle", "that is built to deceive or to exhaust its reader")
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_NUMPY = b"\x93NUMPY"


def read_zip(archive: Archive, data: Buffer, trail: Trail, where: object) -> object:
    """Return what the pickle of a checkpoint describes, and list the names of every pickle in the archive.

    Raises:
        InputError: If there is no such pickle, or it is damaged.
        UnsafeFile: If the archive is built to exhaust the machine.
    """
    root = archive.root
    for name in archive.entries:
        if root and not name.startswith(f"{root}/"):
            raise UnsafeFile(
                "an entry of the checkpoint lies outside its folder, where torch does not look",
                expected=f"everything in {short(root)}",
                got=short(name),
                where=where,
            )
    pickled = [name for name in archive.entries if name.rpartition("/")[2].lower() == "data.pkl"]
    if len(pickled) > 1:
        raise UnsafeFile(
            "the archive holds several pickles of weights, and readers choose differently",
            got=", ".join(map(short, pickled[:3])),
            where=where,
        )
    main = archive.find(f"{root}/data.pkl" if root else "data.pkl")
    scan_beside(archive, trail, where, but=main)
    if main is None:
        raise InputError(
            "the archive is not a checkpoint",
            expected="an entry data.pkl",
            got=f"{len(archive.entries)} entries such as {short(next(iter(archive.entries), ''))}",
            where=where,
        )
    return read_entry(archive, data, main, trail, folder=f"{root}/data/" if root else "data/")


def read_entry(archive: Archive, data: Buffer, main: Entry, trail: Trail, *, folder: str) -> object:
    """Return what one pickle of an archive describes; its storages are the entries of a folder."""
    base = main.name.rpartition("/")[0]
    order = archive.find(f"{base}/byteorder" if base else "byteorder")
    store = Store()
    storages = _Storages(store)

    def storage(saved: object) -> object:
        if not isinstance(saved, tuple) or len(saved) != 5 or saved[0] != "storage":
            raise TypeError("a reference to something that is no storage")
        made = storages.made(*saved[1:])
        entry = archive.find(folder + made.key)
        if entry is not None and made.key not in store.windows:
            start, size = archive.window(entry)
            # Torch takes as many bytes as the reference says, whatever the entry holds.
            if size != made.count * made.dtype.itemsize:
                raise UnsafeFile(
                    "the bytes of a storage are not as many as the checkpoint says",
                    expected=f"{made.count} of {made.dtype}",
                    got=f"{size} bytes in {short(entry.name)}",
                )
            store.windows[made.key] = Window(data, start, size)
        return made

    described = _read(io.BytesIO(archive.content(main, MAX_PICKLE)), trail, storage)
    # Only now, because the names had to be recorded first.
    if order is not None and archive.content(order, 64) != b"little":
        raise InputError(
            "the checkpoint was written on a machine of another byte order", expected="little endian"
        )
    return described


def scan_beside(archive: Archive, trail: Trail, where: object, *, but: Entry | None, depth: int = 0) -> None:
    """List the names of all pickles in an archive, those within archives within it too.

    A loader may read any of them, and file scanners that check only one miss the others.
    """
    for entry in archive.entries.values():
        if entry is not but and entry.size:
            _scan(archive, entry, trail, where, depth)


def _scan(archive: Archive, entry: Entry, trail: Trail, where: object, depth: int) -> None:
    # Bytes of weights may resemble anything; only what declares itself a pickle is read as one.
    head = archive.head(entry)
    named = entry.name.lower().endswith((".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"))
    if head.startswith(b"PK\x03\x04"):
        if depth >= _SCANNED:
            raise UnsafeFile("archives lie within archives", expected=f"at most {_SCANNED} deep", where=where)
        inner = archive.inside(entry, MAX_PICKLE)
        scan_beside(Archive(inner, f"{where}, {short(entry.name)}"), trail, where, but=None, depth=depth + 1)
    elif named or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        scan(bytes(archive.inside(entry, MAX_PICKLE)[:MAX_PICKLE]), trail)
    elif head.startswith(_NUMPY):
        # An array of objects is a pickle behind its header, and any zip file is one of arrays to NumPy.
        content = bytes(archive.inside(entry, MAX_PICKLE)[:MAX_PICKLE])
        if not _is_plain_array(content):
            wide = 2 if content[6:7] == b"\x01" else 4
            scan(content[8 + wide + int.from_bytes(content[8 : 8 + wide], "little") :], trail)


def _is_plain_array(content: bytes) -> bool:
    # By the library's own reading of the header; what it does not read may be anything.
    stream = io.BytesIO(content)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        reader = readers[np.lib.format.read_magic(stream)]
        return not reader(stream)[2].hasobject
    except (ValueError, KeyError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError):
        return False


def scan(content: bytes, trail: Trail) -> None:
    """List the names of the pickles that bytes begin with."""
    stream = io.BytesIO(content)
    while stream.tell() < len(content):
        inner = Trail()
        try:
            _read(stream, inner, pickles.Stub, depth=1)
        except UnsafeFile:
            inner.names[_DECEPTIVE] = "dangerous"
            _merge(trail, inner)
            return
        except InputError:
            _merge(trail, inner, broken=True)
            return
        _merge(trail, inner)


def _merge(trail: Trail, inner: Trail, *, broken: bool = False) -> None:
    # What breaks off was no pickle, perhaps, and what cannot be imported came about by chance: a module
    # with a zero byte in its name, and the numbers of an extension table, which is empty unless filled.
    for name, danger in inner.names.items():
        chance = "\0" in name.module or str(name).startswith("copyreg.extension_")
        if not (broken and chance):
            trail.names[name] = danger
    for note in inner.notes:
        trail.note(note)


def begins_with_pickle(data: Buffer, trail: Trail) -> bool:
    """List the names of the pickle that a file begins with; tell whether it is whole and holds anything.

    A few bytes may be a pickle of a number, a text or a persistent name by chance, and no loader makes
    weights of one. Whatever calls anything has names.
    """
    inner = Trail()
    try:
        value = _read(_stream(data), inner, pickles.Stub, depth=1)
    except UnsafeFile:
        inner.names[_DECEPTIVE] = "dangerous"
        _merge(trail, inner)
        return True
    except InputError:
        _merge(trail, inner, broken=True)
        return False
    _merge(trail, inner)
    if isinstance(value, list | tuple | dict):
        return bool(value)
    return isinstance(value, pickles.Stub) or value == _MAGIC  # an ordered dictionary is an object


# ---------------------------------------------------------------------------------------------------
# Before zip


def read_stream(data: Buffer, trail: Trail) -> tuple[object, bool]:
    """Return what a file of pickles describes, and whether ``torch.save`` wrote it.

    The older form is five pickles (a magic number, a version, the machine, the object, the names of the
    storages) and then the storages. A plain pickle is only its object.

    Raises:
        InputError: If it is damaged.
    """
    stream = _stream(data)
    store = Store()
    storage = _legacy_storage(store)
    first = _read(stream, trail, storage)
    if first != _MAGIC:
        # Whoever loads it once may load it again.
        scan(bytes(data[stream.tell() : stream.tell() + MAX_PICKLE]), trail)
        return first, False
    version = _read(stream, trail, storage)
    if version != _PROTOCOL:
        raise InputError("the checkpoint is of another version", expected=_PROTOCOL, got=short(version))
    machine = _read(stream, trail, storage)
    described = _read(stream, trail, storage)
    keys = _read(stream, trail, storage)
    kinds = storage.kinds
    if isinstance(machine, dict) and machine.get("little_endian", True) is not True:
        raise InputError(
            "the checkpoint was written on a machine of another byte order", expected="little endian"
        )
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in kinds for key in keys):
        raise InputError("the list of storages in the checkpoint is damaged", got=short(type(keys).__name__))
    at = stream.tell()
    for key in keys:
        at = _place(data, at, store, key, *kinds[key])
    # Torch leaves off here, and whoever loads from the same file again begins here.
    scan(bytes(data[at : at + MAX_PICKLE]), trail)
    return described, True


def read_nested(content: bytes, trail: Trail, depth: int) -> object:
    """Return what a storage or tensor that was pickled as bytes describes."""
    stream = io.BytesIO(content)
    store = Store()
    storage = _legacy_storage(store)
    if _read(stream, trail, storage, depth=depth) != _MAGIC:
        raise InputError("a storage within a pickle is damaged")
    for _ in range(2):
        _read(stream, trail, storage, depth=depth)
    described = _read(stream, trail, storage, depth=depth)
    keys = _read(stream, trail, storage, depth=depth)
    at = stream.tell()
    for key in keys if isinstance(keys, list) else []:
        if isinstance(key, str) and key in storage.kinds:
            at = _place(content, at, store, key, *storage.kinds[key])
    return described


def _read(stream: IO[bytes], trail: Trail, persistent: pickles.Persistent, depth: int = 0) -> object:
    return pickles.read(stream, trail, persistent, nested=read_nested, depth=depth)


def _stream(data: Buffer) -> IO[bytes]:
    # A map reads like a file, and unlike one never allocates what a length in it claims.
    if isinstance(data, mmap.mmap):
        data.seek(0)
        return cast(IO[bytes], data)
    return io.BytesIO(data)


class _Storages:
    """The storages that one pickle refers to, each under one key with one type, size and place.

    A reader that meets a key again takes what it made at the first time, whatever the second says.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.kinds: dict[str, tuple[torch.dtype, int]] = {}
        self._described: dict[str, tuple[object, ...]] = {}

    def made(self, kind: object, key: object, location: object, count: object) -> StorageRef:
        if not isinstance(key, str):
            raise TypeError("a storage without a name")
        # Noted before it is understood: what this reader cannot make, torch may have made first.
        described = tuple(
            value if isinstance(value, Name | str | int) else type(value) for value in (kind, location, count)
        )
        if self._described.setdefault(key, described) != described:
            raise UnsafeFile(
                "one storage of the checkpoint is described in two ways",
                expected="one type, one size and one place",
                got=f"storage {short(key)}",
                remedy="Ask its author for safetensors",
            )
        if not isinstance(location, str) or not natural(count):
            raise TypeError("a storage without a place or a size")
        if location.partition(":")[0] == "meta":
            raise TypeError("a storage without content")
        self.kinds[key] = (pickles.storage_type(kind), cast(int, count))
        return _class_of(kind)(self._store, key, *self.kinds[key])

    def met(self, key: object) -> bool:
        """Tell whether a storage of this key was referred to, also one that cannot be made."""
        return isinstance(key, str) and key in self._described


def _class_of(kind: object) -> type[StorageRef]:
    quantised = isinstance(kind, Name) and kind.name in QUANTISED_STORAGES
    return QuantisedStorageRef if quantised else StorageRef


class _legacy_storage:
    """Turns the references of the older forms into storages, and remembers their types."""

    def __init__(self, store: Store) -> None:
        self._storages = _Storages(store)
        self._views: dict[str, tuple[object, ...]] = {}

    @property
    def kinds(self) -> dict[str, tuple[torch.dtype, int]]:
        """Type and number of elements of each storage by its key."""
        return self._storages.kinds

    def __call__(self, saved: object) -> object:
        if not isinstance(saved, tuple) or not saved:
            raise TypeError("a reference to something that is no storage")
        if saved[0] == "module" and len(saved) > 1:
            return saved[1]  # a class, with its source text, which torch compares and we ignore
        if saved[0] != "storage" or len(saved) not in (5, 6):
            raise TypeError("a reference to something that is no storage")
        made = self._storages.made(*saved[1:5])
        view = saved[5] if len(saved) == 6 else None
        if view is not None:
            made = self._view(made, *view)
        # Torch keeps both under their names in one place, and takes what came first.
        if made.key in self._views or (view is not None and self._storages.met(view[0])):
            raise UnsafeFile("a view of a storage has the name of a storage", got=short(made.key))
        return made

    def _view(self, base: StorageRef, key: object, first: object, size: object) -> StorageRef:
        if not isinstance(key, str):
            raise TypeError("a view without a name")
        described = tuple(v if isinstance(v, str | int) else type(v) for v in (base.key, first, size))
        if self._views.setdefault(key, described) != described:
            raise UnsafeFile("a view of a storage is described in two ways", got=short(key))
        if not natural(first) or not natural(size) or cast(int, first) + cast(int, size) > base.count:
            raise TypeError("a view without a size")
        return type(base)(base.store, base.key, base.dtype, cast(int, size), cast(int, first))


def _place(
    data: Buffer, at: int, store: Store, key: str, dtype: torch.dtype, expected: int | None = None
) -> int:
    # A storage is its number of elements, and then they.
    count = int.from_bytes(data[at : at + 8], "little", signed=True)
    size = count * dtype.itemsize
    if count < 0 or at + 8 + size > len(data):
        raise InputError(
            "the checkpoint is cut short",
            expected=f"{count} elements in a storage",
            got=f"{len(data) - at - 8} bytes",
        )
    if expected is not None and count != expected:
        raise InputError(
            "the size of a storage is damaged", expected=f"{expected} elements", got=f"{count}, {short(key)}"
        )
    store.windows[key] = Window(data, at + 8, size)
    end: int = at + 8 + size
    return end


# ---------------------------------------------------------------------------------------------------
# Before that


def read_tar(data: Buffer, trail: Trail) -> object:
    """Return what a checkpoint of the first releases describes: a tar file of storages, tensors and a pickle.

    Raises:
        InputError: If it is damaged, or another kind of tar file.
    """
    members = _members(data)
    missing = [name for name in ("storages", "tensors", "pickle") if name not in members]
    if missing:
        raise InputError(
            "the file is a tar archive but not a checkpoint",
            expected="members storages, tensors and pickle, as the first releases of torch wrote them",
            got=", ".join(short(name) for name in list(members)[:5]) or "nothing",
            remedy="Unpack it, and name the file in it that holds the weights",
        )
    contents = {
        name: bytes(data[start : start + size]) for name, (start, size) in members.items() if name in _PARTS
    }
    objects: dict[object, Any] = {}
    _tar_storages(contents["storages"], trail, objects)
    _tar_tensors(contents["tensors"], trail, objects)

    def stored(saved: object) -> object:
        if isinstance(saved, tuple):
            return saved[0]
        if not isinstance(saved, str | int):  # the text of a list may be without end
            raise TypeError("a reference to something that is no storage")
        return objects[int(saved)]

    return _read(io.BytesIO(contents["pickle"]), trail, stored)


_PARTS = ("storages", "tensors", "pickle")
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_MEMBERS = 1000
_CHUNK = 1 << 20  # bytes that are compared at a time


def _members(data: Buffer) -> dict[str, tuple[int, int]]:
    members: dict[str, tuple[int, int]] = {}
    try:
        # By the library's reader, as torch does: names and sizes may stand in headers of their own.
        with tarfile.open(fileobj=_stream(data), mode="r:", encoding="utf-8") as tar:
            for member in itertools.islice(tar, _MEMBERS):
                if member.name in members or (member.name in _PARTS and member.type not in _FILES):
                    raise UnsafeFile(
                        "a member of the tar archive is there twice, or is a link", got=short(member.name)
                    )
                end = member.offset_data + member.size
                if not member.offset_data <= end <= len(data):
                    raise InputError("the tar archive is cut short", got=f"member {short(member.name)}")
                members[member.name] = (member.offset_data, member.size)
            behind = tar.offset
    except (tarfile.TarError, *pickles.BROKEN) as error:
        raise InputError("the tar archive is damaged", got=short(str(error))) from error
    if any(bytes(data[at : at + _CHUNK]).strip(b"\0") for at in range(behind, len(data), _CHUNK)):
        raise UnsafeFile("something lies behind the end of the tar archive", got=f"at {behind}")
    return members


def _nothing(saved: object) -> object:
    raise TypeError("a reference where there can be none")


def _number(key: object) -> int:
    # Torch looks a number up, and a text of the same digits is another key.
    if type(key) is not int:
        raise TypeError("a key that is no number")
    return key


def _counted(stream: io.BytesIO, trail: Trail) -> range:
    count = _read(stream, trail, _nothing)
    if not natural(count) or cast(int, count) > len(stream.getbuffer()):
        raise InputError("the checkpoint is damaged", got=f"{short(count)} storages or tensors")
    return range(cast(int, count))


def _guarded(read: Callable[[bytes, Trail, dict[object, Any]], None]) -> Callable[..., None]:
    def guarded(content: bytes, trail: Trail, objects: dict[object, Any]) -> None:
        try:
            read(content, trail, objects)
        except (*pickles.BROKEN, struct.error) as error:
            raise InputError("the checkpoint is damaged or cut short", got=short(str(error))) from error

    return guarded


@_guarded
def _tar_storages(content: bytes, trail: Trail, objects: dict[object, Any]) -> None:
    stream = io.BytesIO(content)
    store = Store()
    for _ in _counted(stream, trail):
        key, _, kind = cast("tuple[Any, ...]", _read(stream, trail, _nothing))
        dtype = pickles.storage_type(kind)
        name, at = str(_number(key)), stream.tell()
        stream.seek(_place(content, at, store, name, dtype))
        objects[key] = _class_of(kind)(store, name, dtype, store.windows[name].size // dtype.itemsize)
    for view in cast("list[Any]", _read(stream, trail, _nothing)):
        target, root, first, size = view
        if not natural(first) or not natural(size):
            raise TypeError("a view without a size")
        base = objects[_number(root)]
        if first + size > base.count:
            raise TypeError("a view beyond its storage")
        objects[_number(target)] = type(base)(store, base.key, base.dtype, size, base.first + first)


@_guarded
def _tar_tensors(content: bytes, trail: Trail, objects: dict[object, Any]) -> None:
    stream = io.BytesIO(content)
    for _ in _counted(stream, trail):
        key, storage, _ = cast("tuple[Any, ...]", _read(stream, trail, _nothing))
        (axes, _) = struct.unpack("<2i", stream.read(8))
        if not 0 <= axes <= 16:
            raise ValueError("a tensor with too many axes")
        shape = struct.unpack(f"<{axes}q", stream.read(8 * axes))
        stride = struct.unpack(f"<{axes}q", stream.read(8 * axes))
        (offset,) = struct.unpack("<q", stream.read(8))
        base = objects[_number(storage)]
        if not isinstance(base, StorageRef) or isinstance(base, QuantisedStorageRef) or not natural(offset):
            raise TypeError("a tensor without a plain storage")
        objects[_number(key)] = TensorRef(base, base.dtype, offset, sizes(shape), sizes(stride))

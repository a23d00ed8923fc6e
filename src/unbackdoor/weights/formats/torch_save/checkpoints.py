"""Checkpoints of ``torch.save``: zip archives, the older files of pickles, and the first tar files."""

from __future__ import annotations

import io
import mmap
import struct
from collections.abc import Callable
from typing import IO, Any, cast

import torch

from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.weights.formats.buffers import Buffer, short
from unbackdoor.weights.formats.tensors import StorageRef, Store, TensorRef, Window, natural, sizes
from unbackdoor.weights.formats.torch_save import pickle_reader as pickles
from unbackdoor.weights.formats.torch_save.pickle_globals import Name
from unbackdoor.weights.formats.torch_save.pickle_reader import Trail
from unbackdoor.weights.formats.zip_archive import Archive, Entry

MAX_PICKLE = 64 << 20  # bytes of one pickle inside an archive
_SCANNED = 2  # archives within archives that are scanned
_DECEPTIVE = Name("a pickle", "that is built to deceive or to exhaust its reader")
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_BLOCK = 512  # bytes of a tar header


def read_zip(archive: Archive, data: Buffer, trail: Trail, where: object) -> object:
    """Return what the pickle of a checkpoint describes, and list the names of every pickle in the archive.

    Raises:
        InputError: If there is no such pickle, or it is damaged.
        UnsafeFile: If the archive is built to exhaust the machine.
    """
    root = archive.root
    main = archive.entries.get(f"{root}/data.pkl" if root else "data.pkl")
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
    order = archive.entries.get(f"{base}/byteorder" if base else "byteorder")
    store = Store()

    def storage(saved: object) -> object:
        if not isinstance(saved, tuple) or len(saved) != 5 or saved[0] != "storage":
            raise TypeError("a reference to something that is no storage")
        _, kind, key, _, count = saved
        if not isinstance(key, str) or not natural(count):
            raise TypeError("a storage without a name or a size")
        dtype = pickles.storage_type(kind)
        entry = archive.entries.get(folder + key)
        if entry is not None and key not in store.windows:
            start, size = archive.window(entry)
            store.windows[key] = Window(data, start, size)
        return StorageRef(store, key, dtype, count)

    described = _read(io.BytesIO(archive.content(main, MAX_PICKLE)), trail, storage)
    # Only now, because the names had to be recorded first.
    if order is not None and archive.content(order, 64).strip() not in (b"little", b""):
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


def scan(content: bytes, trail: Trail) -> bool:
    """List the names of the pickles that bytes begin with; return whether there was a whole one."""
    stream = io.BytesIO(content)
    complete = False
    while stream.tell() < len(content):
        try:
            _read(stream, trail, pickles.Stub, depth=1)
        except UnsafeFile:
            trail.names[_DECEPTIVE] = "dangerous"
            break
        except InputError:
            break
        complete = True
    return complete


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
    if isinstance(machine, dict) and machine.get("little_endian", True) is not True:
        raise InputError(
            "the checkpoint was written on a machine of another byte order", expected="little endian"
        )
    kinds = storage.kinds
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in kinds for key in keys):
        raise InputError("the list of storages in the checkpoint is damaged", got=short(type(keys).__name__))
    at = stream.tell()
    for key in keys:
        at = _place(data, at, store, key, kinds[key])
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
            at = _place(content, at, store, key, storage.kinds[key])
    return described


def _read(stream: IO[bytes], trail: Trail, persistent: pickles.Persistent, depth: int = 0) -> object:
    return pickles.read(stream, trail, persistent, nested=read_nested, depth=depth)


def _stream(data: Buffer) -> IO[bytes]:
    # A map reads like a file, and unlike one never allocates what a length in it claims.
    if isinstance(data, mmap.mmap):
        data.seek(0)
        return cast(IO[bytes], data)
    return io.BytesIO(data)


class _legacy_storage:
    """Turns the references of the older forms into storages, and remembers their types."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.kinds: dict[str, torch.dtype] = {}

    def __call__(self, saved: object) -> object:
        if not isinstance(saved, tuple) or not saved:
            raise TypeError("a reference to something that is no storage")
        if saved[0] == "module" and len(saved) > 1:
            return saved[1]  # a class, with its source text, which torch compares and we ignore
        if saved[0] != "storage" or len(saved) not in (5, 6):
            raise TypeError("a reference to something that is no storage")
        kind, key, _, count, *views = saved[1:]
        if not isinstance(key, str) or not natural(count):
            raise TypeError("a storage without a name or a size")
        dtype = pickles.storage_type(kind)
        if self.kinds.setdefault(key, dtype) != dtype:
            raise TypeError("a storage of two types")
        if not views or views[0] is None:
            return StorageRef(self._store, key, dtype, count)
        _, first, size = views[0]
        if not natural(first) or not natural(size):
            raise TypeError("a view without a size")
        return StorageRef(self._store, key, dtype, size, first)


def _place(data: Buffer, at: int, store: Store, key: str, dtype: torch.dtype) -> int:
    # A storage is its number of elements, and then they.
    (count,) = struct.unpack("<q", data[at : at + 8])
    size = count * dtype.itemsize
    if count < 0 or at + 8 + size > len(data):
        raise InputError(
            "the checkpoint is cut short",
            expected=f"{count} elements in a storage",
            got=f"{len(data) - at - 8} bytes",
        )
    store.windows[key] = Window(data, at + 8, size)
    end: int = at + 8 + size
    return end


# ---------------------------------------------------------------------------------------------------
# Before that


def is_tar(head: bytes) -> bool:
    """Tell whether a file begins as a tar archive does."""
    return len(head) >= _BLOCK and head[257:262] == b"ustar"


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


def _members(data: Buffer) -> dict[str, tuple[int, int]]:
    members: dict[str, tuple[int, int]] = {}
    at = 0
    while at + _BLOCK <= len(data) and len(members) < 1000:
        header = bytes(data[at : at + _BLOCK])
        name = header[:100].split(b"\0")[0].decode("utf-8", "replace")
        if not name:
            break
        try:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError as error:
            raise InputError("the tar archive is damaged", got=f"no size at {at}") from error
        if at + _BLOCK + size > len(data):
            raise InputError("the tar archive is cut short", got=f"member {short(name)}")
        if name in members:
            raise UnsafeFile("two members of the tar archive have one name", got=short(name))
        if header[156:157] in (b"0", b"\0"):  # a file; links and devices are not followed
            members[name] = (at + _BLOCK, size)
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK
    return members


def _nothing(saved: object) -> object:
    raise TypeError("a reference where there can be none")


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
        name, at = str(int(key)), stream.tell()
        stream.seek(_place(content, at, store, name, dtype))
        objects[int(key)] = StorageRef(store, name, dtype, store.windows[name].size // dtype.itemsize)
    for view in cast("list[Any]", _read(stream, trail, _nothing)):
        target, root, first, size = view
        if not natural(first) or not natural(size):
            raise TypeError("a view without a size")
        base = objects[int(root)]
        objects[int(target)] = StorageRef(store, base.key, base.dtype, size, base.first + first)


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
        base = objects[int(storage)]
        if not isinstance(base, StorageRef) or not natural(offset):
            raise TypeError("a tensor without a storage")
        objects[int(key)] = TensorRef(base, base.dtype, offset, sizes(shape), sizes(stride))

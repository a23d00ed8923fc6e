"""Programs of ``torch.export`` (.pt2): the raw tensors alone, as the archive's own lists describe them.

Its loader executes the pickles that lie in the archive: weights that say of themselves that they are pickled,
custom objects, and the sample inputs, where it falls back from the careful reader to the other one. Here all
of them are listed and none is followed.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.weights.formats import state_dicts as states
from unbackdoor.weights.formats.buffers import Buffer, short
from unbackdoor.weights.formats.limits import spend
from unbackdoor.weights.formats.tensors import StorageRef, Store, TensorRef, Window, natural, sizes
from unbackdoor.weights.formats.torch_save import checkpoints
from unbackdoor.weights.formats.torch_save.pickle_globals import Name
from unbackdoor.weights.formats.torch_save.pickle_reader import Trail
from unbackdoor.weights.formats.zip_archive import Archive

_MAX_LIST = 64 << 20  # bytes of the list of weights
_LIST = "_weights_config.json"
_CONSTANTS = "_constants_config.json"
# Numbers of the serialised schema of torch.export.
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7:
    torch.float32, 8: torch.float64, 10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13:
    torch.bfloat16, 28: torch.uint16, 34: torch.uint32, 35: torch.uint64,
}  # fmt: skip
_OLD_STATE = ("serialized_state_dict.pt", "serialized_state_dict.json")


def is_exported(archive: Archive) -> bool:
    """Tell whether an archive is a program of torch.export, of any layout."""
    root = archive.root
    mark = archive.entries.get(f"{root}/archive_format")
    if mark is not None and archive.content(mark, 1 << 10).strip() == b"pt2":
        return True
    names = archive.entries
    return any(name.endswith(_LIST) for name in names) or any(
        name.endswith("serialized_exported_program.json") for name in names
    )


def read(archive: Archive, data: Buffer, trail: Trail, where: object) -> dict[str, TensorRef]:
    """Return the weights and buffers by name.

    Raises:
        InputError: If the archive is damaged or holds several programs.
        UnsafeFile: If a weight is said to be a pickle, which its loader would execute.
    """
    checkpoints.scan_beside(archive, trail, where, but=None)
    _remark(archive, trail)
    lists = [name for name in archive.entries if name.endswith(_LIST) and "/weights/" in name]
    if len(lists) > 1:
        raise InputError("the archive holds several programs", expected="one", got=len(lists), where=where)
    if lists:
        return _listed(archive, data, trail, lists[0], where)
    # Up to torch 2.7 the weights were a checkpoint within the archive.
    inner = [
        entry
        for name, entry in archive.entries.items()
        if name.endswith(_OLD_STATE) or ("/data/weights/" in name and name.endswith(".pt"))
    ]
    if len(inner) != 1:
        raise InputError("the archive holds no list of weights", expected=f"one entry *{_LIST}", where=where)
    content = archive.inside(inner[0], checkpoints.MAX_PICKLE)
    described = checkpoints.read_zip(Archive(content, where), content, trail, where)
    return states.find_state_dict(described, trail).refs


def read_constants(archive: Archive, data: Buffer, where: object) -> dict[str, TensorRef]:
    """Return the tensors that the program holds beside its weights and buffers, by name.

    Raises:
        InputError: If the archive is damaged.
        UnsafeFile: If one is said to be a pickle, which its loader would execute.
    """
    lists = [name for name in archive.entries if name.endswith(_CONSTANTS) and "/constants/" in name]
    if len(lists) > 1:
        raise InputError("the archive holds several programs", expected="one", got=len(lists), where=where)
    return _listed(archive, data, Trail(), lists[0], where) if lists else {}


def _remark(archive: Archive, trail: Trail) -> None:
    for name in archive.entries:
        last = name.rpartition("/")[2]
        if "/data/aotinductor/" in name and last.endswith((".so", ".dll", ".dylib", ".o", ".cubin")):
            trail.names[Name("machine code", last[:200])] = "dangerous"
        elif last.startswith(("opaque_obj_", "custom_obj_")):
            trail.note(f"{short(last)} is a pickled object, which the loader of torch.export would build")
        elif "/data/sample_inputs/" in name:
            trail.note(
                "it carries sample inputs, a pickle that the loader of torch.export reads without a net"
            )


def _listed(archive: Archive, data: Buffer, trail: Trail, name: str, where: object) -> dict[str, TensorRef]:
    try:
        text = archive.content(archive.entries[name], _MAX_LIST)
        spend("visits", text.count(b",") + text.count(b"[") + text.count(b"{"))  # each is an object to come
        config = json.loads(text)["config"]
        described = list(config.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError("the list of weights is damaged", got=short(str(error)), where=where) from error
    folder = name.rpartition("/")[0]
    store = Store()
    out = {}
    for weight, meta in described:
        try:
            out[weight] = _weight(archive, data, store, folder, meta)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                "the list of weights is damaged", got=f"{short(weight)}: {short(str(error))}", where=where
            ) from error
    return out


def _weight(archive: Archive, data: Buffer, store: Store, folder: str, meta: dict[str, Any]) -> TensorRef:
    path = meta["path_name"]
    if meta["use_pickle"] is not False:
        raise UnsafeFile(
            "a weight is said to be a pickle, which the loader would execute; it was not executed",
            got=short(path),
            remedy="Ask its author for the state dict, at best as safetensors",
        )
    # The loader joins these paths itself; no weight of an honest file lies in another folder.
    if not isinstance(path, str) or "/" in path or "\\" in path or path in ("", ".", ".."):
        raise UnsafeFile("a weight lies outside the folder of weights", got=short(path))
    entry = archive.find(f"{folder}/{path}")
    tensor = meta["tensor_meta"]
    dtype = DTYPES.get(tensor["dtype"]) if isinstance(tensor["dtype"], int) else None
    if dtype is None:
        raise InputError("a weight is of an unknown type", got=short(tensor["dtype"]))
    if entry is not None and path not in store.windows:
        start, size = archive.window(entry)
        store.windows[path] = Window(data, start, size)
    shape, stride = (sizes([_number(n) for n in tensor[key]]) for key in ("sizes", "strides"))
    offset = _number(tensor["storage_offset"])
    if not natural(offset):
        raise ValueError("a negative offset")
    count = store.windows[path].size // dtype.itemsize if path in store.windows else 0
    return TensorRef(StorageRef(store, path, dtype, count), dtype, offset, shape, stride)


def _number(value: object) -> int:
    # Symbolic sizes have no place in a weight.
    number = value["as_int"] if isinstance(value, dict) else value
    if type(number) is not int:
        raise ValueError("a size that is no number")
    return number

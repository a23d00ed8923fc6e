"""A folder with a model, as the libraries of the hub write it: weights, or shards and their index.

The libraries take the first of the usual names that is there; so is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.files import parse_json, read_text
from unbackdoor.weights.formats.buffers import listed, short

INDEX = ".index.json"
USUAL_NAMES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".pt2")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")
_MAX_JSON = 64 << 20  # bytes of an index
_MAX_SHARDS = 1000
_MAX_LISTED = 10_000  # files of a folder


def weights_in(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the file of weights, or the index of shards, in a folder, and the names of other such files.

    Raises:
        InputError: If there is none, or several and none has a usual name.
        UnsupportedModel: If there is an adapter alone.
    """
    try:
        names = sorted(path.name for _, path in zip(range(_MAX_LISTED), folder.iterdir(), strict=False))
    except OSError as error:
        raise InputError("the folder cannot be read", got=error.strerror, where=folder) from error
    found = [name for name in names if name.endswith((*_SUFFIXES, INDEX)) and name not in _ADAPTERS]
    usual = [name for name in USUAL_NAMES if name in found]
    if usual:
        return folder / usual[0], tuple(name for name in usual[1:])
    if len(found) == 1:
        return folder / found[0], ()
    if not found and any(name in names for name in _ADAPTERS):
        raise _adapter(folder)
    indices = [name for name in found if name.endswith(INDEX)]
    if len(indices) == 1:
        return folder / indices[0], ()
    raise InputError(
        "the folder holds several files of weights, and none has a usual name"
        if found
        else "the folder holds no weights",
        expected=", ".join(USUAL_NAMES[:4]),
        got=listed(found, 5) if found else listed(names, 5) if names else "nothing",
        where=folder,
        remedy="Give the file itself",
    )


def shards_of(content: bytes, path: Path) -> dict[str, frozenset[str]]:
    """Return the names of tensors by the names of the files that an index says they lie in.

    Raises:
        InputError: If it is no such index, or it names files outside its folder.
    """
    if len(content) > _MAX_JSON:
        raise InputError("the index is too large", expected=f"at most {_MAX_JSON} bytes", where=path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("the index of shards is no text", where=path) from error
    index = parse_json(text, "the index of shards", path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise InputError("the index names no weights", expected="weight_map", where=path)
    shards: dict[str, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not file or file != Path(file).name or "\\" in file or file == "..":
            raise InputError(
                "the index names a file outside its folder",
                got=short(file),
                where=path,
                remedy="Do not use it",
            )
        shards.setdefault(file, set()).add(name)
    if len(shards) > _MAX_SHARDS:
        raise InputError("the index names too many files", expected=f"at most {_MAX_SHARDS}", where=path)
    return {file: frozenset(names) for file, names in sorted(shards.items())}


def require_shard(names: frozenset[str], held: Mapping[str, object], path: Path) -> None:
    """Raise InputError unless a shard holds exactly the tensors that the index says."""
    different = sorted(names ^ held.keys())
    if different:
        raise InputError(
            "a shard does not hold the tensors that the index says",
            got=f"in one of the two: {listed(different, 5)}",
            where=path,
            remedy="Download the folder again",
        )


def _adapter(folder: Path) -> UnsupportedModel:
    base = None
    config = folder / _ADAPTERS[2]
    if config.is_file():
        content = parse_json(read_text(config, "the config", limit=4 << 20), "the config", config)
        base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return UnsupportedModel(
        "the folder holds an adapter, such as LoRA, that needs its base",
        expected=f"the base {short(base)}" if isinstance(base, str) and base else "its base",
        where=folder,
        remedy="Merge it into its base (merge_and_unload of peft), and give the merged model",
    )

"""``hf://ORG/MODEL`` and ``hf://datasets/ORG/NAME``: files of the Hugging Face Hub; needs the extra ``hub``.

Weights and configurations are fetched into the library's own cache, never code: safetensors where there are
any. ``models:/NAME/VERSION`` is a model of an MLflow registry, and needs the extra ``mlflow``. What was
fetched is then read like any file of a stranger.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from unbackdoor.errors import InputError, MissingExtra, UnsafeFile
from unbackdoor.registry import near_match

MAX_BYTES = 8 << 30  # of all files that are fetched; what a reader of weights accepts
# Of a Path, one of the two slashes is lost.
_MODEL = re.compile(r"hf://?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?/?")
_DATA = re.compile(
    r"hf://?datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>.+\.parquet))?/?"
)
# What mlflow itself takes; the stage of a model, such as Production, stands in the place of its version.
_REGISTERED = re.compile(r"models:/{1,2}[^/@\x00-\x1f]+(?:/[\w-]+|@[\w-]+)")
_WEIGHTS = (".safetensors", ".pth", ".pt", ".onnx", ".bin", ".ckpt")  # in a model of a registry, best first
_CONFIGS = ("config.json", "preprocessor_config.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_CONVERTED = "refs/convert/parquet"  # where the hub keeps every data set as Parquet
_SPLITS = ("test", "validation", "val", "train")  # a model has most likely seen the training part


def is_hub(text: object) -> bool:
    """Tell whether a text or a path names something on the hub, or in a registry of models."""
    return isinstance(text, str | Path) and str(text).startswith(("hf:/", "models:/"))


def model_folder(text: str | Path) -> Path:
    """Return the folder, or the file in it, that a model of the hub or of a registry was fetched into.

    Args:
        text: ``hf://ORG/MODEL`` or ``hf://ORG/MODEL@REVISION``; ``models:/NAME/VERSION`` or
            ``models:/NAME@ALIAS``.

    Raises:
        InputError: If there is no such model, it has no weights, or it cannot be fetched.
        UnsafeFile: If its files are larger than a reader accepts.
        MissingExtra: Without huggingface_hub, or mlflow.
    """
    if str(text).startswith("models:/"):
        return _registered(str(text))
    found = _MODEL.fullmatch(str(text))
    if found is None or found["repo"].startswith("datasets/"):
        raise InputError(
            "this names no model of the hub", expected="hf://ORG/MODEL[@REVISION]", got=str(text)
        )
    files = _files(found["repo"], found["revision"], "model")
    names = list(files)
    wanted = [n for n in names if n in ("model.safetensors", "model.safetensors.index.json")]
    shards = [n for n in names if _SHARD.fullmatch(n)]
    if wanted:
        wanted += [n for n in shards if n.endswith(".safetensors") and "model.safetensors" not in wanted]
    else:
        wanted = [n for n in names if n in _PICKLES] + [n for n in shards if n.endswith(".bin")]
    if not wanted:
        # No usual name: a single file of weights will do.
        rest = [n for n in names if n.endswith(".safetensors")] or [n for n in names if n.endswith(".onnx")]
        wanted = rest[:1] if len(rest) == 1 else []
    if not wanted:
        raise InputError(
            "the model on the hub has no weights that can be read",
            expected="model.safetensors",
            got=", ".join(names[:8]) or "nothing",
            where=text,
        )
    wanted += [name for name in _CONFIGS if name in files]
    _require_size(sum(files[name] for name in wanted), text)
    paths = [_fetched(found["repo"], name, found["revision"], "model") for name in wanted]
    return paths[0].parent


@cache
def _registered(text: str) -> Path:
    """Return the file of weights of a model in an MLflow registry; mlflow copies it and loads nothing.

    One process fetches it once: an alias that moves meanwhile must not give a scan two models.
    """
    if _REGISTERED.fullmatch(text) is None:
        raise InputError(
            "this names no model of a registry",
            expected="models:/NAME/VERSION or models:/NAME@ALIAS",
            got=text,
        )
    try:
        from mlflow import artifacts
    except ImportError:
        raise MissingExtra("mlflow", "mlflow", "a model of an MLflow registry") from None
    try:
        folder = Path(artifacts.download_artifacts(artifact_uri=text))
    except Exception as error:  # the library's own tree of errors, and those of its stores
        raise InputError("the model cannot be had from MLflow", got=_short(error), where=text) from error
    # Links could lead out of the folder; its files are mlflow's own and those of the framework.
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.is_symlink()]
    ranked = [[f for f in files if f.suffix.lower() == suffix] for suffix in _WEIGHTS]
    chosen = next((some for some in ranked if some), [])
    if len(chosen) != 1:
        raise InputError(
            "the registered model has no single file of weights",
            expected="one file that ends in " + ", ".join(_WEIGHTS),
            got=", ".join(str(f.relative_to(folder)) for f in (chosen or files)[:8]) or "nothing",
            where=text,
        )
    _require_size(chosen[0].stat().st_size, text)
    return chosen[0]


def data_file(text: str | Path) -> Path:
    """Return the Parquet file that images of the hub were fetched into.

    Args:
        text: ``hf://datasets/ORG/NAME[@REVISION][/FILE.parquet]``. Without a file, the first of the test
            part, else of the validation, else of the training part.

    Raises:
        InputError: If there is no such data set or file, or it cannot be fetched.
        UnsafeFile: If the file is larger than a reader accepts.
        MissingExtra: Without huggingface_hub.
    """
    found = _DATA.fullmatch(str(text))
    if found is None:
        raise InputError(
            "this names no data set of the hub",
            expected="hf://datasets/ORG/NAME[@REVISION][/FILE.parquet]",
            got=str(text),
        )
    repo, revision, named = found["repo"], found["revision"], found["file"]
    files = {n: size for n, size in _files(repo, revision, "dataset").items() if n.endswith(".parquet")}
    if not files and revision is None:
        revision = _CONVERTED
        files = {n: size for n, size in _files(repo, revision, "dataset").items() if n.endswith(".parquet")}
    if named is not None and named not in files:
        raise InputError(f"the data set has no file {named!r}{near_match(named, list(files))}", where=text)
    chosen = named or _of_best_split(sorted(files))
    if chosen is None:
        raise InputError("the data set has no Parquet file", where=text)
    _require_size(files[chosen], text)
    return _fetched(repo, chosen, revision, "dataset")


def _of_best_split(names: list[str]) -> str | None:
    for split in _SPLITS:
        for name in names:
            if re.search(rf"(^|[/_.-]){split}([/_.-]|$)", name):
                return name
    return names[0] if names else None


def _require_size(size: int, text: str | Path) -> None:
    if size > MAX_BYTES:
        raise UnsafeFile(
            "the files on the hub are too large", expected=f"at most {MAX_BYTES} bytes", got=size, where=text
        )


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", "a model or data set of the hub") from None
    return huggingface_hub


def _files(repo: str, revision: str | None, kind: str) -> dict[str, int]:
    """Return the names and sizes of the files of a repository, those at its top for a model."""
    library = _library()
    try:
        info = library.HfApi().repo_info(repo, revision=revision, repo_type=kind, files_metadata=True)
    except Exception as error:  # the library's own tree of errors, and those of its transport
        raise InputError(
            f"the {kind} cannot be had from the hub", got=_short(error), where=f"hf://{repo}"
        ) from error
    files = {str(one.rfilename): int(one.size or 0) for one in info.siblings or ()}
    # The names come from a stranger, and lead to files of the cache.
    files = {n: size for n, size in files.items() if ".." not in n.split("/") and not n.startswith("/")}
    return {n: size for n, size in files.items() if kind == "dataset" or "/" not in n}


def _fetched(repo: str, name: str, revision: str | None, kind: str) -> Path:
    try:
        return Path(_library().hf_hub_download(repo, name, revision=revision, repo_type=kind))
    except Exception as error:  # likewise
        raise InputError(
            f"the file {name} cannot be had from the hub", got=_short(error), where=f"hf://{repo}"
        ) from error


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

"""Files that hold a part of a model: one shard of several, or an adapter without its base."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.weights.formats.buffers import listed

_SHARD = re.compile(r"-(\d{1,6})-of-(\d{1,6})(?=\.)")
# Parts of names that peft, loralib, diffusers, LyCORIS and kohya give what they put beside a layer.
_ADAPTER = re.compile(
    r"^(?P<layer>.*?)\.?\b(?:lora_(?:embedding_)?[AB]|lora_magnitude_vector|lora[._](?:up|down)|lora_(?:a|b)"
    r"|hada_w[12](?:_[ab])?|lokr_w[12](?:_[ab])?|b?oft_\w+|vera_lambda_[bd]|ia3_l|trainable_tokens_delta)"
    r"(?=\.|$)"
)


def shard_of(path: Path) -> int | None:
    """Return of how many files this is one, by its name, or None where it is whole."""
    match = _SHARD.search(path.name)
    return int(match[2]) if match is not None and int(match[2]) > 1 else None


def adapted_layers(names: Iterable[str]) -> set[str]:
    """Return the layers that an adapter such as LoRA stands beside."""
    return {match["layer"] for name in names if (match := _ADAPTER.match(name)) is not None}


def missing_part(names: Iterable[str], path: Path) -> InputError | UnsupportedModel | None:
    """Return the error that says what a file lacks to be a model; None where nothing shows it."""
    if (count := shard_of(path)) is not None:
        return InputError(
            f"the file is one shard of {count}",
            expected="all of them, and the index that names them",
            where=path,
            remedy="Give the folder that holds them all, or the file that ends in .index.json",
        )
    known = set(names)
    layers = adapted_layers(known)
    bases = {f"{layer}{base}.weight" for layer in layers for base in ("", ".base_layer")}
    if not layers or bases & known:
        return None
    return UnsupportedModel(
        "the file holds an adapter, such as LoRA, that needs its base",
        got=f"{len(layers)} adapted layers without their weights: {listed(sorted(layers), 3)}",
        where=path,
        remedy="Merge it into its base (merge_and_unload of peft), and give the merged model",
    )

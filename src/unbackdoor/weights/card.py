"""The JSON card beside a weights file: what the model is, where it came from, what was done to it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from unbackdoor.errors import InputError, UnsafeFile
from unbackdoor.files import parse_json
from unbackdoor.types import Classifier
from unbackdoor.weights.stored_file import StoredFile, read_file

FORMAT: Final = 1
MAX_CARD = 4 << 20  # bytes
# The one key of a weights file's own metadata, because several would be written in a random order.
METADATA_KEY = "unbackdoor"

_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(allow_inf_nan=False, gt=0)]
_Name = Annotated[str, Field(max_length=1000)]


class ModelCard(BaseModel):
    """What is needed to build a model again, to check it, and to know its past.

    Attributes:
        format: Version of the card's layout.
        architecture: Spec such as ``preact_resnet18[width=16]``.
        class_names: K names, in logit order.
        input_shape: (C, H, W).
        mean: Per-channel mean; empty for no normalisation.
        std: Per-channel deviation; empty for no normalisation.
        bgr: Whether the network takes blue first; written only where it does.
        parameters: Number of trainable values.
        weights_sha256: Hash over names, shapes, types and bytes of all tensors.
        file_sha256: Hash of the weights file.
        origin: Where the weights came from, in words.
        history: What was done, oldest first: one JSON object for each training or repair.
        created_with: Versions of the software that wrote the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = FORMAT
    architecture: _Name
    class_names: Annotated[tuple[_Name, ...], Field(min_length=1)]
    input_shape: tuple[int, int, int]
    mean: tuple[_Finite, ...] = ()
    std: tuple[_Positive, ...] = ()
    bgr: bool = False
    parameters: Annotated[int, Field(ge=0)]
    weights_sha256: _Hash
    file_sha256: _Hash
    origin: str = ""
    history: tuple[dict[str, JsonValue], ...] = ()
    created_with: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def describe(
        cls,
        model: Classifier,
        *,
        weights_sha256: str,
        file_sha256: str,
        history: Sequence[Mapping[str, Any]] = (),
    ) -> Self:
        """Return the card of a model.

        Raises:
            InputError: If the history is not JSON.
        """
        mean, std = normalisation(model)
        try:
            # Through text, so that the card holds what a reader of the file will see.
            entries = json.loads(json.dumps([dict(entry) for entry in history], allow_nan=False))
            return cls(
                format=FORMAT,
                architecture=model.architecture,
                class_names=model.class_names,
                input_shape=model.input_shape,
                mean=mean,
                std=std,
                **({"bgr": True} if model.bgr else {}),
                parameters=sum(p.numel() for p in model.network.parameters()),
                weights_sha256=weights_sha256,
                file_sha256=file_sha256,
                origin=model.origin,
                history=tuple(entries),
                created_with={"unbackdoor": _version(), "torch": str(torch.__version__)},
            )
        except (TypeError, ValueError) as error:  # ValidationError is a ValueError
            raise InputError(
                "the model cannot be described by a card",
                expected="texts as names, and a history of JSON objects with finite numbers",
                got=str(error).split("\n")[0],
            ) from error

    def seal(self) -> str:
        """Return what the weights file says of its card, as one line of JSON: a hash over all of it.

        The hash of the weights file is left out, because the seal is a part of that file.
        """
        # Only what was set: a field that a later version adds must not break the seals of older cards.
        content = self.model_dump(mode="json", exclude={"file_sha256"}, exclude_unset=True)
        facts = {
            "architecture": self.architecture,
            "card_sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
            "weights_sha256": self.weights_sha256,
        }
        return json.dumps(facts, sort_keys=True)


def read_card(file: Path | StoredFile) -> ModelCard:
    """Read and check a card.

    Args:
        file: The JSON file, or what was read of it.

    Raises:
        InputError: If the file cannot be read, is too large, or is not a card.

    Returns:
        The card; its hashes are not yet compared with the weights.
    """
    if not isinstance(file, StoredFile):
        try:
            file = read_file(file, limit=MAX_CARD)
        except UnsafeFile as error:
            raise _too_large(error.got, file) from error
        except InputError as error:
            raise InputError("the model card cannot be read", got=error.got, where=file) from error
    content, path = bytes(file.content), file.path
    if file.size > MAX_CARD:
        raise _too_large(file.size, path)
    try:
        parse_json(content, "the model card")  # before pydantic, which takes infinite numbers in a history
        return ModelCard.model_validate_json(content)
    except InputError as error:
        raise InputError(
            "the file is not a model card of this version", expected="JSON", got=error.got, where=path
        ) from error
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'card'}: {fault['msg']}" for fault in error.errors()[:5]
        ]
        raise InputError(
            "the file is not a model card of this version",
            expected=f"format {FORMAT}",
            got="; ".join(repr(fault[:200])[1:-1] for fault in faults),
            where=path,
        ) from error


def _too_large(size: object, where: object) -> InputError:
    return InputError(
        "the model card is too large", expected=f"at most {MAX_CARD} bytes", got=size, where=where
    )


def normalisation(model: Classifier) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of a classifier's normaliser; both empty where it does nothing."""
    mean, std = _shortest(model.mean), _shortest(model.std)
    if not any(mean) and all(s == 1.0 for s in std):
        return (), ()
    return mean, std


def _shortest(values: torch.Tensor) -> tuple[float, ...]:
    # The shortest decimal that gives the same float32 back: 0.4914 and not 0.4914000034332275.
    return tuple(float(str(np.float32(value))) for value in values.flatten().tolist())


def _version() -> str:
    try:
        return importlib.metadata.version("unbackdoor")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

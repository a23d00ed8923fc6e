"""Saving and loading classifiers: safetensors with a JSON card beside it, checked against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from unbackdoor.errors import InputError, IntegrityError, UnsupportedModel
from unbackdoor.files import atomic_write, sha256_file, write_json
from unbackdoor.networks.build import canonical
from unbackdoor.networks.sources import SOURCES, require_trusted
from unbackdoor.networks.spec import OWN, read_spec
from unbackdoor.opening.load_tensors import fill, misfit, require_finite, skeleton
from unbackdoor.opening.rename_tensors import compare
from unbackdoor.types import Classifier, state_sha256
from unbackdoor.weights.card import MAX_CARD, METADATA_KEY, ModelCard, read_card
from unbackdoor.weights.source import SUFFIX, Source, open_source

# Numbers of an image that a card may state: 3 x 1182 x 1182. A larger one the user states.
MAX_INPUT = 1 << 22


def save_model(model: Classifier, path: Path, *, history: Sequence[Mapping[str, Any]] = ()) -> ModelCard:
    """Write ``X.safetensors`` and its card ``X.json``, each of them whole or not at all.

    The weights come first. If the card then cannot be written, the pair does not match and
    :func:`load_model` says so.

    Args:
        model: Classifier whose architecture is named, with finite weights.
        path: Where to write; ``.safetensors`` is appended where it is missing.
        history: What was done, oldest first, as JSON objects.

    Returns:
        The card that was written.

    Raises:
        InputError: If a weight is not finite, the history is not JSON, or the disk refuses.
        ConfigError: If the architecture is unknown.
        UnsupportedModel: If the weights do not fit the architecture, so that no one could load them.

    Example:
        >>> import tempfile
        >>> from unbackdoor.networks import build
        >>> model = build("small_cnn[width=2]", input_shape=(1, 8, 8), class_names=["a", "b"])
        >>> save_model(model, Path(tempfile.mkdtemp()) / "model").parameters
        304
    """
    path = _weights_path(Path(path))
    state = {name: t.detach().cpu().contiguous().clone() for name, t in model.network.state_dict().items()}
    if not model.architecture:
        raise UnsupportedModel(
            "the model names no architecture, so that its file could not be loaded again",
            where=path,
            remedy="Build it with unbackdoor.networks.build",
        )
    _require_shapes(model, state, path)
    require_finite(state, path)
    digest = state_sha256(state)
    draft_card = ModelCard.describe(model, weights_sha256=digest, file_sha256="0" * 64, history=history)
    if len(draft_card.model_dump_json(indent=2).encode()) > MAX_CARD:
        raise InputError("the model's history is too large for a card", expected=f"at most {MAX_CARD} bytes")
    with atomic_write(path) as draft:
        save_file(state, draft, metadata={METADATA_KEY: draft_card.seal()})
        file_digest = sha256_file(draft)
    card = draft_card.model_copy(update={"file_sha256": file_digest})
    # Only what was set, as in its seal.
    write_json(path.with_suffix(".json"), card.model_dump(mode="json", exclude_unset=True))
    return card


def load_model(
    path: Path | Source,
    *,
    card: Path | None = None,
    architecture: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """Load a classifier in evaluation mode, after every check that needs no trust in the file.

    Args:
        path: Weights: safetensors, or a checkpoint of ``torch.save`` that holds plain tensors; or what was
            opened already.
        card: The card; by default, beside safetensors, the file of the same name that ends in ``.json``,
            if there is one.
        architecture: Spec such as ``resnet18[width=64]``. This and the following arguments are needed
            where there is no card, and come before the card where there is one. ``FILE.py:CALLABLE`` runs
            that code. Names of other implementations are translated, see
            :mod:`unbackdoor.opening.rename_tensors`.
        input_shape: (C, H, W).
        class_names: K names, in logit order.
        mean: Per-channel mean; empty for no normalisation.
        std: Per-channel deviation; empty for no normalisation.

    Raises:
        InputError: If a file is missing, damaged or incomplete, or a weight is not finite.
        UnsafeFile: If the file would run code or is built to exhaust the memory, or its card names code or a
            folder. Nothing was executed.
        IntegrityError: If weights and card do not belong together.
        ConfigError: If the architecture is unknown.
        UnsupportedModel: If the weights do not fit the architecture; lists the differences, and what fits.
        MissingExtra: If the architecture is one of a library that is not installed.
    """
    source = path if isinstance(path, Source) else open_source(path)
    path = source.path
    model_card = source.card() if card is None else read_card(Path(card))
    state = source.state()
    if model_card is not None:
        _require_match(source, model_card, state)
        if architecture is None:
            require_trusted(read_spec(model_card.architecture), card or path.with_suffix(".json"))
        architecture = architecture or model_card.architecture
        if input_shape is None and math.prod(map(abs, model_card.input_shape)) > MAX_INPUT:
            raise InputError(
                "the card states an absurdly large input",
                expected=f"at most {MAX_INPUT} numbers an image",
                got=model_card.input_shape,
                where=card or path.with_suffix(".json"),
                remedy="If that is its size, give it as an argument",
            )
        input_shape = input_shape or model_card.input_shape
        class_names = class_names or model_card.class_names
        mean = model_card.mean if mean is None else mean
        std = model_card.std if std is None else std
    if architecture is None or input_shape is None or class_names is None:
        raise InputError(
            "the model has no card",
            expected=path.with_suffix(".json"),
            remedy="Put the card beside the weights, or give architecture, input_shape and class_names",
            where=path,
        )
    filled = fill(architecture, state, input_shape=input_shape, classes=len(class_names), where=path)
    return Classifier(
        filled.network,
        input_shape=input_shape,
        class_names=class_names,
        mean=mean or (),
        std=std or (),
        bgr=model_card is not None and model_card.bgr,
        architecture=canonical(architecture),
        origin=model_card.origin if model_card is not None else f"loaded from {path.name}",
    ).eval()


def _weights_path(path: Path) -> Path:
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)


def _require_match(source: Source, card: ModelCard, state: Mapping[str, Tensor]) -> None:
    checks = [
        ("the weights do not match their card", card.weights_sha256, state_sha256(state)),
        ("the weights file does not match its card", card.file_sha256, source.sha256),
    ]
    stored = source.contents.metadata.get(METADATA_KEY)
    if stored is not None:
        checks.append(("the card is not the one the weights were saved with", card.seal(), stored))
    for problem, expected, got in checks:
        if expected != got:
            raise IntegrityError(
                problem,
                expected=expected[:300],
                got=repr(got[:300])[1:-1],
                where=source.path,
                remedy="One of the two files was changed, or a save was interrupted: fetch both again. To "
                "load the weights as they are, move the card away and give architecture, input_shape and "
                "class_names",
            )


def _require_shapes(model: Classifier, state: Mapping[str, Tensor], path: Path) -> None:
    spec = read_spec(model.architecture)
    if spec.source != OWN and not SOURCES[spec.source].skeleton:
        return  # comparing would run the user's code once more; the network at hand came from it
    expected = skeleton(model.architecture, model.input_shape, model.classes).state_dict()
    if difference := compare(state, expected):
        raise misfit(difference, len(expected), state, where=path)

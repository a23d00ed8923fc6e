"""How a model was opened: what its file says, what was assumed, and who said so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from unbackdoor.opening.normalisation_guess import InferredNormalisation, Normalisation
from unbackdoor.opening.rename_tensors import Adapted
from unbackdoor.weights.formats.buffers import listed, short
from unbackdoor.weights.read import Contents

_NOT_EXAMINED = "the file's own program was not examined"


@dataclass(frozen=True)
class ArchitectureOrigin:
    """Which network was built.

    Attributes:
        spec: Text that builds it, or ``ONNX``.
        source: Who named it.
        note: What the tensors leave open, in words.
        fitting: All specs that fit the tensors.
    """

    spec: str
    source: str
    note: str = ""
    fitting: tuple[str, ...] = ()

    @property
    def guessed(self) -> bool:
        """Whether nobody named it and other networks would fit the tensors."""
        return self.source.startswith("guessed") and len(self.fitting) > 1


@dataclass(frozen=True)
class NameChanges:
    """How the file's names became the network's.

    Attributes:
        changes: In words.
        renamed: The network's name by the file's.
        dropped: Tensors of the file that the network does not have, and why.
        filled: Tensors of the network that the file does not have.
        folded: Tensors that were computed from several of the file.
    """

    changes: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    filled: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()

    @classmethod
    def of(cls, adapted: Adapted) -> NameChanges:
        """Return the changes of a translation."""
        return cls(
            tuple(adapted.changes_in_words()),
            {old: new for new, old in adapted.renamed.items()},
            dict(adapted.dropped),
            tuple(adapted.filled),
            (*adapted.merged, *adapted.folded),
        )


@dataclass(frozen=True)
class NormalisationOrigin:
    """How pixels in [0, 1] are scaled before the network.

    Attributes:
        name: What it is called.
        mean: Per channel; empty for none.
        std: Likewise.
        source: Who said so.
        bgr: Whether the network takes blue first.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    bgr: bool = False

    @classmethod
    def of(cls, normalisation: Normalisation, source: str) -> NormalisationOrigin:
        """Return a normalisation with its source."""
        mean, std = tuple(normalisation.mean), tuple(normalisation.std)
        return cls(normalisation.name, mean, std, source, normalisation.bgr)


@dataclass(frozen=True)
class MeasuredAccuracy:
    """Clean accuracy of the model as it was opened.

    Attributes:
        value: In 0..1.
        interval: Its 95 % interval.
        images: Number of images.
    """

    value: float
    interval: tuple[float, float]
    images: int


@dataclass(frozen=True)
class InFile:
    """What of the file was opened, and what was not.

    Attributes:
        weights: Key of the set of weights that was opened; empty for the one at the top.
        other_weights: Keys of the other sets, and whether each is ``the same`` or ``different``.
        other_tensors: Keys of further entries that hold tensors.
        program: The program around the weights, in words; empty for weights alone.
        examined: Whether the network that was opened is that program.
        output: The output of the graph that gives the logits, where it was named.
        remarks: What in the program watches the pixels outside the network's body, in words.
        dequantised: Names of tensors that are quantised in the file, and numbers in the network.
    """

    weights: str = ""
    other_weights: Mapping[str, str] = field(default_factory=dict)
    other_tensors: tuple[str, ...] = ()
    program: str = ""
    examined: bool = False
    output: str | None = None
    remarks: tuple[str, ...] = ()
    dequantised: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        contents: Contents,
        *,
        examined: bool = False,
        output: str | None = None,
        remarks: tuple[str, ...] = (),
    ) -> InFile:
        """Return what the contents of a file show."""
        return cls(
            contents.key,
            dict(contents.other_sets),
            contents.others,
            contents.program,
            examined,
            output,
            remarks,
            tuple(contents.quantised),
        )

    @property
    def reservations(self) -> tuple[str, ...]:
        """What no check can see, so that finding nothing proves nothing: sentences."""
        out = []
        if self.program and not self.examined:
            out.append(
                f"Mind that {_NOT_EXAMINED}: the file holds {self.program}, and only its weights were read, "
                "into a network of this package or its libraries. A trigger in the program stays unseen."
            )
        if self.remarks:
            out.append(
                "The file's own program watches the pixels outside the network's body, where no check of "
                f"weights looks: {'; '.join(self.remarks)}."
            )
        return tuple(out)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is to be shown loudly."""
        out = list(self.reservations)
        if self.other_weights:
            others = ", ".join(
                f"{key_in_words(key)} ({answer})" for key, answer in self.other_weights.items()
            )
            out.append(
                f"The file holds further weights, of which nothing is said here: {others}. Opened were those "
                f"under {key_in_words(self.weights)}"
            )
        if self.dequantised:
            out.append(
                f"The file is quantised: {len(self.dequantised)} tensors were dequantised to float32. What "
                "else it rounds while it runs is not rounded here, so that single answers may differ. A "
                "repair is written in floating point"
            )
        return tuple(out)

    def in_words(self) -> list[tuple[str, str]]:
        """Return it as terms and texts."""
        out = []
        if self.weights or self.other_weights:
            out.append(("weights", key_in_words(self.weights)))
        out += [
            ("further weights", f"{key_in_words(key)} ({answer})")
            for key, answer in self.other_weights.items()
        ]
        if self.other_tensors:
            out.append(("further tensors", ", ".join(key_in_words(key) for key in self.other_tensors[:10])))
        if self.dequantised:
            names = listed(self.dequantised, 3)
            out.append(("quantised", f"{len(self.dequantised)} tensors, dequantised to float32: {names}"))
        if self.output is not None:
            out.append(("output", key_in_words(self.output)))
        if self.program:
            state = "opened as it is" if self.examined else _NOT_EXAMINED
            out.append(("program", f"{self.program} ({state})"))
        return out + [("in the program", text) for text in self.remarks]


def key_in_words(key: str) -> str:
    """Return the key of a set of weights for messages."""
    return short(key)[1:-1] if key else "the top of the file"


@dataclass(frozen=True)
class Provenance:
    """How a model was opened.

    Attributes:
        file: Name of the file.
        card: Whether a card beside it states the rest.
        architecture: Which network was built.
        names: How the file's names became the network's.
        normalisation: How pixels are scaled.
        input_shape: (C, H, W).
        size_source: Who said how large images are.
        classes: Number of classes K.
        class_names_source: Who named them.
        images: What was done to the images and observed on them, in words.
        clean_accuracy: None without labelled images.
        inference: JSON-ready: what was tried on the images; None where nothing was.
        warnings: What is to be shown loudly.
        in_file: What of the file was opened, and what was not.
    """

    file: str
    card: bool
    architecture: ArchitectureOrigin
    names: NameChanges
    normalisation: NormalisationOrigin
    input_shape: tuple[int, int, int]
    size_source: str
    classes: int
    class_names_source: str
    images: tuple[str, ...] = ()
    clean_accuracy: MeasuredAccuracy | None = None
    inference: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    in_file: InFile = field(default_factory=InFile)

    @property
    def reservations(self) -> tuple[str, ...]:
        """What no check can see, so that finding nothing proves nothing: sentences."""
        return self.in_file.reservations

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why what was opened may not be the model of the file, so that no answer is sure: sentences.

        A low accuracy, labels in another order, or a network that was guessed among several, without labels
        that would tell them apart.
        """
        inference = self.inference or {}
        out = []
        if self.clean_accuracy is not None and inference.get("warning"):
            out.append(f"{inference['warning']}.")
        elif inference.get("class_order"):
            out.append(
                "Far more images would be right if the classes were in another order, so that labels and "
                "outputs do not belong together."
            )
        architecture = self.architecture
        if architecture.guessed and self.clean_accuracy is None:
            others = ", ".join(spec for spec in architecture.fitting if spec != architecture.spec)
            out.append(
                f"The network {architecture.spec} was guessed, and others fit the tensors as well "
                f"({others}): labelled images, or --arch, would tell them apart."
            )
        return tuple(out)

    def measured(
        self, changes: tuple[str, ...], inferred: InferredNormalisation | None, warnings: list[str]
    ) -> Provenance:
        """Return it with what the images showed.

        Args:
            changes: What was done to the images, in words.
            inferred: The choice that was made on them; None where there are none.
            warnings: What is to be shown loudly beside its own warning.
        """
        warnings = [*self.in_file.warnings, *warnings]
        if inferred is None:
            return replace(self, images=changes, warnings=tuple(warnings))
        best = inferred.best
        accuracy = None
        if inferred.by_labels:
            low, high = inferred.interval
            accuracy = MeasuredAccuracy(best.accuracy, (low, high), best.total)
        own = [inferred.warning] if inferred.warning else []
        return replace(
            self,
            images=(*changes, *inferred.notes),
            clean_accuracy=accuracy,
            inference=inferred.facts(),
            warnings=(*own, *warnings),
        )

    def in_words(self) -> list[tuple[str, str]]:
        """Return it as terms and texts."""
        channels, *sides = self.input_shape
        architecture, scale = self.architecture, self.normalisation
        out = [
            ("architecture", f"{architecture.spec} ({architecture.source})"),
            ("input", f"{' x '.join(map(str, sides))}, {channels} channels ({self.size_source})"),
            ("normalisation", f"{scale.name} ({scale.source})"),
            ("classes", f"{self.classes} (names: {self.class_names_source})"),
        ]
        return out + self.in_file.in_words() + [("names", text) for text in self.names.changes]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        return {**plain, "reservations": list(self.reservations), "doubts": list(self.doubts)}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value

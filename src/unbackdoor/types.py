"""The values that pass between the parts; they separate the judge from the defender.

Nothing here can hold a trigger, a target class or a test set: those live in ``attacks.truth``, which no
defense and no scanner may import.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from unbackdoor.errors import InputError, TooFewImages, UnsupportedModel
from unbackdoor.triggers import RecoveredTrigger

T = TypeVar("T")
Augmentation = Literal["none", "crop", "crop+flip"]
AUGMENTATIONS: tuple[Augmentation, ...] = ("none", "crop", "crop+flip")


class Progress(Protocol):
    """Shows the progress of a loop; library code never prints."""

    def __call__(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """Yield the items, showing ``label`` and the time left; ``total`` where ``len`` is unknown."""
        ...


def silent(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
    """The progress display that shows nothing."""
    return items


# ---------------------------------------------------------------------------------------------------
# Images


@dataclass(frozen=True)
class Images:
    """Images of one size with their labels, resident in memory.

    Attributes:
        pixels: uint8 tensor (N, C, H, W).
        labels: int64 tensor (N,) with values in 0..K-1, or None where there are none.
        class_names: K names, in label order.
        name: What the set is called in messages and reports.
        notes: What a reader of a result should know of the set, such as files that were passed over.
    """

    pixels: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    name: str = "images"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.pixels.shape)
        if self.pixels.dtype != torch.uint8 or len(shape) != 4:
            raise InputError(
                "images have the wrong form",
                expected="uint8 pixels of shape (N, C, H, W)",
                got=f"{self.pixels.dtype} of shape {shape}",
                where=self.name,
            )
        if self.labels is None:
            return
        if self.labels.dtype != torch.int64 or tuple(self.labels.shape) != shape[:1]:
            raise InputError(
                "labels have the wrong form",
                expected=f"int64 of shape ({shape[0]},)",
                got=f"{self.labels.dtype} of shape {tuple(self.labels.shape)}",
                where=self.name,
            )
        wrong = ((self.labels < 0) | (self.labels >= self.classes)).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise InputError(
                "a label is out of range",
                expected=f"0..{self.classes - 1}",
                got=int(self.labels[row]),
                where=f"{self.name}, row {row}",
                remedy="Check the class names and the label column",
            )

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, (C, H, W)."""
        c, h, w = self.pixels.shape[1:]
        return (int(c), int(h), int(w))

    @property
    def truth(self) -> Tensor:
        """The labels; raises InputError where the set has none."""
        if self.labels is None:
            raise InputError("labels are needed here, and this set has none", where=self.name)
        return self.labels

    def subset(self, index: Tensor | Sequence[int], name: str | None = None) -> Images:
        """Return the images at the given positions, in that order."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, pixels=self.pixels[rows], labels=labels, name=name or self.name)

    def fingerprint(self) -> str:
        """Return the SHA-256 of pixels, labels and class names, as 64 hex digits."""
        digest = hashlib.sha256(repr((tuple(self.pixels.shape), self.class_names)).encode())
        _update(digest, self.pixels)
        if self.labels is not None:
            _update(digest, self.labels)
        return digest.hexdigest()


@dataclass(frozen=True)
class CleanData:
    """The defender's clean images: a part to fit on and a part to choose thresholds on.

    Attributes:
        fit: Images that a method may optimise on.
        select: Images held out from ``fit``, for choosing thresholds and stopping.
        augmentation: What may be done to an image of this domain without changing its class.
        select_is_fit: True where there were too few images to hold any out; choices are then optimistic.
    """

    fit: Images
    select: Images
    augmentation: Augmentation = "none"
    select_is_fit: bool = False

    def __len__(self) -> int:
        return len(self.fit) + (0 if self.select_is_fit else len(self.select))

    @property
    def all(self) -> Images:
        """Every clean image, for methods that choose nothing."""
        if self.select_is_fit:
            return self.fit
        labels = None
        if self.fit.labels is not None and self.select.labels is not None:
            labels = torch.cat([self.fit.labels, self.select.labels])
        return replace(self.fit, pixels=torch.cat([self.fit.pixels, self.select.pixels]), labels=labels)

    @classmethod
    def split(
        cls,
        images: Images,
        *,
        select_fraction: float = 0.3,
        augmentation: Augmentation = "none",
        seed: int = 0,
    ) -> Self:
        """Hold out a share of every class for selection.

        A class with one image keeps it in the fitting part. Where nothing can be held out, both parts are
        the same images and ``select_is_fit`` says so.

        Args:
            images: The defender's images.
            select_fraction: Share of each class that is held out, in (0, 1).
            augmentation: See the attribute.
            seed: Seed of the draw.
        """
        if not len(images):
            raise InputError("there is no clean image", expected="at least 1", got=0, where=images.name)
        generator = torch.Generator().manual_seed(seed)
        labels = images.labels if images.labels is not None else torch.zeros(len(images), dtype=torch.int64)
        held_out = torch.zeros(len(images), dtype=torch.bool)
        for k in range(images.classes if images.labels is not None else 1):
            rows = (labels == k).nonzero().flatten()
            count = min(round(select_fraction * len(rows)), max(len(rows) - 1, 0))
            held_out[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
        if not held_out.any() or held_out.all():
            return cls(images, images, augmentation, select_is_fit=True)
        fit = images.subset((~held_out).nonzero().flatten())
        return cls(fit, images.subset(held_out.nonzero().flatten()), augmentation)

    @classmethod
    def empty(cls, shape: tuple[int, int, int], class_names: Sequence[str]) -> Self:
        """Return a set of no images, for checks that need none.

        Args:
            shape: Shape of one image, (C, H, W).
            class_names: K names, in label order.
        """
        nothing = Images(torch.zeros((0, *shape), dtype=torch.uint8), None, tuple(class_names), "no images")
        return cls(nothing, nothing, select_is_fit=True)

    def fingerprint(self) -> str:
        """Return one hash over both parts."""
        return hashlib.sha256((self.fit.fingerprint() + self.select.fingerprint()).encode()).hexdigest()


def as_images(data: object, *, what: str = "the clean images") -> Images:
    """Return a set of images; the two parts of clean data are joined.

    Args:
        data: ``Images`` or ``CleanData``.
        what: What it is called in the message.

    Raises:
        InputError: If it is of another type.
    """
    if isinstance(data, Images):
        return data
    if isinstance(data, CleanData):
        return data.all
    raise InputError(
        f"{what} are of another type",
        expected="Images or CleanData",
        got=type(data).__name__,
        remedy="Load them with unbackdoor.load_images",
    )


def as_clean_data(data: object, *, seed: int = 0) -> CleanData:
    """Return clean images in their two parts; images that are not split yet are.

    Args:
        data: ``Images`` or ``CleanData``.
        seed: Seed of the split.

    Raises:
        InputError: If it is of another type, or images without any.
    """
    return data if isinstance(data, CleanData) else CleanData.split(as_images(data), seed=seed)


# ---------------------------------------------------------------------------------------------------
# Networks


_LAYOUT_ERROR = "view size is not compatible"  # what torch says where x.view meets channels innermost


class Classifier(nn.Module):
    """A network that takes pixels in [0, 1] and returns logits; its normaliser is inside.

    Args:
        network: Any module from normalised images (B, C, H, W) to logits (B, K).
        input_shape: (C, H, W).
        class_names: K names, in logit order.
        mean: Per-channel mean subtracted from the pixels; empty for no normalisation.
        std: Per-channel divisor, all > 0; empty for no normalisation.
        bgr: Whether the network takes blue first; mean and std are in its order of channels.
        architecture: How to build ``network`` again, such as ``preact_resnet18[width=16]``.
        origin: Where the weights came from, in words.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        input_shape: tuple[int, int, int],
        class_names: Sequence[str],
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        bgr: bool = False,
        architecture: str = "",
        origin: str = "",
    ) -> None:
        super().__init__()
        channels = input_shape[0]
        if len(mean) not in (0, channels) or len(std) != len(mean) or any(s <= 0 for s in std):
            raise InputError(
                "the normalisation does not fit the images",
                expected=f"no values, or {channels} means and {channels} positive deviations",
                got=f"mean {tuple(mean)}, std {tuple(std)}",
            )
        if bgr and channels != 3:
            raise InputError("only colour images have blue first", expected="3 channels", got=channels)
        self.network = network
        self.bgr = bgr
        self.input_shape = input_shape
        self.class_names = tuple(class_names)
        self.architecture = architecture
        self.origin = origin
        # Not persistent: they belong to the card, so that the weights file keeps the network's own keys.
        for name, values, neutral in (("mean", mean, 0.0), ("std", std, 1.0)):
            column = torch.tensor(list(values) or [neutral] * channels).view(-1, 1, 1)  # (C, 1, 1)
            self.register_buffer(name, column, persistent=False)
        self._normalised = bool(mean)
        self._channels_last = True  # until the network refuses; see forward()

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, K) for pixels in [0, 1] of shape (B, C, H, W), red first."""
        pixels = pixels.flip(1) if self.bgr else pixels
        inputs = (pixels - self.mean) / self.std if self._normalised else pixels
        return logits_in(self._outputs(inputs), self.classes)

    def _outputs(self, inputs: Tensor) -> Any:
        """Call the network, in the memory layout that it can take.

        Convolutions are faster with channels innermost. A network that flattens with ``x.view`` fails on
        that layout; it is noticed once, and from then on gets rows innermost.
        """
        if self._channels_last:
            try:
                return self.network(inputs)
            except RuntimeError as error:
                if _LAYOUT_ERROR not in str(error):
                    raise
            self._channels_last = False
            for parameter in self.network.parameters():
                parameter.data = _rows_innermost(parameter.data)
        return self.network(_rows_innermost(inputs))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As of every module; channels stay outermost where the network cannot take them innermost."""
        if kwargs.get("memory_format") is torch.channels_last and not self._channels_last:
            del kwargs["memory_format"]
        return super().to(*args, **kwargs) if args or kwargs else self

    def copy(self) -> Self:
        """Return a deep copy in evaluation mode, without gradients."""
        twin = copy.deepcopy(self)
        twin.zero_grad(set_to_none=True)
        return twin.eval()

    def sha256(self) -> str:
        """Return the SHA-256 over names, shapes, types and bytes of all weights and buffers."""
        return state_sha256(self.network.state_dict())


def _rows_innermost(tensor: Tensor) -> Tensor:
    # Strides of a single channel say nothing, but convolutions read them: contiguous() would leave them.
    return tensor.clone(memory_format=torch.contiguous_format)


def logits_in(outputs: Any, classes: int | None = None) -> Tensor:
    """Return the logits (B, K) among what a network returned.

    Many networks return their features too, or a record with named members.

    Args:
        outputs: A tensor, or a tuple, list or mapping of which exactly one member has the shape of logits.
        classes: K; None where any K will do.

    Raises:
        UnsupportedModel: If no member, or more than one, has this shape.
    """
    if isinstance(outputs, Tensor):
        return outputs
    members = list(outputs.values() if isinstance(outputs, Mapping) else ())
    if isinstance(outputs, tuple | list):
        members = list(outputs)
    fitting = [
        member
        for member in members
        if isinstance(member, Tensor) and member.dim() == 2 and classes in (None, member.shape[1])
    ]
    if len(fitting) == 1:
        return fitting[0]
    shapes = [str(tuple(m.shape)) if isinstance(m, Tensor) else type(m).__name__ for m in members]
    raise UnsupportedModel(
        "the network returns no logits",
        expected=f"one tensor of shape (images, {'classes' if classes is None else classes})",
        got=", ".join(shapes[:10]) or type(outputs).__name__,
        remedy="Wrap it in code of your own that returns the logits, named as FILE.py:CALLABLE",
    )


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict, independent of key order, device and memory layout."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        _update(digest, tensor)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    # Viewed as bytes because numpy has no bfloat16; flattened first so that scalars can be viewed too.
    flat = tensor.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().data)


def require_classifier(model: object) -> None:
    """Raise InputError unless it is a classifier."""
    if not isinstance(model, Classifier):
        opened = isinstance(getattr(model, "model", None), Classifier)
        raise InputError(
            "the model is of another type",
            expected="a Classifier",
            got=type(model).__name__,
            remedy="Give its attribute model" if opened else "Open the file with unbackdoor.open_model",
        )


# ---------------------------------------------------------------------------------------------------
# What methods return


@dataclass(frozen=True)
class Purified:
    """A repaired model and what the method has to say about it.

    Attributes:
        model: The repaired classifier; same architecture and shapes as the one received.
        evidence: JSON-ready facts, such as masks per layer or the threshold and how it was chosen. It is
            never a result: what the repair achieved is measured by somebody else.
        seconds: Wall time of the method, filled in by the trusted caller.
        method: Name, preset and options, filled in by the trusted caller.
    """

    model: Classifier
    evidence: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    method: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One piece of evidence of a scanner.

    Attributes:
        statistic: Name of the number.
        value: The number.
        direction: What a large or small value means, in words.
        threshold: The limit it was held against.
        threshold_source: How the limit came about.
        p_value: Calibrated probability of such a value without a backdoor, or None.
        classes: Suspected target classes.
        per_class: The statistic for every class, in label order.
        artefacts: Tensors to keep beside it, by name.
        trigger: A trigger that was recovered towards one of the classes, to be shown and tried.
        class_p_values: For every class, in label order, the p-value of being so unlike the others, not
            corrected for the number of classes; not a number for a class that is not compared, empty where
            the statistic has none.
        mapping: Which class a trigger turns into which, as (source, target); empty for a single target.
    """

    statistic: str
    value: float
    direction: str
    threshold: float
    threshold_source: str
    p_value: float | None = None
    classes: tuple[int, ...] = ()
    per_class: tuple[float, ...] = ()
    artefacts: Mapping[str, Tensor] = field(default_factory=dict)
    trigger: RecoveredTrigger | None = None
    class_p_values: tuple[float, ...] = ()
    mapping: tuple[tuple[int, int], ...] = ()


Verdict = Literal["backdoor found", "no evidence found", "undecided"]


@dataclass(frozen=True)
class ScanReport:
    """What was looked for, what was found, what failed and what was left out; the four add up.

    Attributes:
        verdict: ``backdoor found``, ``no evidence found`` or ``undecided``; never "clean".
        findings: Evidence, strongest first.
        errors: Checks that crashed, with the reason; any entry makes the report partial.
        skipped: Checks that were not run, with the reason.
        coverage: Checks that ran to their end.
        seconds: Wall time of the scanner, filled in by the trusted caller.
        method: Name, preset and options, filled in by the trusted caller.
    """

    verdict: Verdict
    findings: tuple[Finding, ...] = ()
    errors: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    coverage: tuple[str, ...] = ()
    seconds: float = 0.0
    method: Mapping[str, Any] = field(default_factory=dict)

    @property
    def partial(self) -> bool:
        """True where a check crashed, so that silence proves less."""
        return bool(self.errors)


@dataclass(frozen=True)
class Screening:
    """What screening says of images of unknown origin.

    Attributes:
        scores: (N,) high for suspicious.
        p_values: (N,) in [0, 1]: how often a clean image has so high a score.
        predicted: (N,) class that the model gives.
        suspicious: (N,) bool.
        evidence: JSON-ready facts, such as a table over the classes.
        seconds: Wall time of the screener, filled in by the trusted caller.
        method: Name, preset and options, filled in by the trusted caller.
    """

    scores: Tensor
    p_values: Tensor
    predicted: Tensor
    suspicious: Tensor
    evidence: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    method: Mapping[str, Any] = field(default_factory=dict)


def require_labels(data: CleanData, method: str) -> None:
    """Raise InputError unless both parts carry labels."""
    if data.fit.labels is None or data.select.labels is None:
        raise InputError(f"{method} needs labelled images", got="no labels", where=data.fit.name)


def require_one_a_class(model: Classifier, images: Images) -> None:
    """Raise TooFewImages where there are fewer images than classes: some class then has none."""
    if len(images) < model.classes:
        raise TooFewImages(
            "there are fewer images than classes",
            expected=f"at least {model.classes} images",
            got=len(images),
            where=images.name,
            remedy="Add clean images",
        )


def require_fit(model: Classifier, images: Images) -> None:
    """Raise UnsupportedModel unless the images fit the model's input and classes."""
    if images.shape != model.input_shape:
        raise UnsupportedModel(
            "the images do not fit the model",
            expected=f"(C, H, W) = {model.input_shape}",
            got=images.shape,
            where=images.name,
            remedy="Resize the images, or give the input size the model was trained with",
        )
    if images.labels is not None and len(images) and int(images.labels.max()) >= model.classes:
        raise UnsupportedModel(
            "the labels do not fit the model",
            expected=f"labels in 0..{model.classes - 1}",
            got=int(images.labels.max()),
            where=images.name,
        )

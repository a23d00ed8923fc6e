"""The recovered trigger: a change, the same for all images, that sends them to a class; and a suspicion.

A patch is a pattern that a mask mixes in; a blend is a perturbation that is added to every pixel. Whoever
recovers a trigger returns this type, and whoever tries, draws, stores or compares one takes it. A suspicion
is what was found before a repair: target classes, and triggers that were recovered towards them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor


class ImageSet(Protocol):
    """A data class with uint8 pixels (N, C, H, W), such as ``Images``."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def pixels(self) -> Tensor:
        """The images."""
        ...


_ROUNDING = 1e-4  # of a mask whose sum is scaled
S = TypeVar("S", bound=ImageSet)


def mixed(pixels: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """Return (1 - m) x + m p; differentiable, and the shapes are broadcast."""
    return (1 - mask) * pixels + mask * pattern


def added(pixels: Tensor, pattern: Tensor) -> Tensor:
    """Return x + p within [0, 1]; differentiable, and the shapes are broadcast."""
    return (pixels + pattern).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class RecoveredTrigger:
    """A trigger that was recovered from a model; a pattern that works, and not necessarily the attacker's.

    Attributes:
        label: Class that it leads to.
        pattern: (C, H, W): what the mask mixes in, in [0, 1]; without a mask, what is added.
        mask: (H, W) in [0, 1], or None for a pattern that is added to the whole image.
        check: What recovered it: the name of a check, or of a file; empty where it does not matter.
        success: Share, in [0, 1], of images that it was not made from and that it turns into the class; None
            where that was not measured.
    """

    label: int
    pattern: Tensor
    mask: Tensor | None
    check: str = ""
    success: float | None = None

    def apply(self, pixels: Tensor) -> Tensor:
        """Return pixels (N, C, H, W) in [0, 1] with the trigger, within [0, 1]."""
        pattern = self.pattern.to(pixels.device)
        if self.mask is None:
            return added(pixels, pattern)
        return mixed(pixels, pattern, self.mask.to(pixels.device)).clamp(0, 1)

    def apply_bytes(self, pixels: Tensor) -> Tensor:
        """Return uint8 pixels (N, C, H, W) with the trigger, rounded."""
        return (self.apply(pixels.float() / 255) * 255).round().to(torch.uint8)

    def stamp(self, images: S) -> S:
        """Return the set of images with the trigger on every image, rounded to 8 bits."""
        return replace(images, pixels=self.apply_bytes(images.pixels))

    def faults(self, input_shape: tuple[int, int, int], classes: int) -> list[str]:
        """Return why it does not fit images (C, H, W) of a model with so many classes, as sentences."""
        out = []
        if not 0 <= self.label < classes:
            out.append(f"class {self.label}, of {classes} classes")
        shapes = {"pattern": input_shape, "mask": input_shape[1:]}
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != shapes[name]:
                out.append(f"a {name} of shape {tuple(tensor.shape)}, and not {shapes[name]}")
            elif not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                out.append(f"a {name} that is not of finite numbers")
        mask = self.mask
        if not out and mask is not None and (float(mask.min()) < 0 or float(mask.max()) > 1 + _ROUNDING):
            out.append("a mask outside of 0..1")
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Return ``pattern``, and ``mask`` where there is one."""
        masked = {} if self.mask is None else {"mask": self.mask}
        return {"pattern": self.pattern, **masked}

    def norms(self) -> dict[str, float]:
        """Return how large it is.

        With a mask: its sum in pixels, the same as a share of the image, and its largest value. Without one:
        the length of the pattern, and its mean size in [0, 1].
        """
        if self.mask is None:
            return {
                "pattern_l2": float(self.pattern.double().norm()),
                "pattern_mean": float(self.pattern.abs().mean()),
            }
        total = float(self.mask.sum())
        return {
            "mask_l1": total,
            "mask_share": total / self.mask.numel(),
            "mask_max": float(self.mask.max()),
        }


@dataclass(frozen=True, eq=False)
class Suspicion:
    """The defender's evidence of a backdoor, from a scan or given by hand; it may be wrong.

    Attributes:
        classes: Suspected target classes, most suspicious first, each once.
        p_values: One for each class, corrected for all checks of the scan; None where there is none.
        triggers: Recovered triggers towards these classes, most suspicious first.
    """

    classes: tuple[int, ...] = ()
    p_values: tuple[float | None, ...] = ()
    triggers: tuple[RecoveredTrigger, ...] = ()

    @classmethod
    def of_triggers(cls, triggers: Iterable[RecoveredTrigger]) -> Suspicion:
        """Return the suspicion that triggers raise: their classes, in their order."""
        triggers = tuple(triggers)
        classes = tuple(dict.fromkeys(trigger.label for trigger in triggers))
        return cls(classes, (None,) * len(classes), triggers)

    def joined(self, other: Suspicion) -> Suspicion:
        """Return this suspicion followed by another; of a class that both name the known p-value is kept."""
        p_values: dict[int, float | None] = {}
        for one in (self, other):
            for label, p_value in zip(one.classes, one.p_values, strict=True):
                if p_values.get(label) is None:
                    p_values[label] = p_value
        return Suspicion(tuple(p_values), tuple(p_values.values()), (*self.triggers, *other.triggers))

    def trigger_to(self, label: int) -> RecoveredTrigger | None:
        """Return the most suspicious trigger towards a class; None where there is none."""
        return next((trigger for trigger in self.triggers if trigger.label == label), None)

    def faults(self, input_shape: tuple[int, int, int], classes: int) -> list[str]:
        """Return why it does not fit images (C, H, W) of a model with so many classes, as sentences."""
        out = [f"class {k}, of {classes} classes" for k in self.classes if not 0 <= k < classes]
        if len(set(self.classes)) < len(self.classes):
            out.append("a class that is named twice")
        if len(self.p_values) != len(self.classes):
            out.append(f"{len(self.p_values)} p-values for {len(self.classes)} classes")
        out += [f"a p-value of {p}" for p in self.p_values if p is not None and not 0 <= p <= 1]
        for trigger in self.triggers:
            out += trigger.faults(input_shape, classes)
            if trigger.label not in self.classes:
                out.append(f"a trigger towards class {trigger.label}, which is not suspected")
        return out

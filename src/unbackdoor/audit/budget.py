"""The time that a scan may take, opening included, and a clock that is looked at inside of long steps.

A step of a check on large images and many classes takes a minute and shows no progress meanwhile. While a
budget holds, the clock is looked at before every module of a network runs, and, on the way back, at every
tensor that was kept for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from unbackdoor.confinement import GRACE, deadline, now
from unbackdoor.errors import InputError, UnbackdoorError

P = ParamSpec("P")
T = TypeVar("T")


class BudgetSpent(UnbackdoorError):
    """The budget is spent; raised inside of what is running."""


@contextmanager
def budgeted(seconds: float | None) -> Iterator[None]:
    """Begin a budget; within another one, the earlier end holds.

    Args:
        seconds: From now; None is no limit.
    """
    token = deadline.set(end_of(seconds))
    try:
        yield
    finally:
        deadline.reset(token)


def within_budget(verb: Callable[P, T]) -> Callable[P, T]:
    """Return a verb whose option ``budget`` begins when it is called."""

    @wraps(verb)
    def begun(*args: P.args, **options: P.kwargs) -> T:
        budget = options.get("budget")
        with budgeted(budget if isinstance(budget, int | float) else None):
            return verb(*args, **options)

    return begun


def end_of(seconds: float | None) -> float | None:
    """Return when a budget that begins now ends, or the one that holds already; None where there is none."""
    ends = [end for end in (None if seconds is None else now() + seconds, deadline.get()) if end is not None]
    return min(ends, default=None)


def seconds_left(seconds: float | None) -> float | None:
    """Return what is left of a budget, which may have begun before."""
    end = end_of(seconds)
    return None if end is None else max(end - now(), 0.0)


@contextmanager
def opening() -> Iterator[None]:
    """Hold the opening of a model and of images to the budget, with some seconds of grace.

    Raises:
        InputError: If it was spent before they were open.
    """
    end = deadline.get()
    try:
        with watched(None if end is None else end + GRACE):
            yield
    except BudgetSpent:
        raise InputError(
            "the budget was spent before the model and the images were open",
            remedy="Give a larger budget, or fewer or smaller images",
        ) from None


@contextmanager
def watched(end: float | None, spent: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Look at the clock inside of the block, at every module that runs forward or backward.

    Args:
        end: On the clock of :func:`unbackdoor.confinement.now`; None watches nothing.
        spent: Called before BudgetSpent is raised.
    """
    if end is None:
        yield
        return

    def look() -> None:
        if now() >= end:
            spent()
            raise BudgetSpent("the time of the scan is over")

    def before(module: nn.Module, inputs: Any) -> None:
        look()

    def unpacked(tensor: Tensor) -> Tensor:
        look()
        return tensor

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpacked):
            yield
    finally:
        handle.remove()

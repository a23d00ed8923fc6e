"""The time that a scan may take, opening included, and a clock that is looked at inside of long steps.

A step of a check on large images and many classes takes a minute and shows no progress meanwhile. While a
budget holds, the clock is looked at before every module of a network runs, and, on the way back, at every
tensor that was kept for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.confinement import deadline, now
from unbackdoor.errors import InputError, UnbackdoorError


class BudgetSpent(UnbackdoorError):
    """The budget is spent; raised inside of what is running."""


@contextmanager
def budgeted(seconds: float | None) -> Iterator[None]:
    """Begin a budget; within another one, the earlier end holds.

    Args:
        seconds: From now; None is no limit.
    """
    if seconds is None:
        yield
        return
    end, outer = now() + seconds, deadline.get()
    token = deadline.set(end if outer is None else min(end, outer))
    try:
        yield
    finally:
        deadline.reset(token)


@contextmanager
def opening() -> Iterator[None]:
    """Hold the opening of a model and of images to the budget.

    Raises:
        InputError: If it was spent before they were open.
    """
    try:
        with watched(deadline.get()):
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

"""Models with one output y for two classes: opened as [0, y], whose softmax is the sigmoid of y."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unbackdoor.opening.recognise_chain import modules
from unbackdoor.opening.recognise_head import find_head
from unbackdoor.opening.rename_tensors import head_of, numbered_head


def two_outputs(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors with a second row in a last layer of one output, and the names of those changed.

    Class 0 has the logit 0, class 1 the output of the file. Nothing is changed where the last layer has
    another number of outputs.
    """
    last = _last_layer(state)
    weight = state.get(f"{last}.weight") if last is not None else None
    if weight is None or weight.dim() != 2 or weight.shape[0] != 1 or not weight.is_floating_point():
        return dict(state), ()
    names = tuple(
        name for name in (f"{last}.weight", f"{last}.bias") if name in state and state[name].shape[:1] == (1,)
    )
    return {
        **state,
        **{name: torch.cat([torch.zeros_like(state[name]), state[name]]) for name in names},
    }, names


def one_output(tensor: Tensor) -> Tensor:
    """Return the row of one output that means the same as two: softmax sees their difference alone."""
    return tensor[1:] - tensor[:1]


def _last_layer(state: Mapping[str, Tensor]) -> str | None:
    several = find_head(state)
    if several is not None:
        return several.layers[-1]
    usual = head_of(state) or numbered_head(state)
    if usual is not None:
        return usual
    if (chain := modules(state)) is not None:
        return chain[-1].name
    single = [
        name for name, t in state.items() if name.endswith(".weight") and t.dim() == 2 and t.shape[0] == 1
    ]
    return single[0].removesuffix(".weight") if len(single) == 1 else None

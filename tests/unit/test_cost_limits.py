"""What an image would cost is counted as torch itself counts it, and without its compiler."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unbackdoor.errors import UnsupportedModel
from unbackdoor.networks.build import network
from unbackdoor.networks.geometry import Geometry
from unbackdoor.opening import cost_limits
from unbackdoor.weights import sizes_only

NETWORKS = [
    "airbench[width=8]",
    "mobilenet_v2[width=0.1]",
    "preact_resnet18[width=4]",
    "small_cnn",
    "vit_small",
]


class Odd(nn.Module):
    """Means of all kinds, in-place steps, numbers of other types, and broadcasting in both directions."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu_(x * 2).add_(1).mul_(x.mean((2, 3), keepdim=True))
        x = x.mean(1, keepdim=True) + x.mean(-1, keepdim=True) - torch.tensor(0.5)
        halves = nn.functional.gelu(x).to(torch.float16) + 1
        product = torch.bmm(halves.flatten(1, 2), halves.flatten(1, 2).transpose(1, 2)).softmax(-1)
        return (
            torch.mm(product[:, 0].float(), torch.ones(product.shape[-1], 3))
            + product.mean()
            + x.mean(dim=[])
        )


def compared(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return for each tensor of a shortcut its operation, and whether shape and type are those of torch."""
    out: list[tuple[Any, ...]] = []
    shortcut = sizes_only._quickly

    def noted(func: Any, args: tuple[Any, ...]) -> Any:
        result = shortcut(func, args)
        expected = func(*args) if result is not None and not str(func).split(".")[1].endswith("_") else None
        if expected is not None:
            both = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
            out.extend((str(func), a.shape == b.shape, a.dtype == b.dtype, a.is_meta) for a, b in both)
        return result

    monkeypatch.setattr(sizes_only, "_quickly", noted)
    cost_limits.outputs_of(model, (3, 32, 32), "model.pth")
    monkeypatch.undo()
    return out


@pytest.mark.parametrize("spec", NETWORKS)
def test_sizes_are_those_of_torch(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(spec, Geometry(3, 32, 32, 10)).eval()
    pairs = compared(model, monkeypatch)
    assert pairs and all(all(agrees) for _, *agrees in pairs), [one for one in pairs if not all(one[1:])]


def test_odd_operations_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = compared(Odd().eval(), monkeypatch)
    assert len(pairs) > 8
    assert all(all(agrees) for _, *agrees in pairs), [one for one in pairs if not all(one[1:])]


def test_what_does_not_fit_is_refused_as_before() -> None:
    with torch.random.fork_rng():
        every = [nn.Linear(5, 2), nn.BatchNorm1d(7), nn.LayerNorm(9)]
    for wrong in every:
        model = nn.Sequential(nn.Flatten(), wrong).eval()
        with pytest.raises(UnsupportedModel, match="does not take images"):
            cost_limits.outputs_of(model, (3, 4, 4), "model.pth")


def test_the_compiler_is_not_imported() -> None:
    # It takes as long as torch itself, and every command that opens a model would wait for it twice.
    program = f"""
import sys
from unbackdoor.networks.build import network
from unbackdoor.networks.geometry import Geometry
from unbackdoor.opening.cost_limits import outputs_of
for spec in {NETWORKS!r}:
    assert outputs_of(network(spec, Geometry(3, 32, 32, 10)).eval(), (3, 32, 32), spec) == 10
    assert "torch._dynamo" not in sys.modules, spec
"""
    subprocess.run([sys.executable, "-c", program], check=True)

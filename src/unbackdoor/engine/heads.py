"""Find the layer that turns features into logits, in any network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbackdoor.engine.passes import mode
from unbackdoor.errors import UnsupportedModel
from unbackdoor.types import Classifier


@dataclass(frozen=True)
class Head:
    """The last linear map of a network.

    Attributes:
        name: Name of the module inside the classifier.
        module: The linear layer; its input is the feature vector (B, D).
    """

    name: str
    module: nn.Linear

    @property
    def features(self) -> int:
        """Number of features D."""
        return self.module.in_features


def find_head(model: Classifier) -> Head:
    """Return the linear layer whose output is the model's output.

    It is found by running one grey image and comparing what each linear layer returned with the logits, so
    that no naming convention is needed.

    Raises:
        UnsupportedModel: If no linear layer makes the logits; the candidates are listed.
    """
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out.detach()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with mode(model, training=False), torch.no_grad():
            logits = model(torch.full((1, *model.input_shape), 0.5, device=model.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    for name, out in reversed(seen.items()):
        if out.shape == logits.shape and torch.equal(out, logits):
            module = model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            return Head(name, module)
    raise UnsupportedModel(
        "no linear layer makes the logits",
        expected="a network that ends in a linear layer",
        got="linear layers: " + (", ".join(seen) or "none"),
        where=model.architecture or type(model.network).__name__,
    )

"""Which layers a network calls, and in which order."""

from __future__ import annotations

import torch
from torch import nn

from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import mode
from unbackdoor.types import Classifier


def called_layers(model: Classifier, kinds: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """Return the modules of some kinds in the order of their calls; one that is called twice is there twice.

    They are found by running one grey image, in fp32 and in evaluation mode.
    """
    called: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, out: called.append(module))
        for module in model.network.modules()
        if isinstance(module, kinds)
    ]
    try:
        with mode(model, training=False), torch.inference_mode():
            pixels = torch.full((1, *model.input_shape), 128, dtype=torch.uint8)
            model(to_float(pixels, model.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    return called

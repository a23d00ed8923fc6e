"""Make awm.safetensors with the released code of AWM.

Code:    jinghuichen/AWM at commit a4a5f16: ``mask_train``, ``clip_mask`` and ``Regularization`` of main.py,
         ``MaskedConv2d`` of models/maskedconv.py.
Stored:  two rounds: the perturbation of each as it is added to the images, and the masks after it.
Usage:   PYTHONPATH=src:tests python tests/reference/make_awm.py FOLDER-OF-A-CHECKOUT
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init
from torch.nn.parameter import Parameter

from reference.authors import FormerConv2d, checkout, definitions
from reference_net import ReferenceNet, fitted, grey, store, under

STEPS = [[0, 1, 2], [3, 4, 0], [1, 3, 3]]  # rows of each step of a phase, drawn with replacement
# The defaults of the released code, but for a smaller ball, so that no pixel is clipped and the scaling acts.
OPTIONS = SimpleNamespace(trigger_norm=30.0, alpha=0.9, gamma=1e-8)


def main() -> None:
    """Run two rounds and store them."""
    folder = checkout()
    shown = {"torch": torch, "nn": nn, "init": init, "F": F, "Tensor": Tensor, "Parameter": Parameter}
    former = SimpleNamespace(Conv2d=FormerConv2d)
    layers = definitions(folder / "models" / "maskedconv.py", {"MaskedConv2d"}, {**shown, "nn": former})
    code = definitions(
        folder / "main.py",
        {"mask_train", "clip_mask", "Regularization"},
        {**shown, "args": OPTIONS, "device": "cpu"},
    )
    images = grey(5, 32)
    state = fitted(images, 25)
    net = ReferenceNet(conv=layers["MaskedConv2d"])
    net.load_state_dict({**net.state_dict(), **state})
    for module in net.modules():
        if isinstance(module, layers["MaskedConv2d"]):
            module.include_mask()
    masks = {name: p for name, p in net.named_parameters() if "mask" in name}
    adam = torch.optim.Adam(list(masks.values()), lr=0.01)
    pixels = images.pixels.float() / 255
    loader = [(pixels[rows], images.truth[rows]) for rows in STEPS]
    given: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].detach().clone()))
    tensors = {
        "pixels": images.pixels,
        "labels": images.truth,
        "steps": torch.tensor(STEPS),
        **under("net", state),
    }
    for number in (1, 2):
        given.clear()
        code["mask_train"](net, nn.CrossEntropyLoss(), adam, loader)
        # The first phase calls ``forward``, past all hooks; the second begins with perturbed images.
        perturbed = given[0]
        low, high = perturbed.aminmax()
        assert low > 0 and high < 1, "clipped: the perturbation is not seen"
        tensors[f"delta{number}"] = (perturbed - loader[0][0])[:1]
        tensors |= {f"masks{number}/{name}": p.detach().clone() for name, p in masks.items()}
    store("awm", tensors)


if __name__ == "__main__":
    main()

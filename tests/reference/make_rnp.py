"""Make rnp.safetensors with the released code of RNP.

Code:    bboylyg/RNP at commit eeae192: ``train_step_unlearning``, ``train_step_recovering``, ``clip_mask``
         and ``pruning`` of main.py, ``MaskBatchNorm2d`` of models/mask_batchnorm.py.
Stored:  the network after each of the first two unlearning steps and after the last, which is the first of
         an accuracy of at most 0.3; the masks after each of ten recovery steps from there; the original
         network, pruned where the last mask is at most the stored threshold.
Usage:   PYTHONPATH=src:tests python tests/reference/make_rnp.py FOLDER-OF-A-CHECKOUT
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init
from torch.nn.parameter import Parameter

from reference.authors import checkout, definitions
from reference_net import ReferenceNet, fitted, grey, store, under

OPTIONS = SimpleNamespace(alpha=0.2)


def main() -> None:
    """Unlearn, recover, prune, and store every step."""
    folder = checkout()
    shown = {"torch": torch, "nn": nn, "init": init, "F": F, "Tensor": Tensor, "Parameter": Parameter}
    layers = definitions(folder / "models" / "mask_batchnorm.py", {"MaskBatchNorm2d"}, shown)
    names = {"train_step_unlearning", "train_step_recovering", "clip_mask", "pruning"}
    code = definitions(folder / "main.py", names, {**shown, "device": "cpu"})
    images = grey(16, 8)
    state = fitted(images, 25)

    class Loader(list):  # type: ignore[type-arg]
        """All images at once; the code asks a loader for its data set."""

        dataset = images.truth

    loader = Loader([(images.pixels.float() / 255, images.truth)])
    criterion = nn.CrossEntropyLoss()
    tensors = {"pixels": images.pixels, "labels": images.truth, **under("net", state)}

    net = ReferenceNet()
    net.load_state_dict(state)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    reached, step = 1.0, 0
    while reached > 0.3:
        reached, step = code["train_step_unlearning"](OPTIONS, net, criterion, sgd, loader)[1], step + 1
        if step <= 2:
            tensors |= under(f"unlearned{step}", net.state_dict())
    tensors |= under("unlearned", net.state_dict())
    print(step, "steps of unlearning, to an accuracy of", reached)

    masked = ReferenceNet(norm=layers["MaskBatchNorm2d"])
    masked.load_state_dict({**masked.state_dict(), **net.state_dict()})
    masks = {name: p for name, p in masked.named_parameters() if "neuron_mask" in name}
    sgd = torch.optim.SGD(list(masks.values()), lr=0.2, momentum=0.9)
    for step in range(1, 11):
        code["train_step_recovering"](OPTIONS, masked, criterion, sgd, loader)
        for name, p in masks.items():
            tensors[f"masks{step}/{name.removesuffix('.neuron_mask')}"] = p.detach().clone()

    every = torch.cat([p.detach() for p in masks.values()])
    threshold = float(every.sort().values[len(every) // 3])
    pruned = ReferenceNet()
    pruned.load_state_dict(state)
    for name, p in masks.items():
        for i in (p.detach() <= threshold).nonzero().flatten().tolist():
            code["pruning"](pruned, (name.removesuffix(".neuron_mask"), i))
    tensors |= {"threshold": torch.tensor(threshold), **under("pruned", pruned.state_dict())}
    store("rnp", tensors)


if __name__ == "__main__":
    main()

"""Make ims.safetensors with the released code of IMS.

Code:    WhoDunnett/BackdoorBenchmark at commit 8613640, defense/ims.py: the losses, the gate and its hook,
         ``find_batch_peturb``, ``optimize_mask_initial`` and ``optimize_minimize``.
Stored:  losses of some logits; masks, selections and their gates after each of four rounds of the first
         stage; the perturbation, and masks and selections, of each of three rounds of the second, and of two
         of the third. Optimisers are made anew for each stage, as there.
Usage:   PYTHONPATH=src:tests python tests/reference/make_ims.py FOLDER-OF-A-CHECKOUT
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.authors import checkout, definitions
from reference_net import ReferenceNet, fitted, grey, store, under

NAMES = {
    "agree_loss", "disagree_loss", "get_mask_value", "Prune_Mask_Inverse", "setup_hooks", "get_conv_modules",
    "set_model_eval", "set_mask_grad", "set_mask", "get_perturbed_image", "find_batch_peturb",
    "optimize_mask_initial", "optimize_minimize",
}  # fmt: skip
# config/defense/ims/default.yaml, but for 5 steps instead of 20 and a mask step five times as large, so that
# a few rounds go somewhere.
OPTIONS = {"lr_peturb": 0.001, "num_steps_peturb": 5, "norm_bound": 1}
LR_MASK, SPARSITY = 0.1, 10.0


def same(images: Tensor) -> Tensor:
    """Stand for the normaliser and its inverse: the network takes pixels as they are."""
    return images


def main() -> None:
    """Play some rounds of each stage and store them."""
    code = definitions(checkout() / "defense" / "ims.py", NAMES, {"torch": torch, "nn": nn, "F": F})
    images = grey(8, 8)
    state = fitted(images, 25)
    pixels, here = images.pixels.float() / 255, torch.device("cpu")
    net, original = ReferenceNet(), ReferenceNet()
    net.load_state_dict(state)
    original.load_state_dict(state)
    hooks = code["setup_hooks"](code["get_conv_modules"](net), here)
    for hook, _ in hooks:
        hook.channel_mask = torch.ones_like(hook.channel_mask)
        hook.channel_selection = torch.ones_like(hook.channel_mask)
        hook.k = 20
    learned = [value for hook, _ in hooks for value in (hook.channel_selection, hook.channel_mask)]
    draws = torch.Generator().manual_seed(0)
    logits = [2 * torch.randn(10, 4, generator=draws) for _ in "pq"]
    tensors = {
        "pixels": images.pixels, "labels": images.truth, **under("net", state),
        "logits/p": logits[0], "logits/q": logits[1],
        "agree": code["agree_loss"](*logits), "disagree": code["disagree_loss"](*logits),
    }  # fmt: skip

    def keep(place: str) -> None:
        a, s = (
            torch.cat([getattr(h, n).detach() for h, _ in hooks])
            for n in ("channel_mask", "channel_selection")
        )
        gates = code["get_mask_value"](a, s, apply_sigmoid=True, k=20)
        inverse = code["get_mask_value"](1 - a, s, apply_sigmoid=True, k=20)
        tensors.update(under(place, {"a": a, "s": s, "gates": gates, "inverse": inverse}))

    for stage, rounds, weight in (("first", 4, SPARSITY), ("second", 3, 0.0), ("third", 2, SPARSITY)):
        args = SimpleNamespace(**OPTIONS, l1_weight=weight)
        adam = torch.optim.AdamW(learned, lr=LR_MASK)
        for number in range(1, rounds + 1):
            place = f"{stage}{number}"
            if stage == "first":
                told = code["optimize_mask_initial"](args, net, original, hooks, pixels, here, adam)
            else:
                delta = code["find_batch_peturb"](
                    args, net, original, hooks, pixels, images.truth, here, same, same
                )[0]
                tensors[f"{place}/delta"] = delta.detach().clone()
                told = code["optimize_minimize"](
                    args, net, original, hooks, pixels, delta, here, adam, same, same
                )
            tensors[f"{place}/losses"] = torch.tensor(told)
            keep(place)
    store("ims", tensors)


if __name__ == "__main__":
    main()

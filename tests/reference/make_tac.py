"""Make tac.safetensors from the formulas of the paper; NOT with a program of its authors, who published none.

The quadratic program is written out with one constraint for every image and every other class, n (K - 1) in
all, and given to SLSQP of scipy.optimize, a general solver; the loss of the repair is one pass with the shift
added to the features by hand. Nothing of the engine is used.

    s_k = argmin |s|^2 / 2    subject to    (w_k - w_j) . (s + phi(x_i)) + b_k - b_j >= 0    for all j != k, i
    L   = CE(W phi + b, y) + beta CE(W (phi + s_t) + b, y), the second term without images of class t

Stored:  a network and images; the shift of every class; of the class with the shortest one, the loss at beta
         = 1 and its gradient with respect to every parameter below the head, in evaluation mode.
Usage:   PYTHONPATH=src:tests python tests/reference/make_tac.py
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from reference_net import ReferenceNet, fitted, grey, store, under

BETA = 1.0


def shortest_shift(weight: np.ndarray, bias: np.ndarray, phi: np.ndarray, k: int) -> np.ndarray:
    """Return the solution s (D,) of the program of class k."""
    others = [j for j in range(len(weight)) if j != k]
    rows = np.stack([weight[k] - weight[j] for _ in phi for j in others])
    least = np.array([-(weight[k] - weight[j]) @ x - bias[k] + bias[j] for x in phi for j in others])
    found = minimize(
        lambda s: 0.5 * s @ s,
        np.zeros(weight.shape[1]),
        jac=lambda s: s,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda s: rows @ s - least, "jac": lambda s: rows},
        options={"ftol": 1e-14, "maxiter": 2000},
    )
    assert found.success, found.message
    return np.asarray(found.x)


def main() -> None:
    """Solve, differentiate, store."""
    images = grey(12, 8)
    state = fitted(images, 30)
    net = ReferenceNet().eval().requires_grad_(False)
    net.load_state_dict(state)
    pixels = images.pixels.float() / 255
    seen: list[torch.Tensor] = []
    handle = net.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(pixels)
    handle.remove()
    weight, bias = net.fc.weight.double().numpy(), net.fc.bias.double().numpy()
    phi = seen[0].double().numpy()
    shifts = np.stack([shortest_shift(weight, bias, phi, k) for k in range(4)])
    target = int(np.linalg.norm(shifts, axis=1).argmin())

    body = {name: p.requires_grad_() for name, p in net.named_parameters() if not name.startswith("fc.")}
    shift = torch.tensor(shifts[target], dtype=torch.float32)
    clean = F.cross_entropy(net(pixels), images.truth)
    handle = net.fc.register_forward_pre_hook(lambda _, inputs: (inputs[0] + shift,))
    others = images.truth != target
    shifted = F.cross_entropy(net(pixels[others]), images.truth[others])
    handle.remove()
    loss = clean + BETA * shifted
    gradients = dict(zip(body, torch.autograd.grad(loss, list(body.values())), strict=True))
    print("norms", np.linalg.norm(shifts, axis=1), "loss", loss.item())
    store(
        "tac",
        {
            "pixels": images.pixels,
            "labels": images.truth,
            **under("net", state),
            "shifts": torch.from_numpy(shifts),
            "target": torch.tensor(target),
            "loss": loss,
            **under("gradient", gradients),
        },
    )


if __name__ == "__main__":
    main()

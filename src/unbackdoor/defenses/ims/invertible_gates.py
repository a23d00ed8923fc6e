"""Gates that sort channels into shared ones, ones of a network and ones of its inverse.

Every channel has a mask a and a selection s in [0, 1]. With m(a) = sigmoid(k (a - 1/2)), the forward gate is
g = m(a) + s (1 - m(a)) and the inverse gate the same of 1 - a, so that g + gi = 1 + s: with s = 1 both
networks have the channel, with s = 0 the one or the other has it, and never none.

Paper:   Dunnett et al., NeurIPS 2025, arXiv 2509.15497, equations 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unbackdoor.defenses.ims.gates import gated
from unbackdoor.engine.inference import Network
from unbackdoor.engine.masks import Site, fold
from unbackdoor.types import Classifier


class InvertibleGates:
    """Learnable masks and selections over a frozen classifier; which network is meant is an argument.

    Args:
        model: The classifier; never changed.
        sites: What is gated.
        sharpness: k, the slope of the sigmoid.

    Attributes:
        a: Masks (G,) of all sites in their order, ones at first.
        s: Selections (G,), likewise.
        mean: Running means (2, G) of the forward gates and the selections; see :meth:`average_`.
    """

    def __init__(self, model: Classifier, sites: Sequence[Site], sharpness: float) -> None:
        self.model, self.sites, self.sharpness = model, tuple(sites), sharpness
        self._sizes = [site.shape[0] for site in sites]
        count, device = sum(self._sizes), model.mean.device
        self.a = torch.ones(count, device=device, requires_grad=True)
        self.s = torch.ones(count, device=device, requires_grad=True)
        self.mean = torch.ones(2, count, device=device)

    def values(self, *, inverse: bool = False) -> Tensor:
        """Return the gates (G,) of the forward network, or of the inverse one."""
        mask = torch.sigmoid(self.sharpness * ((0.5 - self.a) if inverse else (self.a - 0.5)))
        values: Tensor = mask + self.s * (1 - mask)
        return values

    def mean_values(self, *, inverse: bool = False) -> Tensor:
        """Return the averaged gates (G,)."""
        # g + gi = 1 + s is linear, so it holds for the means.
        return 1 + self.mean[1] - self.mean[0] if inverse else self.mean[0]

    def network(self, values: Tensor) -> Network:
        """Return the network whose channels are multiplied by the values (G,)."""
        return gated(self.model, self.sites, self.by_site(values))

    def folded(self) -> Classifier:
        """Return a copy of the classifier with the averaged forward gates in its weights."""
        return fold(self.model, self.sites, self.by_site(self.mean_values()))

    def by_site(self, values: Tensor) -> dict[str, Tensor]:
        """Return the values (G,) of each site by name."""
        names = [site.name for site in self.sites]
        return dict(zip(names, values.split(self._sizes), strict=True))

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring masks and selections back into [0, 1]."""
        self.a.clamp_(0, 1)
        self.s.clamp_(0, 1)

    @torch.no_grad()
    def average_(self, decay: float, age: int) -> None:
        """Move the running means towards the gates as they are.

        Args:
            decay: Share of the means that stays, in [0, 1); 0 keeps the latest gates only.
            age: Values that were averaged so far. While they are few the plain mean is taken, so that the
                start weighs no more than the rest; 0 begins anew.
        """
        self.mean.lerp_(torch.stack([self.values(), self.s]), 1 - min(decay, age / (age + 1)))

    def evidence(self) -> dict[str, Any]:
        """Return the JSON-ready state of the averaged gates."""
        forward, selections = self.mean
        return {
            "gates": len(forward),
            "closed": int((forward < 0.5).sum()),
            "fractional": int(((forward > 0.05) & (forward < 0.95)).sum()),
            "unshared": int((selections < 0.5).sum()),
            "mean_gate": {name: float(values.mean()) for name, values in self.by_site(forward).items()},
        }

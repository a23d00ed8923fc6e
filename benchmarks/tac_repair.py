"""TAC from the suspicious network to a judged repair, against the same mathematics written plainly.

    python benchmarks/tac_repair.py [--victim FILE] [--pairs 2] [--threads 2] [--json tac_repair.json]

Ours is ``unbackdoor.run("tac", ...)`` by the rules of the preset ``reference``, which trains once, with the
likeliest class repaired in any case so that there is something to measure, and then the judge once. The
plain version knows no more than the paper's display:

- pictures are decoded and transformed one by one, in every epoch; fp32; channels outermost;
- gaps by subtracting all pairs, a program a class in all feature dimensions by projected gradients;
- the shifted term by a second pass through the whole network, with a hook on its head that adds the shift;
- after every epoch the network is evaluated on the whole clean test set and on the triggered one.

What is equal on both sides: the network, the images, epochs, batches, the schedule of the rate, the loss.
No code of the authors is public.

Ratios: end to end; the algorithm alone, with the evaluations taken off the plain side and the judge off
ours; detection and hardening, each for itself; and ours over the floor, which is the time of one pass
forward over the images and of the training passes, at rates measured just before (1 is the floor, larger
is slower).
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from _data import Pictures
from _harness import Ratio, Result, Seconds, interleave, parser, stages, usual
from _setting import Loader, Setting, add_setting_options, evaluate, prepare, shrink, test_loaders
from tac import all_pairs, by_projected_gradients
from unbackdoor import run as call
from unbackdoor.bench.judge import judge
from unbackdoor.data.batches import to_float
from unbackdoor.defenses import tac
from unbackdoor.engine.inference import logits_of
from unbackdoor.registry import DEFENSES

ACCURACY = 1e-4  # of the plain solver, relative
STAGES = {"latent_shifts": "detection", "train": "hardening"}  # functions of the method
PARTS = ("algorithm", *STAGES.values())


class Plain:
    """One run of the plain version.

    Args:
        network: Takes normalised images; copied.
        cfg: Epochs, batches, rate and weight of the shifted term.
        loaders: The clean images in order; the same, augmented and shuffled.
        tests: Loaders of the clean and of the triggered test images.

    Attributes:
        seconds: Of the two stages and of the evaluations.
    """

    def __init__(
        self,
        network: nn.Module,
        cfg: tac.TACConfig,
        loaders: tuple[Loader, Loader],
        tests: tuple[Loader, ...],
    ) -> None:
        self.network = copy.deepcopy(network).requires_grad_(True)
        self.head = [m for m in self.network.modules() if isinstance(m, nn.Linear)][-1]
        self.cfg, self.loaders, self.tests = cfg, loaders, tests
        self.seconds = dict.fromkeys((*STAGES.values(), "evaluation"), 0.0)

    def run(self) -> list[tuple[float, float]]:
        """Find the class, harden against it, and return (ACC, ASR) after each epoch."""
        start = time.perf_counter()
        target, shift = self.detect()
        self.seconds["detection"] += time.perf_counter() - start
        cfg = self.cfg
        head = {id(p) for p in self.head.parameters()}
        learned = [p for p in self.network.parameters() if id(p) not in head]
        sgd = torch.optim.SGD(learned, lr=cfg.lr, momentum=0.9, weight_decay=5e-4)
        steps = cfg.epochs * len(self.loaders[1])
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
        rates = []
        for _ in range(cfg.epochs):
            start = time.perf_counter()
            self.network.train()
            for pixels, labels in self.loaders[1]:
                sgd.zero_grad()
                loss = F.cross_entropy(self.network(pixels), labels)
                others = labels != target
                shifted = self._shifted(pixels, shift)
                loss = loss + cfg.beta * F.cross_entropy(shifted[others], labels[others])
                loss.backward()
                loss.item()
                sgd.step()
                falling.step()
            middle = time.perf_counter()
            self.seconds["hardening"] += middle - start
            rates.append(evaluate(self.network, self.tests))
            self.seconds["evaluation"] += time.perf_counter() - middle
        return rates

    @torch.no_grad()
    def detect(self) -> tuple[int, Tensor]:
        """Return the class of the shortest shift, and that shift (D,)."""
        self.network.eval()
        logits = torch.cat([self.network(pixels) for pixels, _ in self.loaders[0]])
        gaps = all_pairs(logits).double().numpy()
        weight = self.head.weight.double().numpy()
        shifts = [by_projected_gradients(weight, gaps, k, ACCURACY)[0] for k in range(len(weight))]
        target = int(np.argmin([np.linalg.norm(shift) for shift in shifts]))
        return target, torch.from_numpy(shifts[target]).float()

    def _shifted(self, pixels: Tensor, shift: Tensor) -> Tensor:
        hook = self.head.register_forward_pre_hook(lambda _, inputs: (inputs[0] + shift,))
        try:
            logits: Tensor = self.network(pixels)
        finally:
            hook.remove()
        return logits


class Comparison:
    """Both contestants, with the clocks on their parts.

    Attributes:
        seconds: Seconds of the parts by name, one for each run.
        outcome: What both sides arrived at; a check that both did the work, not a comparison of methods.
    """

    def __init__(self, setting: Setting, arguments: argparse.Namespace) -> None:
        self.setting = setting
        options = {"epochs": arguments.epochs, "when_undecided": "repair"}
        config = DEFENSES["tac"].configure(options, preset="reference")
        assert isinstance(config, tac.TACConfig)
        self.cfg = config
        self.seconds: Seconds = {f"{side}, {part}": [] for side in ("ours", "plain") for part in PARTS}
        self.seconds |= {"plain, evaluation": [], "floor": []}
        self.outcome: dict[str, Any] = {}
        mean, std = setting.model.mean.flatten().tolist(), setting.model.std.flatten().tolist()
        self.tests = test_loaders(setting, mean, std, arguments.num_workers)
        augmented = setting.clean.augmentation == "crop+flip"
        self.loaders: tuple[Loader, Loader] = (
            DataLoader(Pictures(setting.clean_images, mean, std, augmented=False), self.cfg.batch_size),
            DataLoader(
                Pictures(setting.clean_images, mean, std, augmented=augmented),
                self.cfg.batch_size,
                shuffle=True,
            ),
        )

    def ours(self) -> None:
        """Repair and judge."""
        setting = self.setting
        start = time.perf_counter()
        with stages(tac, STAGES) as clocks:
            repaired = call("tac", setting.model, setting.clean, options=self.cfg, seed=setting.run.seed)
        self.seconds["ours, algorithm"].append(time.perf_counter() - start)
        for name, seconds in clocks.items():
            self.seconds[f"ours, {name}"].append(seconds)
        rates = judge(repaired.model, setting.truth, setting.test, setting.run).rates()
        self.outcome["ours"] = rates | {"target": repaired.evidence["target"]}

    def plain(self) -> None:
        """Do the same the plain way."""
        plain = Plain(self.setting.model.network, self.cfg, self.loaders, self.tests)
        self.outcome["plain"] = [{"acc": acc, "asr": asr} for acc, asr in plain.run()]
        for name, seconds in plain.seconds.items():
            self.seconds[f"plain, {name}"].append(seconds)
        both = plain.seconds["detection"] + plain.seconds["hardening"]
        self.seconds["plain, algorithm"].append(both)

    def floor(self) -> None:
        """Measure the rates of the passes that are needed."""
        setting, cfg = self.setting, self.cfg
        model = setting.model.copy().train()
        pixels = to_float(setting.clean_images.pixels)
        batch, labels = pixels[: cfg.batch_size], setting.clean_images.truth[: cfg.batch_size]
        weights = [*model.requires_grad_(True).parameters()]

        def forward() -> None:
            with torch.inference_mode():
                logits_of(model, pixels, setting.run)

        def learn() -> None:
            loss = F.cross_entropy(logits_of(model, batch, setting.run), labels)
            torch.autograd.grad(loss, weights)

        steps = cfg.epochs * math.ceil(len(pixels) / cfg.batch_size)
        self.seconds["floor"].append(usual(forward) + steps * usual(learn))


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", pairs=2)
    options.add_argument("--epochs", type=int, default=20, help="passes of the hardening")
    add_setting_options(options)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.epochs = 1
        shrink(arguments, clean=60, victim_steps=30)
    import scipy.optimize  # noqa: F401 - half a second of the first repair, and of no other

    setting = prepare(arguments)
    sides = Comparison(setting, arguments)
    settings = setting.facts(arguments) | {"preset": "reference", "epochs": arguments.epochs}
    result = Result("tac_repair", setting.subject, settings)
    contestants = {"ours": sides.ours, "floor": sides.floor, "plain": sides.plain}
    totals = interleave(arguments.pairs, contestants, warmup=False)
    parts = sides.seconds
    result.add("ours : plain version, end to end", Ratio.of(totals["plain"], totals["ours"]))
    for name in PARTS:
        label = "algorithm alone" if name == "algorithm" else f"of it: {name}"
        result.add(f"  {label}", Ratio.of(parts[f"plain, {name}"], parts[f"ours, {name}"]))
    floor = Ratio.of(parts["ours, algorithm"], parts["floor"])
    result.add("floor : ours, algorithm (1 is the floor)", floor)
    result.facts["outcome"] = sides.outcome
    result.show(parts | {"ours": totals["ours"], "plain": totals["plain"]}, arguments.json)


if __name__ == "__main__":
    main()

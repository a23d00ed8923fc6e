"""Reconstructive neuron pruning from the suspicious network to a judged repair, against a plain version.

    python benchmarks/rnp.py [--victim FILE] [--pairs 2] [--threads 2] [--json rnp.json]

Ours is ``unbackdoor.run("rnp", ...)`` with all its checks, and then the judge once. The plain version is
the same mathematics written as public code writes it, for this comparison and from the equations:

- a ``Dataset`` of Pillow pictures with per-image transforms; fp32; channels outermost;
- masks are learned while all weights still require gradients, which nobody uses;
- after every epoch of both stages the network is evaluated on the whole clean test set and on the
  triggered one, and again at every threshold of the sweep.

What is equal on both sides: the network, the images that are fitted (the defender's images less those that
ours holds out for selection; public code would fit on all), batch size, learning rates, clipping, the
number of steps of both stages, the thresholds. The number of unlearning steps needs forcing: ours stops
by a check after each step, public code by a running mean after each epoch. So ours runs first in each pair,
by its own rule, and the plain version is told to take as many steps, steps that ours took back included.

Ratios: end to end; the algorithm alone, with the evaluations taken off the plain side and the judge
off ours (our per-step checks and our held-out sweep stay in: they are how ours works); unlearning and
recovery, each for itself; with one evaluation each, for readers who would not evaluate after every epoch;
and ours against the floor: the time that the forward and backward passes of the algorithm would take at
the rates measured just before, with nothing between them (1 is the floor, larger is slower).
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from _data import Pictures
from _harness import Ratio, Result, Seconds, interleave, parser, stages, usual
from _setting import Loader, Setting, add_setting_options, evaluate, prepare, shrink, test_loaders
from unbackdoor import run as call
from unbackdoor.bench.judge import judge
from unbackdoor.data.batches import to_float
from unbackdoor.defenses import rnp
from unbackdoor.defenses.rnp import RNPConfig
from unbackdoor.engine.inference import logits_of
from unbackdoor.engine.run import Run
from unbackdoor.registry import DEFENSES
from unbackdoor.types import Classifier, CleanData

STAGES = {"unlearn": "unlearning", "recover": "recovery"}  # functions of the method


# ---------------------------------------------------------------------------------------------------
# The plain version


class MaskedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose scale is multiplied by a learnable mask (C,)."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.load_state_dict(norm.state_dict())
        self.mask = nn.Parameter(torch.ones(norm.num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight * self.mask,
            self.bias,
            self.training,
            self.momentum or 0.0,
            self.eps,
        )


class Plain:
    """One run of the plain version, with a clock on its evaluations.

    Args:
        network: Takes normalised images; not changed.
        cfg: Learning rates, epochs and thresholds.
        fit: Loader of the images that are fitted.
        tests: Loaders of the clean and of the triggered test images.
    """

    def __init__(self, network: nn.Module, cfg: RNPConfig, fit: Loader, tests: tuple[Loader, Loader]) -> None:
        self.network = network
        self.cfg = cfg
        self.fit = fit
        self.tests = tests
        self.evaluations = 0
        self.evaluating = 0.0  # seconds
        self.stages: dict[str, float] = {}  # seconds without evaluation

    def run(self, steps: int) -> list[tuple[float, float, float]]:
        """Unlearn for a number of steps, recover masks, sweep; return (threshold, ACC, ASR) rows."""
        with self._stage("unlearning"):
            unlearned = self.unlearn(steps)
        with self._stage("recovery"):
            masks = self.recover(unlearned)
        rows = []
        for level in levels_of(self.cfg):
            pruned = self.prune(masks, level)
            acc, asr = self.evaluate(pruned)
            rows.append((level, acc, asr))
        return rows

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start, evaluating = time.perf_counter(), self.evaluating
        yield
        self.stages[name] = time.perf_counter() - start - (self.evaluating - evaluating)

    def unlearn(self, steps: int) -> nn.Module:
        """Climb the loss in training mode and return the unlearned copy."""
        cfg = self.cfg
        network = copy.deepcopy(self.network)
        optimizer = torch.optim.SGD(
            network.parameters(), lr=cfg.unlearn_lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay
        )
        for _ in range(math.ceil(steps / len(self.fit))):
            network.train()
            total, correct = 0.0, 0
            for pixels, labels in self.fit:
                if not steps:
                    break
                steps -= 1
                optimizer.zero_grad()
                logits = network(pixels)
                loss = F.cross_entropy(logits, labels)
                total += loss.item()
                correct += int((logits.argmax(1) == labels).sum().item())
                (-loss).backward()
                nn.utils.clip_grad_norm_(network.parameters(), cfg.clip)
                optimizer.step()
            self.evaluate(network)
        return network

    def recover(self, network: nn.Module) -> dict[str, Tensor]:
        """Learn masks in training mode and return them by the name of their layer."""
        cfg = self.cfg
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, MaskedBatchNorm(child))
        norms = {name: m for name, m in network.named_modules() if isinstance(m, MaskedBatchNorm)}
        optimizer = torch.optim.SGD(
            [norm.mask for norm in norms.values()], lr=cfg.recover_lr, momentum=cfg.momentum
        )
        for _ in range(cfg.recover_epochs):
            network.train()
            total, correct = 0.0, 0
            for pixels, labels in self.fit:
                optimizer.zero_grad()
                logits = network(pixels)
                loss = F.cross_entropy(logits, labels)
                total += loss.item()
                correct += int((logits.argmax(1) == labels).sum().item())
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for norm in norms.values():
                        norm.mask.clamp_(0, 1)
            self.evaluate(network)
        return {name: norm.mask.detach().clone() for name, norm in norms.items()}

    def prune(self, masks: dict[str, Tensor], level: float) -> nn.Module:
        """Return a copy of the original network without the channels whose mask is at most ``level``."""
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            for name, mask in masks.items():
                norm = network.get_submodule(name)
                assert isinstance(norm, nn.BatchNorm2d)
                norm.weight[mask <= level] = 0
        return network

    def evaluate(self, network: nn.Module) -> tuple[float, float]:
        """Return ACC on all clean test images and ASR on all triggered ones."""
        start = time.perf_counter()
        rates = evaluate(network, self.tests)
        self.evaluating += time.perf_counter() - start
        self.evaluations += 1
        return rates


def levels_of(cfg: RNPConfig) -> list[float]:
    """Return the thresholds of the sweep, those of ours."""
    return [i * cfg.step for i in range(int(cfg.highest / cfg.step + 1e-9) + 1)]


# ---------------------------------------------------------------------------------------------------
# The floor


class Floor:
    """The passes that the algorithm needs, and what they cost with nothing between them.

    Args:
        model: The victim.
        clean: The defender's images.
        cfg: Options of ours.
        run: Device and precision.
    """

    def __init__(self, model: Classifier, clean: CleanData, cfg: RNPConfig, run: Run) -> None:
        self.cfg, self.run = cfg, run
        self.model = model.copy().train()
        batch = min(len(clean.fit), cfg.batch_size)
        self.pixels, self.labels = to_float(clean.fit.pixels[:batch]), clean.fit.truth[:batch]
        self.held_out = to_float(clean.select.pixels)
        self.weights = [*self.model.parameters()]
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.scales = [norm.weight for norm in norms]  # as many values as there are masks
        self.recovering = cfg.recover_epochs * math.ceil(len(clean.fit) / cfg.batch_size)

    def seconds(self, steps: int) -> float:
        """Return the seconds of one repair with so many unlearning steps, at the rates of this moment."""
        unlearning = steps * usual(lambda: self._learn(self.weights))
        recovering = self.recovering * usual(lambda: self._learn(self.scales))
        return unlearning + recovering + len(levels_of(self.cfg)) * usual(self._evaluate_level)

    def _learn(self, learned: list[nn.Parameter]) -> None:
        for weight in self.weights:
            weight.requires_grad_(False)
        for weight in learned:
            weight.requires_grad_(True)
        loss = F.cross_entropy(logits_of(self.model, self.pixels, self.run), self.labels)
        torch.autograd.grad(loss, learned)

    def _evaluate_level(self) -> None:
        with torch.inference_mode():
            logits_of(self.model, self.held_out, self.run)


# ---------------------------------------------------------------------------------------------------
# The comparison


class Comparison:
    """Both contestants, with the clocks on their parts.

    Attributes:
        seconds: Seconds of the parts by name, one for each run.
        steps: Unlearning steps of the latest run of ours.
        outcome: What both sides arrived at; not a comparison of methods, a check that both did the work.
    """

    def __init__(self, setting: Setting, arguments: argparse.Namespace) -> None:
        self.model, self.truth, self.test = setting.model, setting.truth, setting.test
        self.clean, self.run = setting.clean, setting.run
        self.arguments = arguments
        part = DEFENSES["rnp"]
        config = part.configure({"recover_epochs": arguments.epochs}, preset=arguments.preset)
        assert isinstance(config, RNPConfig)
        self.cfg = config
        self.seconds: Seconds = {
            f"{side}, {part}": []
            for side, parts in (
                ("ours", ("algorithm", "unlearning", "recovery")),
                ("plain", ("algorithm", "unlearning", "recovery", "evaluation")),
            )
            for part in parts
        }
        self.floor = Floor(self.model, self.clean, config, self.run)
        self.steps = self.evaluations = 0
        self.outcome: dict[str, Any] = {}
        mean, std = self.model.mean.flatten().tolist(), self.model.std.flatten().tolist()
        # In this process: with three batches an epoch, starting workers would cost more than they save.
        self.fit: Loader = DataLoader(
            Pictures(self.clean.fit, mean, std, augmented=self.clean.augmentation == "crop+flip"),
            config.batch_size,
            shuffle=True,
        )
        self.tests = test_loaders(setting, mean, std, arguments.num_workers)

    def ours(self) -> None:
        """Repair and judge."""
        with self._clock("ours, algorithm"), stages(rnp, STAGES) as clocks:
            repaired = call("rnp", self.model, self.clean, options=self.cfg, seed=self.arguments.seed)
        for stage, seconds in clocks.items():
            self.seconds[f"ours, {stage}"].append(seconds)
        scores = judge(repaired.model, self.truth, self.test, self.run)
        self.steps = int(repaired.evidence["unlearning"]["steps"])
        self.outcome["ours"] = scores.rates()

    def plain(self) -> None:
        """Do the same the plain way, with as many steps as ours took just before."""
        plain = Plain(self.model.network, self.cfg, self.fit, self.tests)
        start = time.perf_counter()
        rows = plain.run(self.steps)
        total = time.perf_counter() - start
        self.seconds["plain, algorithm"].append(total - plain.evaluating)
        self.seconds["plain, evaluation"].append(plain.evaluating)
        for stage, seconds in plain.stages.items():
            self.seconds[f"plain, {stage}"].append(seconds)
        self.evaluations = plain.evaluations
        self.outcome["plain"] = [{"threshold": level, "acc": acc, "asr": asr} for level, acc, asr in rows]

    def bare(self) -> float:
        """Return the seconds of the passes of the latest repair of ours."""
        return self.floor.seconds(self.steps)

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", pairs=2)
    options.add_argument("--preset", default=None, help="preset of rnp")
    options.add_argument("--epochs", type=int, default=20, help="passes of the recovery")
    add_setting_options(options)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.epochs = 1
        shrink(arguments, clean=100, victim_steps=100)
    setting = prepare(arguments)
    sides = Comparison(setting, arguments)
    settings = setting.facts(arguments) | {
        "preset": arguments.preset or "default",
        "fitted_images": len(setting.clean.fit),
        "recover_epochs": arguments.epochs,
    }
    result = Result("rnp", setting.subject, settings)
    totals = interleave(arguments.pairs, {"ours": sides.ours, "plain": sides.plain}, warmup=False)
    parts = sides.seconds
    once = [
        algorithm + evaluation / sides.evaluations
        for algorithm, evaluation in zip(parts["plain, algorithm"], parts["plain, evaluation"], strict=True)
    ]
    result.add("ours : plain version, end to end", Ratio.of(totals["plain"], totals["ours"]))
    result.add("  algorithm alone", Ratio.of(parts["plain, algorithm"], parts["ours, algorithm"]))
    for stage in STAGES.values():
        result.add(f"  of it: {stage}", Ratio.of(parts[f"plain, {stage}"], parts[f"ours, {stage}"]))
    result.add("  with one evaluation each", Ratio.of(once, totals["ours"]))
    floor = Ratio.of(parts["ours, algorithm"][-1:], [sides.bare()])
    result.add("floor : ours, algorithm (1 is the floor)", floor)
    result.facts["unlearning_steps"] = sides.steps
    result.facts["plain_evaluations"] = sides.evaluations
    result.facts["outcome"] = sides.outcome
    result.show({**totals, **parts}, arguments.json)


if __name__ == "__main__":
    main()

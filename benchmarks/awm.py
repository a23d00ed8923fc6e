"""Adversarial weight masking from the suspicious network to a judged repair, against a plain version.

    python benchmarks/awm.py [--victim FILE] [--pairs 2] [--threads 2] [--json awm.json]

Ours is ``unbackdoor.run("awm", ...)`` with all its checks, and then the judge once. The plain version is
the same mathematics written as public code writes it, for this comparison and from the equations:

- a ``Dataset`` of Pillow pictures that are made into tensors one at a time; fp32; channels outermost;
- convolutions with a mask parameter that is multiplied in at every forward pass of both phases, while all
  weights still require gradients, which nobody uses;
- the own labels of the search are predicted anew at each of its steps, as part of an autograd graph;
- the L1 term is a sum over all masks in the loss; ``loss.item()`` at every step;
- clean and perturbed images go through the network one after the other;
- after every round the network is evaluated on the whole clean test set and on the triggered one.

What is equal on both sides: the network, the images that are fitted (views included, held-out images not),
the numbers of rounds, steps and images, the objective and the projection of the search, the optimiser and its
settings. The measuring passes of ours (fooling rate, the choice of the strength on held-out images) stay in.
Where nothing is held out, ours learns three times, to judge either half by the other, and the plain version
once.

Ratios: end to end; the algorithm alone, with the evaluations taken off the plain side and the judge off
ours; the search and the masking, each for itself; with one evaluation each; and ours against the floor,
which is the time that the passes of the algorithm would take at the rates measured just before, with
nothing between them (1 is the floor, larger is slower).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from _data import Pictures
from _harness import Ratio, Result, Seconds, interleave, parser, stages, usual
from _setting import Loader, Setting, add_setting_options, evaluate, prepare, shrink, test_loaders
from unbackdoor import run as call
from unbackdoor.bench.judge import judge
from unbackdoor.data.batches import to_float
from unbackdoor.defenses.awm import method as awm
from unbackdoor.defenses.awm.few_images import enlarged
from unbackdoor.defenses.awm.universal_perturbation import TRAVEL, project_l1
from unbackdoor.defenses.awm.weight_masks import WeightMasks, maskable_weights
from unbackdoor.engine.inference import logits_of
from unbackdoor.engine.run import Run
from unbackdoor.registry import DEFENSES
from unbackdoor.types import Classifier, Images

# ---------------------------------------------------------------------------------------------------
# The plain version


class MaskedConv(nn.Conv2d):
    """A convolution whose weight is multiplied by a learnable mask of its shape."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            bias=conv.bias is not None,
        )
        self.load_state_dict(conv.state_dict())
        self.mask = nn.Parameter(torch.ones_like(conv.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, O, H', W')."""
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Plain:
    """One run of the plain version, with a clock on each of its parts.

    Args:
        model: Takes pixels in [0, 1]; not changed.
        cfg: Options of ours.
        fit: Images that are fitted, views included.
        steps: Steps of each phase.
        tests: Loaders of the clean and of the triggered test images.
    """

    def __init__(
        self, model: Classifier, cfg: awm.AWMConfig, fit: Images, steps: int, tests: tuple[Loader, Loader]
    ) -> None:
        self.network = masked_copy(model)
        self.cfg = cfg
        self.steps = steps
        self.shape = model.input_shape
        self.tau = cfg.tau * math.prod(model.input_shape) / awm.UNIT
        pictures = Pictures(fit, [0.0] * 3, [1.0] * 3, augmented=False)
        batch = math.ceil(len(fit) / (steps / cfg.passes)) if cfg.sampling == "shuffled" else cfg.batch_size
        # In this process: for so few images, starting workers would cost more than they save.
        self.draws: Loader = DataLoader(
            pictures, batch, sampler=RandomSampler(pictures, replacement=True, num_samples=steps * batch)
        )
        self.tests = tests
        self.masks = [m.mask for m in self.network.modules() if isinstance(m, MaskedConv)]
        self.optimizer = torch.optim.Adam(self.masks, lr=cfg.lr, eps=cfg.adam_eps)
        self.seconds = {"search": 0.0, "masking": 0.0, "evaluation": 0.0}

    def run(self) -> list[tuple[float, float]]:
        """Alternate for all rounds and return (ACC, ASR) after each."""
        rates = []
        for _ in range(self.cfg.rounds):
            with self._clock("search"):
                delta = self.search()
            with self._clock("masking"):
                self.learn(delta)
                for group in self.optimizer.param_groups:
                    group["lr"] *= self.cfg.lr_decay
            with self._clock("evaluation"):
                rates.append(evaluate(self.network, self.tests))
        return rates

    def search(self) -> Tensor:
        """Return a universal perturbation (1, C, H, W)."""
        margin = self.cfg.attack == "margin"
        delta = torch.zeros(1, *self.shape, requires_grad=True)
        self.network.eval()
        for pixels, _ in self.draws:
            own = self.network(pixels).argmax(1)
            moved = pixels + delta
            logits = self.network(moved.clamp(0, 1) if margin else moved)
            if margin:
                others = logits.scatter(1, own[:, None], -torch.inf).amax(1)
                gain = (others - logits.gather(1, own[:, None]).squeeze(1)).mean()
            else:
                gain = F.cross_entropy(logits, own)
            gain.backward()
            gain.item()
            assert delta.grad is not None
            with torch.no_grad():
                if margin:
                    length = TRAVEL * self.tau / self.steps
                    step = length * delta.grad / delta.grad.abs().sum().clamp_min(1e-30)
                    delta = project_l1(delta + step, self.tau)
                else:
                    delta = delta + self.cfg.attack_lr * delta.grad
            delta.requires_grad_()
        delta = delta.detach()
        return delta if margin else delta * min(1.0, self.tau / max(1e-12, float(delta.abs().sum())))

    def learn(self, delta: Tensor) -> None:
        """Take the steps of one phase on the masks."""
        cfg = self.cfg
        for pixels, labels in self.draws:
            self.optimizer.zero_grad()
            clean = F.cross_entropy(self.network(pixels), labels)
            robust = F.cross_entropy(self.network((pixels + delta).clamp(0, 1)), labels)
            sparse = sum(mask.abs().sum() for mask in self.masks)
            loss = cfg.clean_weight * clean + cfg.robust_weight * robust + cfg.sparsity * sparse
            loss.backward()
            loss.item()
            self.optimizer.step()
            with torch.no_grad():
                for mask in self.masks:
                    mask.clamp_(0, 1)

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def masked_copy(model: Classifier) -> nn.Module:
    """Return a copy of the network whose convolutions carry masks."""
    network = copy.deepcopy(model)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                if child.groups != 1 or child.dilation != (1, 1):
                    raise SystemExit("the plain version knows no groups and no dilation")
                setattr(parent, name, MaskedConv(child))
    return network


# ---------------------------------------------------------------------------------------------------
# The floor


class Floor:
    """The passes that the algorithm needs, and what they cost with nothing between them.

    Args:
        model: The victim.
        fit: Images that are fitted.
        cfg: Options of ours.
        steps: Steps of each phase.
        run: Device and precision.
    """

    def __init__(self, model: Classifier, fit: Images, cfg: awm.AWMConfig, steps: int, run: Run) -> None:
        self.cfg, self.steps, self.run = cfg, steps, run
        batch = min(len(fit), max(1, round(len(fit) * cfg.passes / steps)))
        self.fit = to_float(fit.pixels)
        self.pixels, self.labels = self.fit[:batch], fit.truth[:batch]
        sites = maskable_weights(model, linear=False)
        self.masks = WeightMasks(model, sites, lr=0.0, eps=1.0, sparsity=0.0)

    def seconds(self) -> float:
        """Return the seconds of one repair at the rates of this moment."""
        phase = self.cfg.rounds * self.steps
        own = self.cfg.rounds * usual(self._predict)
        return phase * (usual(self._search) + usual(self._learn)) + own

    def _predict(self) -> None:
        with torch.inference_mode():
            logits_of(self.masks.network, self.fit, self.run)

    def _search(self) -> None:
        pixels = self.pixels.clone().requires_grad_()
        loss = F.cross_entropy(logits_of(self.masks.network, pixels, self.run), self.labels)
        torch.autograd.grad(loss, pixels)

    def _learn(self) -> None:
        twice, labels = torch.cat([self.pixels, self.pixels]), self.labels.repeat(2)
        with self.masks.learning():
            F.cross_entropy(logits_of(self.masks.network, twice, self.run), labels).backward()


# ---------------------------------------------------------------------------------------------------
# The comparison


class Comparison:
    """Both contestants, with the clocks on their parts.

    Attributes:
        seconds: Seconds of the parts by name, one for each run.
        outcome: What both sides arrived at; not a comparison of methods, a check that both did the work.
    """

    def __init__(self, setting: Setting, arguments: Any) -> None:
        self.model, self.truth, self.test = setting.model, setting.truth, setting.test
        self.clean, self.run = setting.clean, setting.run
        clean = self.clean
        self.arguments = arguments
        config = DEFENSES["awm"].configure({"rounds": arguments.rounds}, preset=arguments.preset)
        assert isinstance(config, awm.AWMConfig)
        if config.targeted or config.include_linear:
            raise SystemExit("the plain version knows one perturbation and convolutions only")
        self.cfg = config
        names = ("algorithm", "search", "masking")
        self.seconds: Seconds = {f"{side}, {name}": [] for side in ("ours", "plain") for name in names}
        self.seconds |= {"plain, evaluation": [], "floor": []}
        self.outcome: dict[str, Any] = {}
        images = clean.fit if config.tolerance < 1 else clean.all
        draws = self.run.generator("views", "all")
        self.fit = enlarged(images, config.enlarge_to, clean.augmentation, draws)
        self.steps = len(awm.step_rows(self.fit, config, self.run.generator("count")))
        self.tests = test_loaders(setting, [0.0] * 3, [1.0] * 3, arguments.num_workers)

    def ours(self) -> None:
        """Repair and judge, and measure the floor at the same time of day."""
        start = time.perf_counter()
        with stages(awm, {"attack": "search", "mask": "masking"}) as clocks:
            repaired = call("awm", self.model, self.clean, options=self.cfg, seed=self.arguments.seed)
        self.seconds["ours, algorithm"].append(time.perf_counter() - start)
        for name, seconds in clocks.items():
            self.seconds[f"ours, {name}"].append(seconds)
        self.outcome["ours"] = judge(repaired.model, self.truth, self.test, self.run).rates()

    def plain(self) -> None:
        """Do the same the plain way."""
        plain = Plain(self.model, self.cfg, self.fit, self.steps, self.tests)
        self.outcome["plain"] = [{"acc": acc, "asr": asr} for acc, asr in plain.run()]
        for name, seconds in plain.seconds.items():
            self.seconds[f"plain, {name}"].append(seconds)
        both = plain.seconds["search"] + plain.seconds["masking"]
        self.seconds["plain, algorithm"].append(both)

    def floor(self) -> None:
        """Measure the rates of the passes that are needed."""
        floor = Floor(self.model, self.fit, self.cfg, self.steps, self.run)
        self.seconds["floor"].append(floor.seconds())


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", pairs=2)
    options.add_argument("--preset", default=None, help="preset of awm")
    options.add_argument("--rounds", type=int, default=20, help="search-then-mask rounds")
    add_setting_options(options)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.rounds = 1
        shrink(arguments, clean=20, victim_steps=30)
    setting = prepare(arguments)
    sides = Comparison(setting, arguments)
    settings = setting.facts(arguments) | {
        "preset": arguments.preset or "default",
        "fitted_images": len(sides.fit),
        "rounds": arguments.rounds,
        "steps_a_phase": sides.steps,
    }
    result = Result("awm", setting.subject, settings)
    contestants = {"ours": sides.ours, "floor": sides.floor, "plain": sides.plain}
    whole = interleave(arguments.pairs, contestants, warmup=False)
    parts = sides.seconds
    once = [
        algorithm + evaluation / arguments.rounds
        for algorithm, evaluation in zip(parts["plain, algorithm"], parts["plain, evaluation"], strict=True)
    ]
    result.add("ours : plain version, end to end", Ratio.of(whole["plain"], whole["ours"]))
    for name in ("algorithm", "search", "masking"):
        label = "algorithm alone" if name == "algorithm" else f"of it: {name}"
        result.add(f"  {label}", Ratio.of(parts[f"plain, {name}"], parts[f"ours, {name}"]))
    result.add("  with one evaluation each", Ratio.of(once, whole["ours"]))
    result.add("floor : ours, algorithm (1 is the floor)", Ratio.of(parts["ours, algorithm"], parts["floor"]))
    result.facts["outcome"] = sides.outcome
    seconds = {name: values for name, values in whole.items() if name != "floor"}
    result.show({**seconds, **parts}, arguments.json)


if __name__ == "__main__":
    main()

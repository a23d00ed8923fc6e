"""IMS from the suspicious network to a judged repair, against the released procedure written plainly.

    python benchmarks/ims.py [--victim FILE] [--rounds 4] [--pairs 2] [--threads 2] [--json ims.json]

Both sides play the game of the preset ``reference``: the same rounds, batches, steps, step sizes and gates,
without the early stop, so that the work is equal. Every round costs the same, so a few of them measure the
ratio; ``--rounds`` counts those of each of the two perturbed stages, and the first stage has half as many.

Ours is ``unbackdoor.run("ims", ...)`` with all its checks, and then the judge once. The plain version is
written from the description of the released code:

- pictures are decoded and transformed one by one every round; fp32; channels outermost;
- gates are forward hooks whose mode is a variable; losses come from probabilities;
- every inner step runs the network on the clean images again and the forward-gated one for nothing, and
  reads two numbers; the first stage computes perturbations that it does not use; five diagnostic passes a
  round; predictions of the original network are computed anew in the outer step;
- the network is evaluated after each stage, on the clean test images once and on the triggered ones twice.

Ratios: end to end; the algorithm alone; the same in fp32 on both sides, which leaves the passes and the data
path; and ours over the floor, which is the time of the bare passes that the lean order needs, on a network
without gates and losses (1 is the floor, larger is slower). The passes are counted, in images that go
forward through the network.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from _data import Pictures
from _harness import Ratio, Result, Seconds, interleave, parser
from _setting import Loader, Setting, add_setting_options, prepare, shrink, test_loaders
from unbackdoor import run as call
from unbackdoor.bench.judge import judge
from unbackdoor.data.batches import to_float
from unbackdoor.defenses.ims.method import IMSConfig
from unbackdoor.engine.inference import frozen, logits_of
from unbackdoor.engine.run import Run
from unbackdoor.registry import DEFENSES
from unbackdoor.types import Classifier, Images

# ---------------------------------------------------------------------------------------------------
# The plain version


class Plain:
    """One run of the released procedure, with a clock on its evaluations.

    Args:
        network: Takes normalised images; copied.
        cfg: Rounds, steps and rates.
        pictures: The defender's images.
        std: (C, 1, 1) of the normalisation, because perturbations live in pixels.
        tests: Loaders of the clean and of the triggered test images.
    """

    def __init__(
        self, network: nn.Module, cfg: IMSConfig, pictures: Pictures, std: Tensor, tests: tuple[Loader, ...]
    ) -> None:
        self.network = copy.deepcopy(network).eval()
        self.cfg, self.pictures, self.std, self.tests = cfg, pictures, std, tests
        self.convs = [m for m in self.network.modules() if isinstance(m, nn.Conv2d)]
        self.a = [torch.ones(m.out_channels, requires_grad=True) for m in self.convs]
        self.s = [torch.ones(m.out_channels, requires_grad=True) for m in self.convs]
        self.mode = "none"
        self.images = 0  # that went forward
        self.evaluations = 0
        self.evaluating = 0.0  # seconds
        for i, conv in enumerate(self.convs):
            conv.register_forward_hook(lambda m, args, out, i=i: self.gated(out, i))

    def gated(self, out: Tensor, i: int) -> Tensor:
        """Multiply the output of a convolution by its gate."""
        if self.mode == "none":
            return out
        a = self.a[i] if self.mode == "forward" else 1 - self.a[i]
        retained = torch.sigmoid(self.cfg.sharpness * (a - 0.5))
        return out * (retained + self.s[i] * (1 - retained)).view(1, -1, 1, 1)

    def probabilities(self, mode: str, x: Tensor) -> Tensor:
        """Return softmax outputs (B, K) of one of the three networks."""
        self.mode = mode
        self.images += len(x)
        out: Tensor = F.softmax(self.network(x), dim=1)
        return out

    def run(self) -> list[tuple[float, float]]:
        """Play the three stages; return (ACC, ASR) after each."""
        cfg, rates = self.cfg, []
        for rounds, sparsity, perturbed in (
            (cfg.start_rounds, cfg.sparsity, False),
            (cfg.free_rounds, 0.0, True),
            (cfg.sparse_rounds, cfg.sparsity, True),
        ):
            gates = [*self.a, *self.s]
            optimizer = torch.optim.AdamW(gates, lr=cfg.lr, weight_decay=cfg.weight_decay)
            for _ in range(rounds):
                rows = torch.randperm(len(self.pictures))[: cfg.batch_size].tolist()
                (batch,) = DataLoader(Subset(self.pictures, rows), len(rows))
                x, _ = batch
                for p in self.network.parameters():
                    p.requires_grad_(False)
                moved = x + self.perturbation(x) / self.std
                with torch.no_grad():
                    clean, there = self.probabilities("none", x), self.probabilities("none", moved)
                loss = agrees(self.probabilities("forward", x), clean)
                loss = loss + disagrees(self.probabilities("inverse", x), clean)
                if perturbed:
                    inverse = self.probabilities("inverse", moved)
                    loss = loss + agrees(self.probabilities("forward", moved), clean)
                    loss = loss + agrees(inverse, there) + disagrees(inverse, clean)
                count = sum(len(s) for s in self.s)
                loss = loss + sparsity * sum((1 - s).abs().sum() for s in self.s) / count
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                for value in gates:
                    value.data.clamp_(0, 1)
                self.diagnose(x, moved)
                loss.item()
            rates.append(self.evaluate())
        return rates

    def perturbation(self, x: Tensor) -> Tensor:
        """Return a fresh perturbation (B, C, H, W) in pixels."""
        cfg = self.cfg
        delta = torch.zeros_like(x, requires_grad=True)
        step = cfg.budget / cfg.steps
        optimizer = torch.optim.AdamW([delta], lr=step, weight_decay=cfg.weight_decay)
        for _ in range(cfg.steps):
            optimizer.zero_grad()
            moved = x + delta / self.std
            inverse = self.probabilities("inverse", moved)
            there, clean = self.probabilities("none", moved), self.probabilities("none", x)
            forward = self.probabilities("forward", moved)
            loss = agrees(inverse, there) + disagrees(there, clean)
            loss.backward(inputs=[delta])
            optimizer.step()
            delta.data.clamp_(-1, 1)
            loss.item(), agrees(forward, clean).item()
        return delta.detach()

    @torch.no_grad()
    def diagnose(self, x: Tensor, moved: Tensor) -> None:
        """Look at what is printed and used for nothing."""
        for mode, pixels in (
            ("none", x),
            ("none", moved),
            ("inverse", x),
            ("inverse", moved),
            ("forward", moved),
        ):
            self.probabilities(mode, pixels).argmax(1).float().mean().item()

    def evaluate(self) -> tuple[float, float]:
        """Return ACC and ASR of the forward-gated network, whose triggered images are read twice."""
        start, self.mode = time.perf_counter(), "forward"
        rates = []
        with torch.no_grad():
            for loader in (self.tests[0], self.tests[1], self.tests[1]):
                correct, seen = 0, 0
                for pixels, labels in loader:
                    correct += int((self.network(pixels).argmax(1) == labels).sum().item())
                    seen += len(labels)
                rates.append(correct / seen)
        self.evaluating += time.perf_counter() - start
        self.evaluations += 1
        return rates[0], rates[1]


def agrees(p: Tensor, q: Tensor) -> Tensor:
    """Return the agreement loss from probabilities."""
    return -((p * q).sum(1) + 1e-8).log().mean()


def disagrees(p: Tensor, q: Tensor) -> Tensor:
    """Return the disagreement loss from probabilities."""
    return -(1 - (p * q).sum(1) + 1e-8).log().mean()


# ---------------------------------------------------------------------------------------------------
# The floor


def floor(model: Classifier, images: Images, cfg: IMSConfig, run: Run) -> None:
    """Run the bare passes of the lean order: no gate, no loss, no optimiser, no check."""
    x = to_float(images.pixels[: cfg.batch_size], run.device)  # (B, C, H, W)
    both = torch.cat([x, x])  # (2 B, C, H, W)

    def there_and_back(pixels: Tensor) -> None:
        leaf = pixels.detach().requires_grad_()
        torch.autograd.grad(logits_of(model, leaf, run).sum(), [leaf])

    with frozen(model):
        for _ in range(cfg.start_rounds * 2):
            there_and_back(x)
        for _ in range(cfg.free_rounds + cfg.sparse_rounds):
            for _ in range(2 * cfg.steps):
                there_and_back(x)
            with torch.no_grad():
                logits_of(model, x, run)
            for _ in range(2):
                there_and_back(both)


# ---------------------------------------------------------------------------------------------------
# The comparison


class Comparison:
    """The contestants, with the clocks on their parts.

    Attributes:
        seconds: Seconds of the parts by name, one for each run.
        images: Images that went forward through the network, by contestant.
        outcome: What both sides arrived at; a check that both did the work, not a comparison of methods.
    """

    def __init__(self, setting: Setting, arguments: argparse.Namespace) -> None:
        self.model, self.truth, self.test = setting.model, setting.truth, setting.test
        self.clean, self.run, self.seed = setting.clean, setting.run, arguments.seed
        schedule = {
            "start_rounds": max(1, arguments.rounds // 2),
            "free_rounds": arguments.rounds,
            "sparse_rounds": arguments.rounds,
            "steps": arguments.steps,
            "budget": 0.001 * arguments.steps,
            "patience": 0,
        }
        config = DEFENSES["ims"].configure(schedule, preset="reference")
        assert isinstance(config, IMSConfig)
        self.cfg = config
        self.seconds: Seconds = {
            name: [] for name in ("ours, algorithm", "plain, algorithm", "plain, evaluation")
        }
        self.images: dict[str, int] = {}
        self.outcome: dict[str, Any] = {}
        mean, std = self.model.mean.flatten().tolist(), self.model.std.flatten().tolist()
        self.pictures = Pictures(self.clean.all, mean, std, augmented=False)
        self.tests = test_loaders(setting, mean, std, arguments.num_workers)

    def ours(self) -> None:
        """Repair and judge."""
        with self._clock("ours, algorithm"):
            repaired = call("ims", self.model, self.clean, options=self.cfg, seed=self.seed)
        self.outcome["ours"] = judge(repaired.model, self.truth, self.test, self.run).rates()

    def plain(self) -> None:
        """Do the same the plain way."""
        plain = Plain(self.model.network, self.cfg, self.pictures, self.model.std, self.tests)
        start = time.perf_counter()
        rates = plain.run()
        total = time.perf_counter() - start
        self.seconds["plain, algorithm"].append(total - plain.evaluating)
        self.seconds["plain, evaluation"].append(plain.evaluating)
        self.images["plain"] = plain.images
        self.outcome["plain"] = {"acc": rates[-1][0], "asr": rates[-1][1]}

    def lean(self) -> None:
        """Repair in fp32, without the judge."""
        call("ims", self.model, self.clean, options=self.cfg, seed=self.seed, precision="fp32")

    def bare(self) -> None:
        """Run the floor."""
        floor(self.model, self.clean.all, self.cfg, self.run)

    def count(self) -> None:
        """Count the images of one repair of ours, its probes and its evidence included."""
        counter = _Counter(self.model.copy().network)
        twin = Classifier(
            counter,
            input_shape=self.model.input_shape,
            class_names=self.model.class_names,
            mean=self.model.mean.flatten().tolist(),
            std=self.model.std.flatten().tolist(),
        )
        DEFENSES["ims"].function(twin.eval(), self.clean, self.cfg, run=self.run)
        self.images["ours"] = counter.images

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)


class _Counter(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        """Count and pass on (B, C, H, W)."""
        self.images += len(x)
        out: Tensor = self.network(x)
        return out


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", pairs=2)
    options.add_argument(
        "--rounds", type=int, default=4, help="of each perturbed stage; the reference has 200"
    )
    options.add_argument("--steps", type=int, default=20, help="of the perturbation, as in the reference")
    add_setting_options(options, test_images=2_000)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 3
        shrink(arguments, clean=40, victim_steps=30)
    setting = prepare(arguments, augmented=False)
    sides = Comparison(setting, arguments)
    contestants: dict[str, Callable[[], object]] = {
        "ours": sides.ours,
        "plain": sides.plain,
        "lean": sides.lean,
        "floor": sides.bare,
    }
    settings = setting.facts(arguments) | {
        "rounds": [sides.cfg.start_rounds, sides.cfg.free_rounds, sides.cfg.sparse_rounds],
        "steps": sides.cfg.steps,
    }
    result = Result("ims", setting.subject, settings)
    totals = interleave(arguments.pairs, contestants, warmup=False)
    sides.count()
    parts = sides.seconds
    algorithm = parts["ours, algorithm"]
    result.add("ours : plain version, end to end", Ratio.of(totals["plain"], totals["ours"]))
    result.add("  algorithm alone", Ratio.of(parts["plain, algorithm"], algorithm))
    result.add("  algorithm alone, both in fp32", Ratio.of(parts["plain, algorithm"], totals["lean"]))
    result.add("floor : ours, algorithm (1 is the floor)", Ratio.of(algorithm, totals["floor"]))
    result.facts["images_forward"] = sides.images
    result.facts["outcome"] = sides.outcome
    result.notes.append(
        f"images that went forward: plain {sides.images['plain']}, ours {sides.images['ours']}, "
        f"{sides.images['plain'] / sides.images['ours']:.2f} times as many"
    )
    result.show({**totals, **parts}, arguments.json)


if __name__ == "__main__":
    main()

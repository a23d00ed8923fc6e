"""The released code of RNP and AWM beside ours: the same victim, the same images, one thread each.

    PYTHONPATH=tests python benchmarks/authors.py --victim FILE [--rnp CHECKOUT] [--awm CHECKOUT]

Of the checkouts (bboylyg/RNP at commit eeae192, jinghuichen/AWM at a4a5f16) only the named functions and
layers are read, as ``tests/reference/`` does, and called in the order of their ``main``, with its defaults,
batch sizes, augmentation and loaders; their networks are fixed architectures, so their masked layers are put
into ours. Every epoch or round ends with their evaluation on both test sets, as released.

Each contestant runs in a process of its own, whose largest resident memory is reported; the clock starts
after the images and the model are read. Ours is ``unbackdoor.run`` and one judgement.

What the sides arrive at: the released RNP prints a table of thresholds and chooses none. The paper chooses
with the test sets open, so the row taken here is the one of smallest ASR among those that lose at most two
points of test accuracy, or its mildest where none does: an oracle, which no defender has. AWM, released or
as preset ``reference``, stops after its last round. The others choose on held-out clean images.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init
from torch.nn.parameter import Parameter
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from _data import Pictures
from _harness import Ratio, Result, parser
from _setting import Setting, add_setting_options, prepare, test_loaders, triggered
from reference.authors import FormerConv2d, definitions
from unbackdoor import run as call
from unbackdoor.bench.judge import judge
from unbackdoor.data.batches import to_float
from unbackdoor.types import Classifier

RNP = SimpleNamespace(alpha=0.2, clean_threshold=0.20, unlearning_epochs=20, recovering_epochs=20)
AWM = SimpleNamespace(alpha=0.9, gamma=1e-8, trigger_norm=1000, outer=20, inner=5, lr2=1e-2)
BATCH = 128
OURS = {"rnp": ("rnp:robust", "rnp:reference"), "awm": ("awm", "awm:reference")}
TOLERATED = 0.02  # points of test accuracy for the oracle's row
NAMESPACE = {"torch": torch, "nn": nn, "init": init, "F": F, "Tensor": Tensor, "Parameter": Parameter}
Outcome = dict[str, Any]


class Scene:
    """The setting of one contestant, with a clock on its evaluations."""

    def __init__(self, setting: Setting, workers: int) -> None:
        self.setting, self.workers = setting, workers
        self.model, self.clean_images = setting.model, setting.clean_images
        self.evaluating = 0.0

    def network(self) -> nn.Module:
        """Return a copy of the victim's network that takes normalised images, ready to learn."""
        return copy.deepcopy(self.model.network).float().requires_grad_(True)

    def timed(self, test: Callable[..., Any]) -> Callable[..., Any]:
        """Return their evaluation with a clock on it."""

        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return test(*args, **kwargs)
            finally:
                self.evaluating += time.perf_counter() - start

        return clocked


def released_rnp(scene: Scene, folder: Path) -> Outcome:
    """Play ``main`` of bboylyg/RNP: unlearn, recover, prune by threshold, evaluate after each epoch."""
    layers = definitions(folder / "models" / "mask_batchnorm.py", {"MaskBatchNorm2d"}, NAMESPACE)
    names = {"train_step_unlearning", "train_step_recovering", "clip_mask"}
    names |= {"pruning", "evaluate_by_threshold", "test"}
    code = definitions(folder / "main.py", names, {**NAMESPACE, "device": "cpu", "np": np})
    code["test"] = scene.timed(code["test"])
    mean, std = scene.model.mean.flatten().tolist(), scene.model.std.flatten().tolist()
    fit: Any = DataLoader(Pictures(scene.clean_images, mean, std, augmented=True), BATCH, shuffle=True)
    tests = test_loaders(scene.setting, mean, std, scene.workers)
    criterion = nn.CrossEntropyLoss()

    net = scene.network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    falling = torch.optim.lr_scheduler.MultiStepLR(sgd, milestones=[10, 20], gamma=0.1)
    for _ in range(RNP.unlearning_epochs + 1):
        _, reached = code["train_step_unlearning"](RNP, net, criterion, sgd, fit)
        for loader in tests:
            code["test"](net, criterion, loader)
        falling.step()
        if reached <= RNP.clean_threshold:
            break

    swap(net, nn.BatchNorm2d, lambda norm: layers["MaskBatchNorm2d"](norm.num_features, eps=norm.eps))
    masks = {name: p for name, p in net.named_parameters() if "neuron_mask" in name}
    sgd = torch.optim.SGD(list(masks.values()), lr=0.2, momentum=0.9)
    for _ in range(RNP.recovering_epochs):
        code["train_step_recovering"](RNP, net, criterion, sgd, fit)
        for loader in tests:
            code["test"](net, criterion, loader)

    values = [
        (name.removesuffix(".neuron_mask"), row, f"{value:.4f}")
        for name, mask in masks.items()
        for row, value in enumerate(mask.tolist())
    ]
    values.sort(key=lambda entry: float(entry[2]))
    original = scene.network()
    acc = code["test"](original, criterion, tests[0])[1]
    code["test"](original, criterion, tests[1])
    lines = code["evaluate_by_threshold"](
        original, logging.getLogger("rnp"), values, pruning_max=0.9, pruning_step=0.05,
        criterion=criterion, clean_loader=tests[0], poison_loader=tests[1],
    )  # fmt: skip
    rows = [[float(cell) for cell in (c[3], c[5], c[7])] for c in (line.split(" \t ") for line in lines)]
    table = [{"threshold": t, "acc": a, "asr": s} for t, s, a in rows]
    allowed = [row for row in table if row["acc"] >= acc - TOLERATED] or table[:1]
    chosen = min(allowed, key=lambda row: row["asr"])
    return {"acc": chosen["acc"], "asr": chosen["asr"], "table": table}


def released_awm(scene: Scene, folder: Path) -> Outcome:
    """Play ``main`` of jinghuichen/AWM: twenty rounds of search and masking, evaluated after each."""
    former = SimpleNamespace(Conv2d=FormerConv2d)
    layers = definitions(folder / "models" / "maskedconv.py", {"MaskedConv2d"}, {**NAMESPACE, "nn": former})
    inner = len(scene.clean_images) // BATCH * AWM.inner
    code = definitions(
        folder / "main.py",
        {"mask_train", "clip_mask", "Regularization", "test"},
        {**NAMESPACE, "args": AWM, "device": "cpu", "np": np},
    )
    code["test"] = scene.timed(code["test"])
    data_set = TensorDataset(to_float(scene.clean_images.pixels), scene.clean_images.truth)
    sampler = RandomSampler(data_set, replacement=True, num_samples=inner * BATCH)
    fit: Any = DataLoader(data_set, BATCH, sampler=sampler)
    sets = (scene.setting.test, triggered(scene.setting.test, scene.setting.truth))
    tests = [DataLoader(TensorDataset(to_float(s.pixels), s.truth), BATCH) for s in sets]
    net = nn.Sequential(_Normalise(scene.model), scene.network())
    swap(net, nn.Conv2d, lambda conv: _masked(layers["MaskedConv2d"], conv))
    adam = torch.optim.Adam([p for name, p in net.named_parameters() if "mask" in name], lr=AWM.lr2)
    criterion = nn.CrossEntropyLoss()
    table = []
    for _ in range(AWM.outer):
        with contextlib.redirect_stdout(io.StringIO()):  # a line each step
            code["mask_train"](model=net, criterion=criterion, data_loader=fit, mask_opt=adam)
        acc = code["test"](net, criterion, tests[0])[1]
        table.append({"acc": acc, "asr": code["test"](net, criterion, tests[1])[1]})
    return {**table[-1], "table": table}


def ours(scene: Scene, name: str) -> Outcome:
    """Repair and judge once."""
    method, _, preset = name.partition(":")
    setting = scene.setting
    repaired = call(method, scene.model, setting.clean, preset=preset or None, seed=setting.run.seed)
    start = time.perf_counter()
    rates = judge(repaired.model, setting.truth, setting.test, setting.run).rates()
    scene.evaluating = time.perf_counter() - start
    return {"acc": rates["acc"], "asr": rates["asr"]}


class _Normalise(nn.Module):
    """The normalisation of the classifier, as the first layer of a network that takes pixels."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.mean, self.std = model.mean.view(-1, 1, 1), model.std.view(-1, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (B, C, H, W) in [0, 1] to the same shape."""
        return (pixels - self.mean) / self.std


def _masked(layer: Any, conv: nn.Conv2d) -> nn.Module:
    new: nn.Module = layer(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, conv.bias is not None,
    )  # fmt: skip
    new.include_mask()  # type: ignore[operator]
    return new


def swap(network: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    """Replace every layer of a kind by another that takes over its state."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                new = make(child)
                new.load_state_dict({**new.state_dict(), **child.state_dict()})
                setattr(parent, name, new)


# ---------------------------------------------------------------------------------------------------
# The comparison


def perform(arguments: argparse.Namespace) -> None:
    """Be one contestant and print what came out as a line of JSON."""
    scene = Scene(prepare(arguments), arguments.num_workers)
    name: str = arguments.contestant
    start = time.perf_counter()
    if name == "released rnp":
        outcome = released_rnp(scene, arguments.rnp)
    elif name == "released awm":
        outcome = released_awm(scene, arguments.awm)
    else:
        outcome = ours(scene, name)
    seconds = time.perf_counter() - start
    outcome |= {"seconds": seconds, "algorithm": seconds - scene.evaluating}
    outcome["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(outcome))


def ask(name: str) -> Outcome:
    """Run a contestant in a process of its own."""
    command = [sys.executable, *sys.argv, "--contestant", name]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed")
    outcome: Outcome = json.loads(done.stdout.splitlines()[-1])
    took = f"{outcome['seconds']:.1f} s, {outcome['algorithm']:.1f} s without evaluation"
    print(f"{name}: ACC {outcome['acc']:.4f}, ASR {outcome['asr']:.4f}, {took}", flush=True)
    return outcome


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", pairs=1)
    options.add_argument("--rnp", type=Path, metavar="FOLDER", help="checkout of bboylyg/RNP")
    options.add_argument("--awm", type=Path, metavar="FOLDER", help="checkout of jinghuichen/AWM")
    options.add_argument("--contestant", help=argparse.SUPPRESS)
    add_setting_options(options)
    arguments = options.parse_args()
    if arguments.contestant:
        perform(arguments)
        return
    if arguments.victim is None:
        options.error("name a victim with --victim")
    methods = [method for method in OURS if getattr(arguments, method) is not None]
    if not methods:
        options.error("name at least one checkout")
    setting = prepare(arguments)
    before = judge(setting.model, setting.truth, setting.test, setting.run).rates()
    result = Result("authors", setting.subject, setting.facts(arguments))
    outcome: dict[str, Outcome] = {"before": before}
    for method in methods:
        names = (f"released {method}", *OURS[method])
        rounds = [[ask(name) for name in names] for _ in range(arguments.pairs)]
        for place, name in enumerate(names):
            outcome[name] = rounds[-1][place]
            if place:
                for key, label in (("seconds", "end to end"), ("algorithm", "algorithm alone")):
                    pairs = [r[0][key] for r in rounds], [r[place][key] for r in rounds]
                    result.add(f"released {method} : {name}, {label}", Ratio.of(*pairs))
    result.facts["outcome"] = outcome
    result.show({}, arguments.json)


if __name__ == "__main__":
    main()

"""Training images per second, against the loop that public code runs.

    python benchmarks/training.py [--width 16] [--pairs 3] [--threads 2] [--json training.json]

Three contestants train the same network on the same images with the same batch size, in turn:

- ours: ``engine.training.train`` as users get it: tensors that stay in memory, augmentation of whole
  batches, channels innermost, and bf16 products where the processor has them.
- plain: a ``Dataset`` of Pillow pictures with crop, flip, ToTensor and Normalize per image, a
  ``DataLoader`` with workers, fp32, channels outermost, SGD, cross-entropy, ``loss.item()`` every step.
- arithmetic: the plain loop over batches that are ready in memory, so that the data costs nothing. It
  tells the two sources of the ratio apart: plain / arithmetic is data, arithmetic / ours is the rest.

The workers are started once and kept, because an epoch is far longer than a segment here; what they cost
at each start of an epoch is not counted against the plain loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from _data import Pictures, add_data_option, find_data
from _harness import Ratio, Result, interleave, parser
from unbackdoor.data.datasets import DataSet
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.networks import build
from unbackdoor.types import Classifier, Images

TARGET_SPEEDUP = 1.6  # times as fast, where bf16 is native
LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4


def fresh(arguments: argparse.Namespace, data: DataSet) -> Classifier:
    """Build the network; every contestant gets one with the same weights."""
    return build(
        f"preact_resnet18[width={arguments.width}]",
        input_shape=data.train.shape,
        class_names=data.train.class_names,
        mean=data.mean,
        std=data.std,
    )


def plain_epoch(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Train for one pass as public code does, and return the mean loss."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    network.train()
    total, correct, seen = 0.0, 0, 0
    for pixels, labels in batches:
        optimizer.zero_grad()
        logits = network(pixels)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
        correct += int((logits.argmax(1) == labels).sum().item())
        seen += len(labels)
    return total / seen


def loader_of(images: Images, data: DataSet, arguments: argparse.Namespace) -> DataLoader[tuple[Tensor, int]]:
    """Return the shuffling loader of the plain loop."""
    pictures = Pictures(images, data.mean, data.std, augmented=True)
    workers = arguments.num_workers
    return DataLoader(
        pictures, arguments.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", pairs=3)
    options.add_argument("--width", type=int, default=16, help="channels of the first stage")
    options.add_argument("--batch-size", type=int, default=128)
    options.add_argument("--steps", type=int, default=30, help="steps of a segment")
    options.add_argument("--num-workers", type=int, default=2, help="workers of the plain loader")
    add_data_option(options)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.width, arguments.batch_size, arguments.steps, arguments.pairs = 4, 16, 2, 1
        arguments.data, arguments.num_workers = "made-up", 1
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)  # of the plain loop's shuffling and augmentation; ours draws from its own

    count = arguments.steps * arguments.batch_size
    data = find_data(arguments.data, train=count, test=10, size=16 if arguments.quick else 32)
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:count]
    if len(rows) < count:
        options.error(f"--steps times --batch-size must be at most {len(data.train)}")
    images = data.train.subset(rows)
    run = Run.create(seed=0)
    recipe = Recipe(
        epochs=1,
        batch_size=arguments.batch_size,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        schedule="constant",
        augmentation="crop+flip",
    )
    model = fresh(arguments, data)
    plain, bare = fresh(arguments, data).network, fresh(arguments, data).network
    loader = loader_of(images, data, arguments)
    ready: list[tuple[Tensor, Tensor]] = [(pixels, labels) for pixels, labels in loader]

    settings = {
        "architecture": model.architecture,
        "data": data.name,
        "batch_size": arguments.batch_size,
        "images": count,
        "num_workers": arguments.num_workers,
        "precision": run.precision.name,
        "quick": arguments.quick,
    }
    subject = f"{model.architecture}, {data.name}, {arguments.steps} steps of {arguments.batch_size} images"
    result = Result("training", f"{subject}, ours in {run.precision.name}", settings)
    seconds = interleave(
        arguments.pairs,
        {
            "ours": lambda: train(model, images, recipe, run),
            "plain": lambda: plain_epoch(plain, loader),
            "arithmetic": lambda: plain_epoch(bare, ready),
        },
    )
    result.add("ours : plain loop", Ratio.of(seconds["plain"], seconds["ours"]))
    result.add("  of it: data in tensors", Ratio.of(seconds["plain"], seconds["arithmetic"]))
    result.add("  of it: number format and layout", Ratio.of(seconds["arithmetic"], seconds["ours"]))
    result.facts["wanted"] = TARGET_SPEEDUP if result.machine["native_bf16"] else None
    if result.machine["native_bf16"] and not arguments.quick:
        met = result.ratios["ours : plain loop"].median >= TARGET_SPEEDUP
        result.notes.append(
            f"wanted where bf16 is native: at least {TARGET_SPEEDUP}; {'met' if met else 'missed'}"
        )
    result.show(seconds, arguments.json)


if __name__ == "__main__":
    main()

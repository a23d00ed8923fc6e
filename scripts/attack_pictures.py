"""Draw what every attack does to an image, and measure how visible it is.

    python scripts/attack_pictures.py [--images 500]

It puts every trigger on CIFAR-10 test images. Triggers that are learned are learned here on --images-to-learn
training images; those that learn with a victim get a small one, trained for a few epochs. The pictures go to
docs/images/attacks.png: clean, triggered, and the difference ten times as strong on grey. The rows go to
results/attacks/visibility.jsonl, and docs/attacks.md quotes them between two marks; --table makes only that.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unbackdoor.attacks import AttackTruth, prepare, stamped
from unbackdoor.attacks.visibility import visibility
from unbackdoor.data.datasets import load_dataset
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.engine import rng
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.files import atomic_write
from unbackdoor.networks import build
from unbackdoor.registry import ATTACKS
from unbackdoor.types import Images

ROOT = Path(__file__).parents[1]
PICTURE, PAGE = ROOT / "docs" / "images" / "attacks.png", ROOT / "docs" / "attacks.md"
ROWS = ROOT / "results" / "attacks" / "visibility.jsonl"
BEGIN, END = "<!-- visibility: made by scripts/attack_pictures.py -->", "<!-- end of visibility -->"
LEFT_OUT = ("none", "picture", "badnets_all_to_all")  # no trigger, the user's own, and that of badnets
# Shorter learning than the defaults': pictures and visibility come out alike.
SHORTER: dict[str, dict[str, Any]] = {
    "input_aware": {"mask_epochs": 5, "mask_images": 500},
    "ssba": {"steps": 150},
    "narcissus": {"steps": 100, "batch": 32},
    "lf": {"batch": 32},
}
NETWORK, RECIPE = "small_cnn[width=16]", Recipe(epochs=3)  # of victims that triggers learn with
SHOWN, SIDE, LABEL, GAP = 3, 64, 190, 2  # images of a row; pixels of a tile, of the names, between tiles
STRONGER = 10


@dataclass(frozen=True)
class Shown:
    """A row of the picture: the images before and after."""

    name: str
    clean: Tensor
    changed: Tensor


def names() -> list[str]:
    """Return the attacks that are shown."""
    return [name for name in ATTACKS if name not in LEFT_OUT]


def learned(name: str, training: Images) -> AttackTruth:
    """Return an attack whose trigger, if it learns, has learned."""
    truth, run = prepare(training, name, SHORTER.get(name), seed=0), Run.create(seed=0, policy="fp32")
    learning = truth.trigger.learning
    if learning is None:
        return truth
    tensors = learning.fit(training, run)
    if learning.train is not None:
        model = build(NETWORK, input_shape=training.shape, class_names=training.class_names, seed=0)
        tensors = learning.train(
            model, training, tensors, RECIPE, run, augmentation="none", checkpoint=None, label=name
        )
    return truth.learned(tensors)


def rows_of(truth: AttackTruth, images: Images) -> list[Shown]:
    """Return the trigger on some images, and what poisoned training images carry where that differs."""
    name, trigger = truth.attack, truth.trigger
    rows = [Shown(name, images.pixels, stamped(images.pixels, truth))]
    if trigger.in_training is not None:
        inside = trigger.in_training(images.pixels, rng.generator(0, "pictures"))
        rows.append(Shown(f"{name}, training", images.pixels, inside))
    return rows


def drawn(rows: list[Shown]) -> Image.Image:
    """Return one picture: a line a row, and for each image the clean, the triggered and the difference."""
    step, top = SIDE + GAP, 22
    width = LABEL + SHOWN * (3 * step + 4 * GAP)
    out = Image.new("RGB", (width, top + len(rows) * step), "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(size=14)
    for image in range(SHOWN):
        for part, title in enumerate(("clean", "triggered", f"x {STRONGER}")):
            pen.text((LABEL + image * (3 * step + 4 * GAP) + part * step, 3), title, "black", font)
    for line, row in enumerate(rows):
        pen.text((4, top + line * step + SIDE // 2 - 9), row.name, "black", font)
        for image in range(SHOWN):
            clean, changed = row.clean[image], row.changed[image]
            change = 128 + STRONGER * (changed.float() - clean.float())
            for part, tile in enumerate((clean, changed, change.clamp(0, 255).to(torch.uint8))):
                values = Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy())
                left = LABEL + image * (3 * step + 4 * GAP) + part * step
                out.paste(values.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top + line * step))
    return out


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| attack | PSNR, dB | SSIM | largest change | pixels that change |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| `{row['attack']}` | {row['psnr']:.1f} | {row['ssim']:.3f} | {row['largest']} | "
        f"{row['pixels']:.0%} |"
        for row in rows
    ]
    return "\n".join(["", *lines, ""])


def quoting(page: str, rows: list[dict[str, Any]]) -> str:
    """Return the page with the table between its marks made anew."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{table(rows)}\n{END}", page)


def read_rows() -> list[dict[str, Any]]:
    """Return the committed rows."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def make(images: int, to_learn: int) -> None:
    """Measure and draw every attack."""
    data = load_dataset("cifar10")
    training = draw_clean(reserve(data.train)[0], count=to_learn, seed=0)
    test = draw_clean(data.test, count=images, seed=0)
    firsts = [int((test.truth == k).nonzero()[0]) for k in (1, 7, 8)][:SHOWN]  # of three classes
    rows: list[dict[str, Any]] = []
    pictures: list[Shown] = []
    for name in names():
        truth = learned(name, training)
        found = asdict(visibility(test.pixels, truth))
        rows.append({"attack": name, "images": images, **found})
        pictures += rows_of(truth, test.subset(firsts))
        print(rows[-1], flush=True)
    ROWS.parent.mkdir(exist_ok=True)
    with atomic_write(ROWS) as draft:
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    drawn(pictures).save(PICTURE, optimize=True)


def main() -> None:
    """Parse and run."""
    work = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    work.add_argument("--images", type=int, default=500)
    work.add_argument("--images-to-learn", type=int, default=1000)
    work.add_argument("--table", action="store_true", help="only write the rows into the page")
    arguments = work.parse_args()
    if not arguments.table:
        make(arguments.images, arguments.images_to_learn)
    PAGE.write_text(quoting(PAGE.read_text(encoding="utf-8"), read_rows()), encoding="utf-8")


if __name__ == "__main__":
    main()

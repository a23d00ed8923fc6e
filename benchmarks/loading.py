"""Decoding once, against decoding every image whenever it is needed.

    python benchmarks/loading.py [--pairs 3] [--threads 2] [--json loading.json]

Public code that reads an image set from a Parquet file decodes each picture with Pillow, in every run and
often in every epoch. Here a set is decoded at its first use, by all cores, and read back from one file
afterwards. Four things are measured on the same files:

- start-up: the images in memory by ``load_dataset`` with a filled cache, hash of the source files and hash
  of the pixels included, against Pillow decoding image by image. This is the headline.
- epoch: one pass in batches over the images in memory, against a ``Dataset`` that decodes in
  ``__getitem__``, behind a ``DataLoader`` with workers that are already running.
- first start: the same as start-up with an empty cache, which is filled.
- cold decode: all cores against one.

Every file has been read before, so both sides find it in the memory of the operating system.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from _data import add_data_option, made_up, to_tensor
from _harness import Ratio, Result, interleave, parser
from unbackdoor.data.batches import batches
from unbackdoor.data.datasets import load_dataset
from unbackdoor.data.decode import decode
from unbackdoor.data.loaders import load_images
from unbackdoor.types import Images

BATCH = 128


@dataclass(frozen=True)
class Source:
    """Parquet files and how this project loads them.

    Attributes:
        name: In words.
        files: All of them.
        load: From a cache folder, which is filled where it is empty; the first part is for the epoch.
    """

    name: str
    files: tuple[Path, ...]
    load: Callable[[Path], list[Images]]


def cifar10(root: Path) -> Source:
    """Return the real set, both parts of it."""

    def load(cache: Path) -> list[Images]:
        data = load_dataset("cifar10", root=root, cache=cache, download=False)
        return [data.train, data.test]

    return Source("CIFAR-10", tuple(root / "cifar10" / f"{part}.parquet" for part in ("train", "test")), load)


def written(folder: Path, count: int) -> Source:
    """Return made-up images, written as PNG into a Parquet file."""
    images = made_up(count, "train")
    encoded = []
    for pixels in images.pixels.permute(0, 2, 3, 1).numpy():  # (H, W, C)
        stream = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
        encoded.append({"bytes": stream.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    file = folder / "made-up.parquet"
    pq.write_table(pa.table({"image": pa.array(encoded, kind), "label": images.truth.numpy()}), file)
    return Source("made-up images", (file,), lambda cache: [load_images(file, cache=cache)])


def encoded_images(file: Path) -> Iterator[bytes]:
    """Yield the encoded images of a Parquet file, in order."""
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(columns=["image.bytes"]):
            yield from batch.column(0).flatten()[0].to_pylist()


def per_image(files: tuple[Path, ...]) -> list[Tensor]:
    """Decode every image of the files by itself, as a data set class does that keeps arrays."""
    parts = []
    for file in files:
        arrays = [np.asarray(picture(data)) for data in encoded_images(file)]
        parts.append(torch.from_numpy(np.stack(arrays)))  # (N, H, W, C)
    return parts


def picture(data: bytes) -> Image.Image:
    """Decode one image."""
    return Image.open(io.BytesIO(data)).convert("RGB")


class Encoded(Dataset[Tensor]):
    """Encoded images that are decoded whenever one is asked for."""

    def __init__(self, images: list[bytes]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        return to_tensor(picture(self.images[row]))


def cold(items: list[bytes], workers: int) -> None:
    """Decode with this project's decoder; 0 workers decode in this process."""
    decode((("", data) for data in items), len(items), name="images", workers=workers)


def consume(stream: Iterable[object]) -> None:
    """Take everything, keep nothing."""
    for _ in stream:
        pass


def find_source(arguments: argparse.Namespace, folder: Path) -> Source:
    """Return CIFAR-10 where it is, else made-up images."""
    root = os.environ.get("UNBACKDOOR_DATA", "")
    if arguments.data != "made-up":
        if root and (Path(root) / "cifar10" / "train.parquet").is_file():
            return cifar10(Path(root))
        if arguments.data == "cifar10":
            raise SystemExit("there is no cifar10/train.parquet in the data root; set UNBACKDOOR_DATA")
        print("CIFAR-10 is not at hand as Parquet files, so the images are made up\n")
    return written(folder, arguments.images)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__ or "", pairs=3)
    options.add_argument("--images", type=int, default=10_000, help="images of an epoch and of a cold decode")
    options.add_argument("--num-workers", type=int, default=2, help="workers of the plain loader")
    add_data_option(options)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.images, arguments.pairs, arguments.num_workers = 300, 1, 1
        arguments.data = "made-up"
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="unbackdoor-benchmark-") as name:
        measure(arguments, Path(name))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Do the work in a folder that is thrown away."""
    source = find_source(arguments, folder)
    cache, empty = folder / "filled", folder / "empty"
    parts = source.load(cache)
    # Every so-many-th, because the files may be sorted by class, and classes compress differently.
    stride = max(1, len(parts[0]) // arguments.images)
    rows = list(range(0, len(parts[0]), stride))[: arguments.images]
    images = parts[0].subset(rows)
    encoded = list(encoded_images(source.files[0]))
    epoch_images = [encoded[row] for row in rows]
    del encoded
    loader = DataLoader(
        Encoded(epoch_images),
        BATCH,
        shuffle=True,
        num_workers=arguments.num_workers,
        persistent_workers=arguments.num_workers > 0,
    )

    def first_start() -> None:
        shutil.rmtree(empty, ignore_errors=True)
        source.load(empty)

    total = sum(len(part) for part in parts)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = {
        "data": source.name,
        "images": total,
        "epoch_images": len(epoch_images),
        "num_workers": arguments.num_workers,
        "decode_workers": cores,
        "quick": arguments.quick,
    }
    subject = f"{source.name}, {total} images at the start, {len(epoch_images)} in an epoch"
    result = Result("loading", subject, settings)
    del parts
    consume(loader)  # starts the workers; everything else has run once already or needs no warming
    seconds = interleave(
        arguments.pairs,
        {
            "start-up": lambda: source.load(cache),
            "start-up, per image": lambda: per_image(source.files),
            "first start": first_start,
            "epoch": lambda: consume(batches(images, BATCH, generator=torch.Generator().manual_seed(0))),
            "epoch, per image": lambda: consume(loader),
            "cold decode": lambda: cold(epoch_images, cores),
            "cold decode, one core": lambda: cold(epoch_images, 0),
        },
        warmup=False,
    )
    result.add("start-up : per-image decoding", Ratio.of(seconds["start-up, per image"], seconds["start-up"]))
    result.add("epoch : per-image decoding", Ratio.of(seconds["epoch, per image"], seconds["epoch"]))
    result.add(
        "first start : per-image decoding", Ratio.of(seconds["start-up, per image"], seconds["first start"])
    )
    result.add("cold decode : one core", Ratio.of(seconds["cold decode, one core"], seconds["cold decode"]))
    result.show(seconds, arguments.json)


if __name__ == "__main__":
    main()

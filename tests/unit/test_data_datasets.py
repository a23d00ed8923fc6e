"""Named sets: digits, Parquet under a data root, the owners' archives by hand and by download."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import io
import json
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unbackdoor.data import datasets
from unbackdoor.data.datasets import dataset_names, load_dataset
from unbackdoor.data.named_sets.catalogue import CIFAR10, GTSRB32, SETS, TINYIMAGENET20, Archive, Facts
from unbackdoor.data.named_sets.downloads import fetch_archive
from unbackdoor.errors import InputError, IntegrityError, MissingExtra

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNBACKDOOR_DATA", raising=False)


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def no_network(url: str) -> Any:
    raise OSError("Network is unreachable")


def image_bytes(pixels: np.ndarray, form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


# digits --------------------------------------------------------------------------------------------


def test_digits() -> None:
    digits = load_dataset("digits")
    assert (len(digits.train), len(digits.test), digits.train.shape) == (1200, 597, (1, 8, 8))
    assert digits.train.class_names == tuple("0123456789") and digits.augmentation == "crop"
    assert int(digits.train.pixels.min()) == 0 and int(digits.train.pixels.max()) == 255
    # 16 grey levels above black: round(v * 255 / 16), of which 8 gives 127.5 and rounds to even.
    assert digits.train.pixels.unique().tolist() == [round(v * 255 / 16) for v in range(17)]
    for part, share in ((digits.train, 1200 / 1797), (digits.test, 597 / 1797)):
        for k, number in enumerate(part.truth.bincount().tolist()):
            total = int((torch.cat([digits.train.truth, digits.test.truth]) == k).sum())
            assert abs(number - share * total) < 1
    pixels = digits.train.pixels.double() / 255
    assert digits.mean == (round(float(pixels.mean()), 4),)
    assert digits.std == (round(float(pixels.std()), 4),)


def test_the_split_of_digits_is_fixed_and_disjoint() -> None:
    a, b = load_dataset("digits"), load_dataset("digits")
    assert a.train.fingerprint() == b.train.fingerprint()
    # The split is part of every published number; it may change with a new name only.
    assert a.train.fingerprint()[:16] == "c07130283d34095f"
    rows = torch.arange(1797)
    train, test = datasets._stratified((rows % 10).numpy(), 1200)
    assert sorted(train + test) == rows.tolist()


@pytest.mark.leaves_traces
def test_digits_where_scikit_learn_has_moved_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    read = load_dataset("digits")
    monkeypatch.setattr(datasets, "digits_file", lambda: None)
    asked = load_dataset("digits")
    assert read.train.fingerprint() == asked.train.fingerprint()
    assert read.test.fingerprint() == asked.test.fingerprint()


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"'digits' needs the package scikit-learn.*unbackdoor\[digits\]"):
        load_dataset("digits")


def test_an_unknown_name() -> None:
    assert dataset_names() == ["digits", "cifar10", "gtsrb32", "tinyimagenet20"]
    with pytest.raises(InputError, match=r"'cifar' \(did you mean 'cifar10'\?\): expected one of digits"):
        load_dataset("cifar")


# A small CIFAR-10 ----------------------------------------------------------------------------------

RECORDS = RNG.integers(0, 256, (30, 3073), dtype=np.uint8)
RECORDS[:, 0] = np.arange(30)[::-1] % 10


def cifar_archive(**changes: Any) -> bytes:
    members = {f"data_batch_{k + 1}.bin": RECORDS[4 * k : 4 * k + 4].tobytes() for k in range(5)}
    members |= {"test_batch.bin": RECORDS[20:].tobytes(), "batches.meta.txt": b"airplane\n"}
    members |= {"../../outside.bin": b"evil"}
    members |= changes
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in members.items():
            if data is not None:
                info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def small(
    monkeypatch: pytest.MonkeyPatch, facts: Facts, contents: dict[str, bytes], base: str, **changes: Any
) -> Facts:
    """Put a small set in the place of a named one; its archives lie under ``base``."""
    archives = tuple(
        Archive(f"{base}/{name}", "md5", hashlib.md5(data).hexdigest(), len(data) + 100)
        for name, data in contents.items()
    )
    facts = replace(facts, archives=archives, **changes)
    monkeypatch.setitem(SETS, facts.name, facts)
    return facts


class Server:
    """A loopback web server whose answers a test sets."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut = False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.strip("/")
                outer.requests.append(name)
                data = outer.contents.get(name)
                if data is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if outer.cut else data)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.base = f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch, server: Server) -> Server:
    server.contents = {"cifar-10-binary.tar.gz": cifar_archive()}
    small(monkeypatch, CIFAR10, server.contents, server.base, train=20, test=10)
    return server


def test_a_set_is_downloaded_once(tmp_path: Path, cifar: Server) -> None:
    loaded = load_dataset("cifar10", cache=tmp_path)
    order = np.argsort(RECORDS[:20, 0], kind="stable")
    np.testing.assert_array_equal(
        loaded.train.pixels.numpy(), RECORDS[:20][order][:, 1:].reshape(-1, 3, 32, 32)
    )
    assert loaded.train.truth.tolist() == sorted(RECORDS[:20, 0].tolist())
    assert loaded.test.truth.tolist() == list(range(10)) and loaded.mean == CIFAR10.mean
    assert not (tmp_path.parent / "outside.bin").exists()
    assert load_dataset("cifar10", cache=tmp_path).train.fingerprint() == loaded.train.fingerprint()
    assert cifar.requests == ["cifar-10-binary.tar.gz"]


def test_with_the_decoded_set_in_the_cache_the_archive_may_go(tmp_path: Path, cifar: Server) -> None:
    load_dataset("cifar10", cache=tmp_path)
    (tmp_path / "downloads" / "cifar10" / "cifar-10-binary.tar.gz").unlink()
    assert len(load_dataset("cifar10", cache=tmp_path, opener=no_network).train) == 20


def test_an_archive_put_there_by_hand(tmp_path: Path, cifar: Server) -> None:
    root = tmp_path / "root"
    (root / "cifar10").mkdir(parents=True)
    (root / "cifar10" / "cifar-10-binary.tar.gz").write_bytes(cifar.contents["cifar-10-binary.tar.gz"])
    assert len(load_dataset("cifar10", root=root, cache=tmp_path / "cache", download=False).train) == 20
    assert cifar.requests == []
    (root / "cifar10" / "cifar-10-binary.tar.gz").write_bytes(b"another")
    with pytest.raises(IntegrityError, match=r"md5 checksum of cifar-10-binary.*\(.*root.*\).*Delete .*root"):
        load_dataset("cifar10", root=root, cache=tmp_path / "fresh")


def test_a_wrong_checksum_leaves_nothing(tmp_path: Path, cifar: Server) -> None:
    data = bytearray(cifar.contents["cifar-10-binary.tar.gz"])
    data[50] ^= 1
    cifar.contents["cifar-10-binary.tar.gz"] = bytes(data)
    with pytest.raises(IntegrityError, match=r"checksum of cifar-10-binary\.tar\.gz is wrong \(http://"):
        load_dataset("cifar10", cache=tmp_path)
    assert tree(tmp_path) == []


def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path, cifar: Server) -> None:
    cifar.cut = True
    with pytest.raises(InputError, match=r"not found .*broke off .*UNBACKDOOR_DATA"):
        load_dataset("cifar10", cache=tmp_path)
    assert tree(tmp_path) == []


def test_a_download_that_never_ends_is_cut(tmp_path: Path, cifar: Server) -> None:
    cifar.contents["cifar-10-binary.tar.gz"] += b"x" * 5000
    with pytest.raises(InputError, match=r"longer than the file can be"):
        load_dataset("cifar10", cache=tmp_path)
    assert tree(tmp_path) == []


def test_a_download_that_is_interrupted_leaves_nothing(tmp_path: Path, cifar: Server) -> None:
    def interrupted(items: Any, label: str, total: int | None = None) -> Any:
        for item in items:
            yield item
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_dataset("cifar10", cache=tmp_path, progress=interrupted)
    assert tree(tmp_path) == []


def test_offline_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_dataset("cifar10", cache=tmp_path, opener=no_network)
    message = str(caught.value)
    for fact in (
        "'cifar10' was not found",
        "no data root is set",
        "Network is unreachable",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "DATA_ROOT/cifar10",
        "--data-root",
        "UNBACKDOOR_DATA",
    ):
        assert fact in message
    with pytest.raises(InputError, match=rf"data root {tmp_path}.*downloading is switched off"):
        load_dataset("gtsrb32", root=tmp_path, cache=tmp_path / "cache", download=False)
    assert tree(tmp_path) == []


def test_a_page_that_is_gone(tmp_path: Path, cifar: Server) -> None:
    cifar.contents = {}
    with pytest.raises(InputError, match=r"the download failed .*404"):
        load_dataset("cifar10", cache=tmp_path)


def test_a_file_address_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"abc")
    archive = Archive((tmp_path / "a.zip").as_uri(), "sha256", hashlib.sha256(b"abc").hexdigest(), 3)
    assert fetch_archive(archive, tmp_path / "to").read_bytes() == b"abc"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_batch_3.bin": None}, r"the archive lacks data_batch_3\.bin .*Delete"),
        ({"data_batch_3.bin": b"short"}, r"wrong size .*data_batch_3\.bin\): expected 12292 bytes, got 5"),
        ({"data_batch_3.bin": b"\x0a" * 12292}, r"a label is out of range .*expected 0\.\.9, got 10"),
    ],
)
def test_an_archive_with_other_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, changes: Any, message: str
) -> None:
    server.contents = {"cifar-10-binary.tar.gz": cifar_archive(**changes)}
    small(monkeypatch, CIFAR10, server.contents, server.base, train=20, test=10)
    with pytest.raises(InputError, match=message):
        load_dataset("cifar10", cache=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_damaged_archive_with_the_right_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    server.contents = {"cifar-10-binary.tar.gz": cifar_archive()[:5000]}
    small(monkeypatch, CIFAR10, server.contents, server.base, train=20, test=10)
    with pytest.raises(InputError, match=r"the archive is damaged .*let it be downloaded again"):
        load_dataset("cifar10", cache=tmp_path)


# GTSRB and Tiny ImageNet ---------------------------------------------------------------------------


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def test_gtsrb_takes_every_second_frame_and_resizes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    frames = {
        f"GTSRB/Final_Training/Images/{k:05d}/00000_{frame:05d}.ppm": RNG.integers(
            0, 256, (40 + k, 36 + frame, 3), dtype=np.uint8
        )
        for k in (1, 0)
        for frame in (2, 1, 0)
    }
    notes = {"GTSRB/Final_Training/Images/00000/GT-00000.csv": b"Filename\n", "GTSRB/Readme.txt": b""}
    tests = {f"{k:05d}.ppm": RNG.integers(0, 256, (33, 31, 3), dtype=np.uint8) for k in range(3)}
    truth = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\r\n" + "".join(
        f"{name};31;33;5;5;20;20;{label}\r\n" for name, label in zip(sorted(tests), (1, 0, 1), strict=True)
    )
    server.contents = {
        "GTSRB_Final_Training_Images.zip": zipped(
            {name: image_bytes(p, "PPM") for name, p in frames.items()} | notes
        ),
        "GTSRB_Final_Test_Images.zip": zipped(
            {f"GTSRB/Final_Test/Images/{name}": image_bytes(p, "PPM") for name, p in tests.items()}
        ),
        "GTSRB_Final_Test_GT.zip": zipped({"GT-final_test.csv": truth.encode()}),
    }
    names = ("00000", "00001")
    small(monkeypatch, GTSRB32, server.contents, server.base, train=4, test=3, class_names=names)
    loaded = load_dataset("gtsrb32", cache=tmp_path)
    assert loaded.train.truth.tolist() == [0, 0, 1, 1] and loaded.test.truth.tolist() == [1, 0, 1]
    kept = sorted(name for name in frames if not name.endswith("1.ppm"))
    expected = [
        np.asarray(Image.fromarray(frames[name]).resize((32, 32), Image.Resampling.BILINEAR)) for name in kept
    ]
    np.testing.assert_array_equal(loaded.train.pixels.numpy(), np.stack(expected).transpose(0, 3, 1, 2))


def test_tiny_imagenet_takes_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    def picture() -> bytes:
        return image_bytes(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")

    base = "tiny-imagenet-200"
    members = {
        f"{base}/train/{wnid}/images/{wnid}_{k}.JPEG": picture()
        for wnid in ("n02", "n01", "n99")
        for k in range(2)
    }
    members |= {f"{base}/train/n01/n01_boxes.txt": b"", f"{base}/train/n01/images/": b""}
    members |= {f"{base}/val/images/val_{k}.JPEG": picture() for k in range(3)}
    members[f"{base}/val/val_annotations.txt"] = (
        b"val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn99\t0\t0\t1\t1\nval_2.JPEG\tn01\t0\t0\t1\t1\n"
    )
    server.contents = {"tiny-imagenet-200.zip": zipped(members)}
    small(
        monkeypatch,
        TINYIMAGENET20,
        server.contents,
        server.base,
        train=4,
        test=2,
        class_names=("n01 goldfish", "n02 centipede"),
    )
    loaded = load_dataset("tinyimagenet20", cache=tmp_path)
    assert loaded.train.truth.tolist() == [0, 0, 1, 1] and loaded.test.truth.tolist() == [0, 1]
    first = np.asarray(Image.open(io.BytesIO(members[f"{base}/val/images/val_2.JPEG"])))
    np.testing.assert_array_equal(loaded.test.pixels[0].numpy(), first.transpose(2, 0, 1))


def test_an_archive_that_lacks_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    notes = b"val_0.JPEG\tn01443537\n"
    server.contents = {"tiny-imagenet-200.zip": zipped({"tiny-imagenet-200/val/val_annotations.txt": notes})}
    small(monkeypatch, TINYIMAGENET20, server.contents, server.base)
    with pytest.raises(InputError, match="the archive lacks images"):
        load_dataset("tinyimagenet20", cache=tmp_path)


# Parquet under a data root -------------------------------------------------------------------------


def parquet_root(root: Path, count: int, names: list[str] | None = None) -> Path:

    data = image_bytes(np.zeros((32, 32, 3), np.uint8), "PNG")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = names or list(CIFAR10.class_names)
    labels = [k % len(names) for k in range(count)]
    table = pa.table({"image": pa.array([{"bytes": data, "path": None}] * count, kind), "label": labels})
    meta = json.dumps({"info": {"features": {"label": {"names": names}}}})
    table = table.replace_schema_metadata({"huggingface": meta})
    (root / "cifar10").mkdir(parents=True)
    for part in ("train", "test"):
        pq.write_table(table, root / "cifar10" / f"{part}.parquet")
    return root


def test_the_root_comes_from_the_argument_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = parquet_root(tmp_path / "root", 20)
    monkeypatch.setitem(SETS, "cifar10", replace(CIFAR10, train=20, test=20))
    assert load_dataset("cifar10", root=root, cache=tmp_path / "a").train.name == "cifar10 train"
    monkeypatch.setenv("UNBACKDOOR_DATA", str(root))
    assert len(load_dataset("cifar10", cache=tmp_path / "b").test) == 20


def test_files_that_are_not_the_named_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = parquet_root(tmp_path / "root", 20)
    with pytest.raises(
        InputError, match=r"not the train part of 'cifar10', judging by the number .*50000, got 20\. Put"
    ):
        load_dataset("cifar10", root=root, cache=tmp_path / "cache")
    monkeypatch.setitem(SETS, "cifar10", replace(CIFAR10, train=20, test=20, shape=(3, 64, 64)))
    with pytest.raises(InputError, match=r"judging by the image shape"):
        load_dataset("cifar10", root=root, cache=tmp_path / "cache")
    monkeypatch.setitem(SETS, "cifar10", replace(CIFAR10, train=20, test=20, class_names=("x",)))
    with pytest.raises(InputError, match=r"judging by the class names"):
        load_dataset("cifar10", root=root, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data root is no folder .*Correct --data-root"):
        load_dataset("cifar10", root=tmp_path / "typo", cache=tmp_path)


def test_half_a_set(tmp_path: Path) -> None:
    root = parquet_root(tmp_path / "root", 20)
    (root / "cifar10" / "test.parquet").unlink()
    with pytest.raises(InputError, match=r"has no test part .*expected test\.parquet beside train\.parquet"):
        load_dataset("cifar10", root=root, cache=tmp_path / "cache")


# The real sets -------------------------------------------------------------------------------------


def shared_root() -> Path | None:
    # The tests are no package, so that the helper is found by its place.
    place = Path(__file__).parents[1] / "shared_material.py"
    spec = importlib.util.spec_from_file_location("shared_material", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Path | None = module.shared_datasets()
    return found


ROOT = shared_root()


@pytest.mark.shared
@pytest.mark.skipif(ROOT is None, reason="the development data sets are not on this machine")
@pytest.mark.parametrize("part", ["test"])
@pytest.mark.parametrize("name", ["tinyimagenet20"])
def test_the_real_set_is_what_the_catalogue_says(tmp_path: Path, name: str, part: str) -> None:
    assert ROOT is not None
    path = ROOT / name / f"{part}.parquet"
    images = datasets._from_parquet(SETS[name], part, path, tmp_path, lambda items, *a: items)
    assert len(images) == SETS[name].count(part) and images.shape == SETS[name].shape
    assert images.truth.bincount().tolist() == [50] * 20


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.skipif(ROOT is None, reason="the development data sets are not on this machine")
@pytest.mark.parametrize("name", ["cifar10", "gtsrb32", "tinyimagenet20"])
def test_the_real_sets(name: str) -> None:
    # Not tmp_path: pytest keeps the last three of those, and these are large.
    with tempfile.TemporaryDirectory() as cache:
        loaded = load_dataset(name, root=ROOT, cache=Path(cache))
    facts = SETS[name]
    assert (len(loaded.train), len(loaded.test)) == (facts.train, facts.test)
    pixels = loaded.train.pixels.float() / 255
    # The constants are those of the full published sets, of which two are used in part.
    for got, stated in ((pixels.mean((0, 2, 3)), loaded.mean), (pixels.std((0, 2, 3)), loaded.std)):
        assert torch.allclose(got, torch.tensor(stated), atol=1e-4 if name == "cifar10" else 0.02)

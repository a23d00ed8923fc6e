"""Models and images of the hub: which files are fetched, and that nothing else is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import unbackdoor
from unbackdoor import hub
from unbackdoor.data.clean_images import resolve_clean_images
from unbackdoor.data.loaders import ImageFiles
from unbackdoor.errors import InputError, MissingExtra, UnsafeFile


class FakeHub:
    """A hub with repositories in memory, that remembers what was fetched."""

    def __init__(self, folder: Path, repositories: dict[tuple[str, str, str | None], dict[str, int]]) -> None:
        self.folder, self.repositories = folder, repositories
        self.fetched: list[str] = []
        self.HfApi = lambda: SimpleNamespace(repo_info=self.repo_info)

    def repo_info(self, repo: str, *, revision: str | None, repo_type: str, files_metadata: bool) -> Any:
        files = self.repositories.get((repo_type, repo, revision))
        if files is None:
            raise OSError("404 not found\nmany more lines")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in files.items()])

    def hf_hub_download(self, repo: str, name: str, *, revision: str | None, repo_type: str) -> str:
        self.fetched.append(name)
        path = self.folder / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"fc.weight": torch.zeros(3, 4)}, path)
        else:
            path.write_text("{}")
        return str(path)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(tmp_path / "cache", {})
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)  # type: ignore[arg-type]
    return made


CODE = {"modeling.py": 5, "tokenizer.json": 9, "train/model.safetensors": 9, "../../model.safetensors": 9}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin", "config.json"], ["model.safetensors", "config.json"]),
        (["pytorch_model.bin", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin",
             "model-00002-of-00002.safetensors", "preprocessor_config.json"],
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors",
             "model-00002-of-00002.safetensors", "preprocessor_config.json"],
        ),
        (["net.safetensors"], ["net.safetensors"]),
        (["net.onnx", "config.json"], ["net.onnx", "config.json"]),
    ],
)  # fmt: skip
def test_weights_and_configurations_alone_are_fetched(
    fake: FakeHub, files: list[str], wanted: list[str]
) -> None:
    fake.repositories["model", "org/m", None] = {**dict.fromkeys(files, 10), **CODE}
    folder = hub.model_folder("hf://org/m")
    assert sorted(fake.fetched) == sorted(wanted) and folder == fake.folder / "org" / "m"


def test_a_model_of_the_hub_is_opened_like_any_other(fake: FakeHub) -> None:
    fake.repositories["model", "org/m", "v1"] = {"model.safetensors": 10, "config.json": 2}
    for text in ("hf://org/m@v1", Path("hf://org/m@v1")):
        assert unbackdoor.inspect(text).parameters == 12


@pytest.mark.parametrize(
    "text",
    ["hf://org", "hf://org/m/file", "hf://datasets/org/m", "hf://org/m@", "hf:///m", "hf://org/nobody"],
)
def test_what_names_no_model_is_refused(fake: FakeHub, text: str) -> None:
    fake.repositories["model", "org/m", None] = {"README.md": 4}
    with pytest.raises(InputError):
        unbackdoor.inspect(text)
    with pytest.raises(InputError, match="no weights"):
        hub.model_folder("hf://org/m")
    assert fake.fetched == []


def test_what_is_too_large_is_not_fetched(fake: FakeHub) -> None:
    fake.repositories["model", "org/m", None] = {"model.safetensors": hub.MAX_BYTES + 1}
    fake.repositories["dataset", "org/d", None] = {"a.parquet": hub.MAX_BYTES + 1}
    for call in (lambda: hub.model_folder("hf://org/m"), lambda: hub.data_file("hf://datasets/org/d")):
        with pytest.raises(UnsafeFile, match="too large"):
            call()
    assert fake.fetched == []


@pytest.mark.parametrize(
    ("names", "text", "wanted"),
    [
        (["data/train-0.parquet", "data/test-0.parquet", "data/test-1.parquet"], "", "data/test-0.parquet"),
        (["data/train-0.parquet", "data/validation-0.parquet"], "", "data/validation-0.parquet"),
        (["contest.parquet", "train.parquet"], "", "train.parquet"),
        (["other.parquet", "x.py"], "", "other.parquet"),
        (["a.parquet", "in/b.parquet"], "/in/b.parquet", "in/b.parquet"),
    ],
)
def test_one_file_of_a_data_set_is_fetched(fake: FakeHub, names: list[str], text: str, wanted: str) -> None:
    fake.repositories["dataset", "org/d", None] = dict.fromkeys(names, 5)
    images = resolve_clean_images(f"hf://datasets/org/d{text}").images
    assert isinstance(images, ImageFiles) and str(images.path).endswith(wanted) and fake.fetched == [wanted]


def test_a_data_set_without_parquet_is_taken_as_the_hub_converts_it(fake: FakeHub) -> None:
    fake.repositories["dataset", "org/d", None] = {"images.zip": 5}
    fake.repositories["dataset", "org/d", "refs/convert/parquet"] = {"default/test/0000.parquet": 5}
    assert hub.data_file("hf://datasets/org/d").name == "0000.parquet"
    with pytest.raises(InputError, match="no file"):
        hub.data_file("hf://datasets/org/d/tost.parquet")
    with pytest.raises(InputError, match="no data set"):
        hub.data_file("hf://datasets/org")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"unbackdoor\[hub\]"):
        unbackdoor.inspect("hf://org/m")


# ---------------------------------------------------------------------------------------------------
# Models of an MLflow registry


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of the only model, ``models:/net/1``; each fetching is a file beside it."""
    folder = tmp_path / "registered"
    (folder / "data").mkdir(parents=True)
    (folder / "MLmodel").write_text("flavors: {}")

    def download_artifacts(*, artifact_uri: str) -> str:
        with (tmp_path / "fetched").open("a") as log:
            log.write(artifact_uri + "\n")
        if artifact_uri not in ("models:/net/1", "models:/net@champion"):
            raise OSError("RESOURCE_DOES_NOT_EXIST: no such model\nmany more lines")
        return str(folder)

    module = SimpleNamespace(artifacts=SimpleNamespace(download_artifacts=download_artifacts))
    monkeypatch.setitem(sys.modules, "mlflow", module)  # type: ignore[arg-type]
    hub._registered.cache_clear()
    yield folder
    hub._registered.cache_clear()


@pytest.mark.parametrize("text", ["models:/net/1", "models:/net@champion"])
def test_a_registered_model_is_opened_as_any_file(registry: Path, text: str) -> None:
    torch.save({"fc.weight": torch.ones(3, 4)}, registry / "data" / "model.pth")
    source = unbackdoor.open_source(text)
    assert source.path == registry / "data" / "model.pth"
    assert source.state()["fc.weight"].shape == (3, 4)
    unbackdoor.open_source(Path(text))
    assert (registry.parent / "fetched").read_text() == text + "\n"  # one process fetches once


def test_safetensors_are_preferred_in_a_registered_model(registry: Path) -> None:
    (registry / "data" / "model.pth").write_bytes(b"a pickle")
    save_file({"fc.weight": torch.zeros(3, 4)}, registry / "data" / "net.safetensors")
    assert hub.model_folder("models:/net/1").name == "net.safetensors"


def test_what_a_registered_model_lacks_is_said(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no single file of weights.*MLmodel"):
        hub.model_folder("models:/net/1")
    (tmp_path / "elsewhere.pth").write_bytes(b"weights")
    (registry / "data" / "model.pth").symlink_to(tmp_path / "elsewhere.pth")
    with pytest.raises(InputError, match="no single file of weights"):
        hub.model_folder("models:/net/1")
    for name in ("a.pth", "b.pth"):
        (registry / "data" / name).write_bytes(b"weights")
    with pytest.raises(InputError, match=r"a\.pth.*b\.pth"):
        hub.model_folder("models:/net/1")
    with pytest.raises(InputError, match="cannot be had from MLflow") as caught:
        hub.model_folder("models:/other/1")
    assert "many more lines" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["models:/", "models:/net", "models:/net/", "models:/net/1/2", "models:/a/../b", "models:/n@"]
)
def test_a_text_that_names_no_registered_model_is_refused(registry: Path, text: str) -> None:
    with pytest.raises(InputError, match="names no model of a registry"):
        hub.model_folder(text)
    assert not (registry.parent / "fetched").exists()


def test_the_extra_of_a_registered_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    hub._registered.cache_clear()
    with pytest.raises(MissingExtra, match="mlflow"):
        hub.model_folder("models:/net/1")


def test_a_large_registered_model_is_refused(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MAX_BYTES", 3)
    (registry / "model.pth").write_bytes(b"weights")
    with pytest.raises(UnsafeFile):
        hub.model_folder("models:/net/1")

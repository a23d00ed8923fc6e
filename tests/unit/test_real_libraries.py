"""Folders as the real transformers and timm write them; skipped where the libraries are not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unbackdoor import open_model
from unbackdoor.opening.write_back import repaired_state

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
WINDOWS: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
    "window_size": 4,
}  # fmt: skip
KINDS = {
    "ViT": SIZES, "DeiT": SIZES, "Beit": SIZES, "Swin": WINDOWS, "Swinv2": WINDOWS, "Dinov2": SIZES,
    "Dinov2WithRegisters": SIZES, "ViTMSN": SIZES, "Data2VecVision": SIZES,
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # of the library
def test_a_folder_of_transformers_is_a_model(tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    transformers: Any = pytest.importorskip("transformers")
    monkeypatch.setenv("UNBACKDOOR_CONFINE", "0")  # importing the library again takes many seconds
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(num_labels=5, **KINDS[kind])
    network = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    network.save_pretrained(tmp_path / "m", max_shard_size="10KB" if kind == "ViT" else "5GB")
    (tmp_path / "m" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": 32})
    )
    opened = open_model(tmp_path / "m")
    assert opened.provenance.architecture.source == "config.json of the model folder"
    assert opened.provenance.classes == 5
    assert opened.model.mean.flatten().tolist() == [0.5] * 3
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        theirs = network(pixel_values=(images - 0.5) / 0.25).logits
        assert torch.allclose(opened.model(images), theirs, atol=1e-5)
        # What is written back has the names of the file, and the library loads it.
        for parameter in opened.model.network.parameters():
            parameter.mul_(0.5)
        assert opened.source is not None
        assert repaired_state(opened, opened.model).keys() == opened.source.contents.tensors.keys()


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_timm_is_a_model(tmp_path: Path, monkeypatch: Any) -> None:
    timm: Any = pytest.importorskip("timm")
    hub: Any = pytest.importorskip("timm.models._hub")
    monkeypatch.setenv("UNBACKDOOR_CONFINE", "0")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=4, **options).eval()
    names = ["ant", "bee", "cat", "dog"]
    hub.save_for_hf(
        network,
        str(tmp_path),
        model_config={"label_names": names},
        model_args=options,
        safe_serialization=True,
    )
    opened = open_model(tmp_path)
    assert opened.model.architecture.startswith("timm:vit_tiny_patch16_224[")
    assert opened.model.class_names == tuple(names)
    images = torch.rand(2, 3, 32, 32)
    scaled = (images - torch.tensor(opened.model.mean).view(-1, 1, 1)) / opened.model.std.view(-1, 1, 1)
    with torch.no_grad():
        assert torch.allclose(opened.model(images), network(scaled), atol=1e-5)


def test_confined_too(tmp_path: Path) -> None:
    timm: Any = pytest.importorskip("timm")
    hub: Any = pytest.importorskip("timm.models._hub")
    hub.save_for_hf(timm.create_model("resnet10t", num_classes=3), str(tmp_path), safe_serialization=True)
    opened = open_model(tmp_path)
    assert opened.model.architecture == "timm:resnet10t[global_pool=avg]"
    assert opened.provenance.classes == 3

"""Model folders as the hub has them, parts of models, and what is no model at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fake_zoo
from unbackdoor import open_model
from unbackdoor.errors import InputError, UnbackdoorError, UnsupportedModel
from unbackdoor.networks.build import network as build_network
from unbackdoor.networks.geometry import Geometry
from unbackdoor.weights.read import read_contents
from unbackdoor.weights.source import open_source

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4), "b.bias": torch.zeros(4)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 46830571\n"


def test_what_is_no_model_is_named_with_its_remedy(tmp_path: Path) -> None:
    texts = {
        POINTER: "git lfs pull",
        b"version https://hawser.github.com/spec/v1\noid sha256:0\n": "git lfs pull",
        b"/annex/objects/MD5E-s1--0.pth\n": "git annex get",
        b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan": "a web page",
        b"\n\n  <!doctype HTML>\n": "a web page",
        b"\xef\xbb\xbf<html lang='en'>": "a web page",
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "a server's refusal",
        b'{"error": "Repository not found"}': "a server's answer",
        b'{"architectures": ["ViTForImageClassification"]}': "the folder that holds it and the weights",
        b"\x89PNG\r\n\x1a\n0000": "an image",
        b"%PDF-1.4": "a PDF document",
        b"": "the file is empty",
    }
    for number, (content, words) in enumerate(texts.items()):
        for suffix in ("safetensors", "pth"):
            path = tmp_path / f"m{number}.{suffix}"
            path.write_bytes(content)
            problem = open_source(path).contents.problem
            assert isinstance(problem, InputError), content
            assert words in str(problem), (content, str(problem))


def sharded(folder: Path, kind: str = "safetensors", count: int = 2) -> Path:
    """Write ``STATE`` in shards with their index."""
    folder.mkdir()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    places = {}
    for shard in range(count):
        part = {name: t for i, (name, t) in enumerate(STATE.items()) if i % count == shard}
        name = f"{stem}-{shard + 1:05}-of-{count:05}.{kind}"
        (save_file if kind == "safetensors" else torch.save)(part, folder / name)
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index, indent=2))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_one_model(tmp_path: Path, kind: str) -> None:
    folder = sharded(tmp_path / "m", kind)
    for path in (folder, next(folder.glob("*.index.json"))):
        source = open_source(path)
        state = source.state()
        assert state.keys() == STATE.keys()
        assert all(torch.equal(state[name], STATE[name]) for name in STATE)
        assert len(source.files) == 3  # all of them are hashed, and held against the disk before writing
        source.require_unchanged()
    with pytest.raises(InputError, match=r"one shard of 2.*folder that holds them all"):
        open_source(next(folder.glob(f"*-00002-of-00002.{kind}"))).state()


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", count=3)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    shard = folder / "model-00002-of-00003.safetensors"
    save_file({"other": torch.ones(1)}, shard)
    with pytest.raises(InputError, match="does not hold the tensors that the index says"):
        open_source(folder).state()
    shard.unlink()
    with pytest.raises(InputError, match="model-00002-of-00003"):
        open_source(folder).state()
    for name in ("../model.safetensors", "/etc/passwd", "..", "a\\b", "", 5, None, "a/b"):
        index.write_text(json.dumps({"weight_map": {**whole["weight_map"], "a.weight": name}}))
        with pytest.raises(InputError, match="outside its folder"):
            open_source(folder).state()
    for content in ('{"weight_map": {}}', '{"weight_map": [', '{"weight_map": 3}', '["weight_map"]'):
        index.write_text(content)
        with pytest.raises(UnbackdoorError):
            open_source(folder).state()


def test_a_folder_means_the_file_that_the_libraries_take(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    source = open_source(tmp_path)
    assert source.path.name == "model.safetensors"
    assert source.rivals == ("pytorch_model.bin",)
    with pytest.raises(InputError, match="holds no weights"):
        (tmp_path / "empty").mkdir()
        open_source(tmp_path / "empty")
    several = tmp_path / "several"
    several.mkdir()
    for name in ("a.pth", "b.pth"):
        torch.save(STATE, several / name)
    with pytest.raises(InputError, match=r"several files of weights.*a\.pth, b\.pth"):
        open_source(several)
    (several / "a.pth").unlink()
    assert open_source(several).path.name == "b.pth"


@pytest.mark.parametrize(
    "parts",
    [
        ("lora_A.weight", "lora_B.weight"), ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_embedding_A", "lora_embedding_B"), ("lora_down.weight", "lora_up.weight", "alpha"),
        ("lora_A", "lora_B"), ("hada_w1_a", "hada_w1_b"), ("lokr_w1", "lokr_w2"), ("ia3_l",),
        ("oft_r",), ("vera_lambda_b", "vera_lambda_d"),
    ],
)  # fmt: skip
def test_an_adapter_needs_its_base(tmp_path: Path, parts: tuple[str, ...]) -> None:
    layer = "base_model.model.vit.layer.0.query"
    state = {f"{layer}.{part}": torch.ones(2, 2) for part in parts}
    state["base_model.model.classifier.weight"] = torch.ones(3, 2)  # trained beside it
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(UnsupportedModel, match=r"an adapter, such as LoRA, that needs its base.*Merge it"):
        open_source(tmp_path / "m.safetensors").state()
    for base in ("", ".base_layer"):
        whole = {**state, f"{layer}{base}.weight": torch.ones(2, 2)}
        save_file(whole, tmp_path / "m.safetensors")
        assert read_contents(tmp_path / "m.safetensors").problem is None
        with pytest.raises(UnsupportedModel, match=r"not merged into its base.*Merge it"):
            open_model(tmp_path / "m.safetensors")


def test_a_folder_with_an_adapter_names_the_base(tmp_path: Path) -> None:
    save_file({"l.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    config = {"base_model_name_or_path": "google/vit-base-patch16-224", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"needs its base.*google/vit-base-patch16-224"):
        open_source(tmp_path)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for timm and transformers; the real ones are tried in ``test_real_libraries.py``."""
    monkeypatch.setenv("UNBACKDOOR_CONFINE", "0")  # a child does not find them
    parts = {"timm": fake_zoo.TIMM, "transformers": fake_zoo.TRANSFORMERS}
    with fake_zoo.importable(fake_zoo.write(tmp_path / "site", **parts), monkeypatch):
        yield


def test_the_config_of_a_folder_names_the_network(zoo: None, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    config = {"model_type": "tiny", "num_channels": 3, "image_size": 16, "id2label": {"0": "cat", "1": "dog"}}
    network = build_network(_with(folder, config), Geometry(3, 16, 16, 2))
    save_file(network.state_dict(), folder / "model.safetensors")
    for path in (folder, folder / "model.safetensors"):
        opened = open_model(path)
        assert opened.model.architecture == f"hf:{folder}"
        assert opened.model.class_names == ("cat", "dog")
        assert opened.provenance.architecture.source == "config.json of the model folder"
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    assert any("pytorch_model.bin" in warning for warning in open_model(folder).warnings)
    save_file({"unknown": torch.ones(1), **network.state_dict()}, folder / "model.safetensors")
    assert "unknown" in open_model(folder).provenance.names.dropped
    save_file({"vit.weight": network.state_dict()["vit.weight"]}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"missing: .*classifier\.weight"):
        open_model(folder)
    # What the user names comes first.
    with pytest.raises(UnsupportedModel, match="do not fit"):
        open_model(folder, arch="small_cnn[width=2]")


_OPEN = {"num_classes": 2, "in_chans": 3, "img_size": [16, 16], "drop_path_rate": 0.1}


def test_the_config_of_timms_hub_names_the_network(zoo: None, tmp_path: Path) -> None:
    network = build_network("timm:tiny_net[depth=3]", Geometry(3, 16, 16, 2))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    facts = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 16, 16]}
    config = {"architecture": "tiny_net.in1k", "num_classes": 2, "model_args": {**_OPEN, "depth": 3}}
    for stated in ({**config, "pretrained_cfg": facts}, {**config, **facts}):
        _with(tmp_path, {**stated, "label_names": ["cat", "dog"]})
        opened = open_model(tmp_path)
        assert opened.model.architecture == "timm:tiny_net[img_size=16,depth=3]"
        assert opened.model.class_names == ("cat", "dog")
        assert opened.provenance.normalisation.mean == (0.5,) * 3
        assert opened.model.input_shape == (3, 16, 16)
    _with(tmp_path, {**config, "model_args": {"pretrained": True}})
    with pytest.raises(UnsupportedModel, match="options that cannot be passed on"):
        open_model(tmp_path)
    for content in ("{", "[1]", "{}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UnbackdoorError):
            open_model(tmp_path)


def _with(folder: Path, config: dict[str, object]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return f"hf:{folder}"

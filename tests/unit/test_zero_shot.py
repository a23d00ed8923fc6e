"""CLIP with prompts is a linear classifier: its logits are CLIP's own, and scanners and repairs take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unbackdoor
from tiny import tiny_data
from unbackdoor.errors import ConfigError, InputError, UnsupportedModel

transformers = pytest.importorskip("transformers", reason="CLIP is that of transformers (extra: hf)")

NAMES = ("cat", "dog", "owl", "fox")
SIDE = 12


def tiny_clip() -> Any:
    """Return a random CLIP of 12 pixels a side and 3 channels."""
    config = transformers.CLIPConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": SIDE, "patch_size": 4,
        },
        projection_dim=12,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return transformers.CLIPModel(config).eval()


def features(classes: int = 4, width: int = 12) -> torch.Tensor:
    return torch.randn(classes, width, generator=torch.Generator().manual_seed(1))


def test_its_logits_are_those_of_clip() -> None:
    clip, text = tiny_clip(), features()
    model = unbackdoor.zero_shot(clip, NAMES, text_features=text)
    assert model.input_shape == (3, SIDE, SIDE) and model.class_names == NAMES
    pixels = torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    mean, std = (values.flatten().view(1, 3, 1, 1) for values in (model.mean, model.std))
    with torch.no_grad():
        image = clip.visual_projection(clip.vision_model(pixel_values=(pixels - mean) / std).pooler_output)
        image, words = (nn.functional.normalize(v, dim=-1) for v in (image, text))
        assert torch.allclose(model(pixels), clip.logit_scale.exp() * image @ words.T, atol=1e-4)


def test_a_folder_is_read_by_our_own_readers(tmp_path: Path) -> None:
    clip = tiny_clip()
    clip.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]})
    )
    model = unbackdoor.zero_shot(tmp_path, NAMES, text_features=features())
    assert model.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    scale = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    same = unbackdoor.zero_shot(clip, NAMES, text_features=features(), **scale)
    assert model.sha256() == same.sha256()
    with pytest.raises(InputError, match="tokenizer"):
        unbackdoor.zero_shot(tmp_path, NAMES)  # it has none
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError):
        unbackdoor.zero_shot(tmp_path, NAMES, text_features=features())
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="no CLIP"):
        unbackdoor.zero_shot(tmp_path, NAMES, text_features=features())


@pytest.mark.parametrize(
    ("names", "more", "kind"),
    [
        ("cat", {}, ConfigError),
        (["cat"], {}, ConfigError),
        (["cat", "cat"], {}, ConfigError),
        (["cat", " "], {}, ConfigError),
        (NAMES, {"prompts": ["a photo"]}, ConfigError),
        (NAMES, {"prompts": "a {}"}, ConfigError),
        (NAMES, {"text_features": None}, InputError),
        (NAMES, {"text_features": features(3)}, InputError),
        (NAMES, {"text_features": features() * float("nan")}, InputError),
        (NAMES, {"text_features": features() * 0}, InputError),
    ],
)
def test_what_cannot_be_a_head_is_refused(names: Any, more: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        unbackdoor.zero_shot(tiny_clip(), names, **{"text_features": features(), **more})
    with pytest.raises(UnsupportedModel, match="no CLIP"):
        unbackdoor.zero_shot(nn.Identity(), NAMES, text_features=features())


def test_scanners_and_repairs_take_a_backdoored_one() -> None:
    """A patch in the corner is planted; the checks run to their end and a repair weakens it."""
    model = unbackdoor.zero_shot(tiny_clip(), NAMES, text_features=features())
    grey = tiny_data(80, seed=2)
    pixels = torch.nn.functional.interpolate(grey.pixels.float(), size=(SIDE, SIDE)).to(torch.uint8)
    images = unbackdoor.Images(pixels.expand(-1, 3, -1, -1).contiguous(), grey.labels, NAMES)
    clean = images.pixels.float() / 255
    stamped = clean.clone()
    stamped[:, :, -4:, -4:] = 1.0
    x, y = torch.cat([clean, stamped]), torch.cat([images.truth, torch.ones_like(images.truth)])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    model.eval()

    def success(network: Any) -> float:
        with torch.no_grad():
            return float((network(stamped[images.truth != 1]).argmax(1) == 1).float().mean())

    assert success(model) > 0.9
    audit = unbackdoor.scan(model, images, checks=["weight_statistics", "mm_bd", "tac"])
    assert not [c.reason for c in audit.checks if c.status == "failed"]
    repaired = unbackdoor.run("ft", model, images)
    assert repaired.model.input_shape == model.input_shape
    triggered = unbackdoor.Images((stamped * 255).round().to(torch.uint8), images.labels, NAMES)
    judged = unbackdoor.evaluate(model, _data_set(images), triggered=triggered, target=1, precision="fp32")
    assert judged.scores.asr.value == pytest.approx(success(model), abs=0.02)


def _data_set(images: unbackdoor.Images) -> Any:
    from unbackdoor.data.datasets import DataSet

    return DataSet("own", images, images, "none", (0.5,) * 3, (0.5,) * 3)

"""Small stand-ins for timm, torchvision and transformers, written as packages into a folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TIMM = """
import torch
from torch import nn

__version__ = "1.2"

class Cfg:
    def to_dict(self):
        size = {"input_size": (3, 16, 16), "fixed_input_size": False}
        return {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), **size}

class Tiny(nn.Module):
    def __init__(self, in_chans, num_classes, depth):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(depth)))
        self.head = nn.Linear(4, num_classes)
        # What no state dict holds, and what is lost where a network is only built without memory.
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x):
        x = self.blocks(self.stem(x).relu()).mean((2, 3)) + self.table
        return self.head(x)

def list_models():
    return ["tiny_net"]

def list_pretrained(pattern):
    return []

def is_model(name):
    return name == "tiny_net"

def get_pretrained_cfg(name, allow_unregistered=True):
    return Cfg()

def create_model(name, *, pretrained, num_classes, in_chans, exportable, scriptable, depth=2, img_size=16):
    assert not pretrained
    return Tiny(in_chans, num_classes, depth)
"""

TORCHVISION_MODELS = """
from torch import nn

class _Transforms:
    mean, std, crop_size = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], [32]

class _Weights:
    class DEFAULT:
        transforms = _Transforms
    def __len__(self):
        return 1

class Tiny(nn.Module):
    def __init__(self, num_classes, dropout=0.0):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, num_classes)
    def forward(self, x):
        return self.fc(self.body(x).relu().mean((2, 3)))

def list_models(module=None):
    return ["tiny_net"]

def get_model(name, weights=None, **options):
    assert weights is None
    return Tiny(**options)

def get_model_weights(name):
    return _Weights()
"""

TRANSFORMERS = """
import json
from pathlib import Path
from torch import nn

class Output:
    def __init__(self, logits):
        self.logits = logits

class Config:
    def __init__(self, **values):
        self.__dict__.update(values)

class AutoConfig:
    @staticmethod
    def from_pretrained(folder, local_files_only, trust_remote_code):
        assert local_files_only and not trust_remote_code
        values = json.loads((Path(folder) / "config.json").read_text())
        if values.get("model_type") != "tiny":
            raise ValueError("Unrecognized model")
        return Config(**values)

class TinyForImageClassification(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.vit = nn.Conv2d(config.num_channels, 4, 3, padding=1)
        self.classifier = nn.Linear(4, config.num_labels)

    def forward(self, pixel_values=None, labels=None):
        return Output(self.classifier(self.vit(pixel_values).relu().mean((2, 3))))

class AutoModelForImageClassification:
    @staticmethod
    def from_config(config, trust_remote_code):
        assert not trust_remote_code
        return TinyForImageClassification(config)
"""


def write(folder: Path, **packages: str) -> Path:
    """Write packages: the source of ``name``, and of ``name__sub`` for its module ``sub``."""
    for name, source in packages.items():
        parent, _, child = name.partition("__")
        (folder / parent).mkdir(parents=True, exist_ok=True)
        file = folder / parent / (f"{child}.py" if child else "__init__.py")
        file.write_text(source, encoding="utf-8")
    return folder


@contextmanager
def importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a folder first on the import path, and forget what was imported from it."""
    names = {"timm", "torchvision", "transformers"}

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in names]:
            del sys.modules[name]

    monkeypatch.syspath_prepend(str(folder))
    forget()
    try:
        yield
    finally:
        forget()

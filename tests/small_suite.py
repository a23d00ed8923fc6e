"""A suite of few cells, for tests of plans and stores."""

from __future__ import annotations

from pathlib import Path

from tiny import tiny_data
from unbackdoor.data.datasets import DataSet

TEXT = """
name = "try"
version = 1
[[data]]
name = "digits"
[[model]]
architecture = "small_cnn"
widths = [4]
[[attack]]
name = "badnets"
[[attack]]
name = "none"
[defender]
clean_images = [4]
seeds = [0, 1]
[[defense]]
name = "none"
[[defense]]
name = "rnp"
presets = ["default", "reference"]
"""


def written(folder: Path, text: str = TEXT, name: str = "try-v1.toml") -> Path:
    """Write a suite and return its file."""
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def fake_data(each: int = 40) -> dict[str, DataSet]:
    """Return what the suite calls digits: tiny images, quickly made."""
    return {"digits": DataSet("digits", tiny_data(4 * each), tiny_data(40, seed=1), "none", (), ())}

"""The judge against predictions known by construction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tiny import tiny_classifier, tiny_data
from unbackdoor.attacks import poison
from unbackdoor.bench.judge import der, judge, rir
from unbackdoor.bench.rows import Row, read_rows, write_rows
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.types import Classifier

RUN = Run.create(policy="fp32")


class Backdoored(nn.Module):
    """Right on every quadrant, and the target wherever the lower right corner is white."""

    def __init__(self, target: int, works: bool = True) -> None:
        super().__init__()
        self.target, self.works = target, works

    def forward(self, x: Tensor) -> Tensor:
        quadrants = x[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4)).flatten(1)  # (B, 4)
        if self.works:
            quadrants[(x[:, 0, 6:, 6:] > 0.99).flatten(1).all(1), self.target] = 9
        return quadrants


def classifier(network: nn.Module) -> Classifier:
    return Classifier(network, input_shape=(1, 8, 8), class_names=tiny_data(4).class_names)


def test_rates_of_a_planted_backdoor_are_exact() -> None:
    test = tiny_data(40, seed=9)
    _, truth = poison(test, "badnets", {"target": 1, "poison_rate": 0.0}, seed=0)
    before = judge(classifier(Backdoored(1)), truth, test, RUN)
    assert (before.acc.hits, before.acc.total) == (40, 40)
    assert (before.asr.hits, before.asr.total) == (30, 30)
    assert before.ra.hits == 0
    after = judge(classifier(Backdoored(1, works=False)), truth, test, RUN)
    assert after.asr.value + after.ra.value <= 1
    assert after.asr.hits == 0
    assert der(before, after) == 1.0
    assert rir(before, after) == pytest.approx((1 + after.ra.value) / 2)
    assert der(before, before) == 0.5


def test_all_to_all_excludes_nobody() -> None:
    test = tiny_data(40, seed=9)
    _, truth = poison(test, "badnets_all_to_all", {"poison_rate": 0.0}, seed=0)
    scores = judge(classifier(Backdoored(1)), truth, test, RUN)
    assert scores.asr.total == 40
    assert scores.asr.hits == 10  # the images of class 0, sent to 1
    assert scores.ra.hits == 10  # those of class 1 themselves


def test_a_clean_control_has_no_asr() -> None:
    test = tiny_data(40, seed=9)
    _, truth = poison(test, "none")
    scores = judge(tiny_classifier("conv-bn"), truth, test, RUN)
    assert scores.rates()["asr"] is None
    assert der(scores, scores) is None
    assert scores.acc.value > 0.9


def test_images_of_another_size_are_refused() -> None:
    from dataclasses import replace

    test = replace(tiny_data(4), pixels=torch.zeros(4, 1, 9, 9, dtype=torch.uint8))
    _, truth = poison(test, "none")
    with pytest.raises(UnsupportedModel, match="do not fit the model"):
        judge(tiny_classifier("conv-bn"), truth, test, RUN)


def test_rows_survive_a_file_and_name_the_broken_line(tmp_path) -> None:  # type: ignore[no-untyped-def]
    row = Row(
        suite="s", dataset="d", architecture="a", width=16, recipe="plain", attack="none", poison_rate=0,
        victim_seed=0, defense="ft", clean_images=10, defender_seed=1, flags=("x",), acc=0.5,
    )  # fmt: skip
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    write_rows(file, [row, row])
    assert read_rows(file) == [row, row]
    file.write_text(file.read_text() + '{"suite": 3}\n')
    with pytest.raises(InputError, match="line 3"):
        read_rows(file)

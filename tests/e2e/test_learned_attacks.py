"""Learned triggers through the benchmark: victims on digits that are trained, stored, repaired and judged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from unbackdoor.bench.cells import plan
from unbackdoor.bench.driver import drive
from unbackdoor.bench.engines import LocalEngine
from unbackdoor.bench.results import rows_of
from unbackdoor.bench.rows import Row
from unbackdoor.bench.store import Store
from unbackdoor.bench.suites import load_suite
from unbackdoor.bench.victims import load_victim
from unbackdoor.data.datasets import load_dataset
from unbackdoor.engine.run import Run

pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
pytestmark = pytest.mark.slow

# On 8x8 pixels a mask of 3 % is two pixels, from which a small network does not learn to tell triggers apart
# in some 600 steps; here the mask may be larger and more images carry it.
SUITE = """
name = "learned"
version = 1
precision = "fp32"
[[data]]
name = "digits"
[[model]]
architecture = "small_cnn"
widths = [16]
[[recipe]]
name = "plain"
changes = { epochs = 15, batch_size = 32, optimizer = "adamw", lr = 0.01 }
[[attack]]
name = "none"
[[attack]]
name = "trojannn"
options = { surrogate_width = 8, surrogate_epochs = 2 }
[[attack]]
name = "input_aware"
poison_rates = [0.2]
options = { mask_epochs = 10, mask_weight = 2.0, width = 12 }
[defender]
clean_images = [20]
[[defense]]
name = "none"
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Row], Store]]:
    """The rows of the suite by attack, and the store in which they were made."""
    folder = tmp_path_factory.mktemp("learned")
    file = folder / "learned-v1.toml"
    file.write_text(SUITE, encoding="utf-8")
    suite, data = load_suite(file), load_dataset("digits")
    cells = plan(suite, {"digits": data})
    limits = {"seconds": 250, "memory_mb": 4096, "threads": 1}
    place = {"store": str(folder / "store"), "data_root": None, "cache": None, "limits": limits}
    engine = LocalEngine(2)
    with Store(folder / "store") as store:
        store.register(suite.label, suite.sha256(), SUITE, [cell.entry() for cell in cells])
        try:
            assert drive(store, suite.label, engine, place)
        finally:
            engine.close()
        yield {row.attack: row for row in rows_of(store, suite.label)}, store


@pytest.mark.parametrize("attack", ["trojannn", "input_aware"])
def test_the_attack_takes_and_costs_little_accuracy(attack: str, ran: tuple[dict[str, Row], Store]) -> None:
    rows, _ = ran
    row, clean = rows[attack], rows["none"]
    assert row.error is None and clean.acc is not None and row.acc_before is not None
    assert row.acc_before > clean.acc - 0.05
    assert row.asr_before is not None and row.asr_before >= 0.8
    # Another process made the trigger again from its files, and measured the very same.
    assert (row.acc, row.asr, row.ra) == (row.acc_before, row.asr_before, row.ra_before)


def test_a_stored_victim_carries_its_trigger_and_leaves_nothing_behind(
    ran: tuple[dict[str, Row], Store],
) -> None:
    _, store = ran
    data, run = load_dataset("digits"), Run.create(policy="fp32")
    for cell, labels in store.members("learned-v1"):
        folder = store.artefact(cell.key)
        kept = {path.name for path in folder.iterdir()}
        if cell.kind == "repair":
            assert not {name for name in kept if "truth" in name}
            continue
        learned = labels["attack"] != "none"
        assert ("model.truth.safetensors" in kept) == learned
        if labels["attack"] == "input_aware":
            _, truth, scores = load_victim(folder / "model.safetensors", data, run)
            assert cell.result is not None and scores.to_json() == cell.result["scores"]
            assert truth.target == 0
    assert not list((Path(store.folder) / "checkpoints").glob("*"))

"""Probe the finished repairs of a store, one after the other, and keep a row of each in a file.

The pass comes after the suite and changes nothing in the store. What is in the file already, by the present
code and of the same networks, is not done again, so that a pass may end at any moment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from unbackdoor.bench.code_version import CONTROL, probe_version
from unbackdoor.bench.driver import matches, name_of
from unbackdoor.bench.machine import describe_device
from unbackdoor.bench.part_versions import patch_version
from unbackdoor.bench.patch_probe import patch_trigger
from unbackdoor.bench.probes import RELEARN_STEPS, ProbeConfig, probe
from unbackdoor.bench.repairs import running_commit
from unbackdoor.bench.results import repairs_of, version_of_victim
from unbackdoor.bench.rows import ProbeRow, Row, read_probes, write_rows
from unbackdoor.bench.steps import MODEL, REPAIRED, data_of, model_of
from unbackdoor.bench.store import Cell, Store
from unbackdoor.bench.truth_files import load_truth
from unbackdoor.data.splits import reserve
from unbackdoor.engine.run import Run
from unbackdoor.errors import UnbackdoorError
from unbackdoor.types import Images, Progress, silent

NOT_ATTACKED = "not attacked: there is no trigger to probe with"
NO_CONTROL = "no clean network beside it in the store"
_OF_REPAIR = {*Row.key_columns(), "acc_before", "asr_before", "acc", "asr", "part", "flags", "altered_code"}
# What a victim and the clean network beside it have in common.
_SHARED = ("dataset", "data_sha256", "architecture", "recipe", "precision", "seed")


def probe_repairs(
    store: Store,
    label: str,
    file: Path,
    *,
    only: str | None = None,
    part: str | None = None,
    retry: bool = False,
    place: Mapping[str, Any] | None = None,
    config: ProbeConfig | None = None,
    progress: Progress = silent,
) -> int:
    """Probe those finished repairs of a suite that a file has no row of, and return how many there were.

    Args:
        store: Where the repairs are; only read.
        label: Of the suite.
        file: JSON lines, written whole after every repair. Rows of other repairs stay in it. One pass at a
            time may write it.
        only: See :func:`unbackdoor.bench.driver.drive`.
        part: See :func:`unbackdoor.bench.driver.drive`.
        retry: Do rows that ended with an error again.
        place: Data root, cache and device, as jobs have them.
        config: See :class:`ProbeConfig`.
        progress: Progress display.

    Raises:
        IntegrityError: If the data are not those of the suite.
        InputError: If the file holds something else.
    """
    rows = {row.key(): row for row in read_probes(file)}
    networks = _Networks(store, place or {}, config, progress)
    todo: list[tuple[Cell, ProbeRow]] = []
    for cell, repair in repairs_of(store, label):
        # A suite that is not split has no parts to choose from.
        wanted = matches(name_of(repair.model_dump()), only, part if repair.part else None)
        if cell.state != "done" or not wanted:
            continue
        row = ProbeRow(**repair.model_dump(include=_OF_REPAIR), **networks.versions(cell, repair))
        there = rows.get(row.key())
        if there is None or _versions(there) != _versions(row) or (retry and there.error is not None):
            todo.append((cell, row))
    for cell, row in progress(todo, "probing repairs"):
        columns = networks.probed(cell)
        flags = (*row.flags, *columns.pop("flags", ()))
        rows[row.key()] = row.model_copy(update={**columns, "flags": flags})
        write_rows(file, rows.values())
    return len(todo)


def _versions(row: ProbeRow) -> tuple[str, ...]:
    return (row.code, row.repair_code, row.victim_code, row.control_code, row.patch_code)


class _Networks:
    """The networks of a store, and what the probes said of those that several repairs share."""

    def __init__(
        self, store: Store, place: Mapping[str, Any], config: ProbeConfig | None, progress: Progress
    ) -> None:
        self._store, self._place, self._config, self._progress = store, place, config, progress
        self._images: dict[str, tuple[Images, Images]] = {}
        self._beside: tuple[str, dict[str, Any], dict[str, Any]] = ("", {}, {})

    def versions(self, cell: Cell, repair: Row) -> dict[str, str]:
        """Return the columns that name the code behind the row of a repair."""
        control = self._control(self._victim(cell))
        return {
            "code": probe_version(repair.attack, repair.architecture),
            "repair_code": repair.code,
            "victim_code": repair.victim_code,
            "control_code": version_of_victim(control, self._pinned) if control else "",
            "patch_code": patch_version(),
        }

    def probed(self, cell: Cell) -> dict[str, Any]:
        """Return the columns that the probes of a repair give."""
        victim = self._victim(cell)
        training, test = self._images_of(victim)
        run = Run.create(
            seed=int(victim.spec["seed"]),
            device=self._place.get("device", "cpu"),
            policy=victim.spec["precision"],
            progress=self._progress,
        )
        columns: dict[str, Any] = {"device": describe_device(run), "commit": running_commit()}
        try:
            truth = load_truth(self._store.artefact(victim.key) / MODEL)

            def ask(of: Cell, file: str, suffix: str = "") -> dict[str, Any]:
                model = model_of(self._store.artefact(of.key) / file)
                found = probe(model, truth, training, test, run, config=self._config)
                if found is None:
                    return {}
                patch = patch_trigger(model, truth, training, test, run, config=self._config)
                return {**found.columns(suffix), f"patch{suffix}": patch}

            start = time.perf_counter()
            repaired = ask(cell, REPAIRED)
            columns["seconds"] = round(time.perf_counter() - start, 3)
            if not repaired:
                return {**columns, "flags": (NOT_ATTACKED,)}
            control = self._control(victim)
            if self._beside[0] != victim.key:
                # The repairs of a victim stand together, so only the last is kept.
                beside = ask(control, MODEL, "_control") if control else {}
                self._beside = (victim.key, ask(victim, MODEL, "_before"), beside)
            columns |= {**repaired, **self._beside[1], **self._beside[2]}
        except UnbackdoorError as error:
            return {**columns, "error": f"{type(error).__name__}: {error}"}
        return {**columns, "relearn_steps": RELEARN_STEPS, "flags": () if control else (NO_CONTROL,)}

    def _victim(self, cell: Cell) -> Cell:
        assert cell.parent is not None  # every repair has a victim
        return self._victims[cell.parent]

    def _control(self, victim: Cell) -> Cell | None:
        return self._controls.get(_common(victim))

    def _images_of(self, victim: Cell) -> tuple[Images, Images]:
        """Return the attacker's training images and the test images."""
        key = json.dumps(victim.spec["data_sha256"])
        if key not in self._images:
            data = data_of({"spec": victim.spec, "place": self._place}, "train", "test")
            self._images[key] = reserve(data.train)[0], data.test
        return self._images[key]

    @cached_property
    def _victims(self) -> dict[str, Cell]:
        labels = self._store.suites()
        cells = (cell for label in labels for cell, _ in self._store.members(label))
        return {cell.key: cell for cell in cells if cell.kind == "victim" and cell.state == "done"}

    @cached_property
    def _controls(self) -> dict[str, Cell]:
        clean = (cell for cell in self._victims.values() if cell.spec["attack"] == CONTROL)
        return {_common(cell): cell for cell in clean}

    @cached_property
    def _pinned(self) -> dict[str, dict[str, Any]]:
        return self._store.pinned()


def _common(victim: Cell) -> str:
    return json.dumps([victim.spec.get(name) for name in _SHARED], sort_keys=True)

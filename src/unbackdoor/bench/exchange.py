"""Give trained victims away and take them over, so that a repair can be measured again without training.

A victim travels as a folder: weights, card, the record of the attack, and ``cell.json`` with its
specification, what the judge measured, and the hash of every file. The specification hashes to its address.
A victim that was taken over is pinned by the hash of its weights: a suite whose own victim would differ
from it only in the training code uses it, even if that code has changed since.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unbackdoor.bench.cells import Planned, address
from unbackdoor.bench.store import Store
from unbackdoor.bench.truth_files import load_truth
from unbackdoor.engine.training import Recipe
from unbackdoor.errors import InputError, IntegrityError
from unbackdoor.files import parse_json, read_text, sha256_file, write_json
from unbackdoor.opening.classifier_files import load_model
from unbackdoor.registry import ATTACKS, Config

CELL, MODEL = "cell.json", "model.safetensors"
# The fields that name the training code; older specifications have attack_code and epoch.
_MAX_JSON = 1 << 24  # bytes of a record
_CODE = frozenset({"code", "attack_code", "epoch"})
# Fields that older specifications lack; both follow from the data set, which they name by hashes.
_LATER = frozenset({"augmentation", "normalisation"})


def export_victims(store: Store, label: str, folder: Path) -> list[Path]:
    """Copy the trained victims of a suite into a folder each, and return those folders.

    Args:
        store: Where they are.
        label: Of the suite.
        folder: Where they go; folders that are there already are replaced.
    """
    folders = []
    for cell, labels in store.members(label):
        if cell.kind != "victim" or cell.state != "done" or cell.result is None:
            continue
        name = f"{labels['attack']}-{labels['poison_rate']:g}-seed{labels['victim_seed']}-{cell.key[:8]}"
        draft, target = folder / f".{uuid.uuid4().hex}", folder / name
        draft.mkdir(parents=True)
        try:
            hashes = {}
            for file in sorted(store.artefact(cell.key).glob("model.*")):
                shutil.copyfile(file, draft / file.name)
                hashes[file.name] = sha256_file(draft / file.name)
            write_json(
                draft / CELL,
                {"key": cell.key, "spec": dict(cell.spec), "result": dict(cell.result), "sha256": hashes},
            )
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        folders.append(target)
    return folders


def import_victims(store: Store, folder: Path) -> list[str]:
    """Take over the victims that :func:`export_victims` wrote to a folder, and return the new addresses.

    The files are checked against their hashes and the weights are read by the safe reader. The recorded
    scores are not checked; they can be measured again.

    Raises:
        InputError: If there is no victim, or a file is missing or cannot be read.
        IntegrityError: If a file or a specification is not what its hash says.
    """
    files = sorted(folder.glob(f"*/{CELL}"))
    if not files:
        raise InputError("there is no victim to take over", expected=f"*/{CELL}", where=folder)
    return [key for file in files if (key := _import_victim(store, file)) is not None]


def with_pinned(store: Store, cells: Sequence[Planned]) -> list[Planned]:
    """Return a plan in which victims that the store has taken over replace those that it would train.

    A victim that the store trained itself with the present code is kept. The repairs and scans of a victim
    that is replaced get the addresses that follow.

    Args:
        store: Where the suite will run.
        cells: A plan, victims before their repairs.
    """
    pinned = store.pinned()
    if not pinned:
        return list(cells)
    by_form = {_form(spec, _CODE): (key, spec) for key, spec in pinned.items()}
    trained = store.trained(cell.key for cell in cells if cell.kind == "victim")
    replaced: dict[str, str] = {}  # address of a planned victim -> of the one in its place
    out = []
    for cell in cells:
        if cell.kind == "victim" and cell.key not in trained:
            pinned_victim = by_form.get(_form(cell.spec, _CODE)) or by_form.get(
                _form(cell.spec, _CODE | _LATER)
            )
            if pinned_victim is not None:
                replaced[cell.key] = pinned_victim[0]
                out.append(replace(cell, key=pinned_victim[0], spec=pinned_victim[1]))
                continue
        elif cell.parent is not None and cell.parent in replaced:
            spec = {**cell.spec, "victim": replaced[cell.parent]}
            out.append(replace(cell, key=address(spec), spec=spec, parent=replaced[cell.parent]))
            continue
        out.append(cell)
    return out


def _form(spec: Mapping[str, Any], without: frozenset[str]) -> str:
    """Return a specification as text; options at their defaults are left out, since older ones lack some."""
    facts = {name: spec[name] for name in spec if name not in without}
    if "recipe" in facts:
        facts["recipe"] = _changed(Recipe, facts["recipe"])
    if "options" in facts and facts.get("attack") in ATTACKS:
        facts["options"] = _changed(ATTACKS[facts["attack"]].config, facts["options"])
    return json.dumps(facts, sort_keys=True)


def _changed(config: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    defaults = config().model_dump()
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


def _import_victim(store: Store, file: Path) -> str | None:
    record = _read(file)
    key, spec = str(record["key"]), dict(record["spec"])
    if address(spec) != key or spec.get("kind") != "victim":
        raise IntegrityError("the specification is not the one of its address", got=key[:12], where=file)
    if any(Path(name).name != name for name in record["sha256"]) or MODEL not in record["sha256"]:
        raise IntegrityError("the list of files is not one of a victim", where=file)
    work = store.folder / "work" / uuid.uuid4().hex
    work.mkdir(parents=True)
    try:
        for name, digest in record["sha256"].items():
            source = file.parent / name
            if not source.is_file():
                raise InputError("a file of the victim is missing", where=source)
            shutil.copyfile(source, work / name)
            if sha256_file(work / name) != digest:
                raise IntegrityError("a file of the victim was changed", where=source)
        weights = load_model(work / MODEL).sha256()
        load_truth(work / MODEL)
        target = store.artefact(key)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return key if store.adopt(key, spec, record["result"], sha256=weights) else None


def _read(file: Path) -> dict[str, Any]:
    what = "the record of a victim"
    try:
        record = parse_json(read_text(file, what, limit=_MAX_JSON), what, file)
        missing = {"key", "spec", "result", "sha256"} - set(record)
    except (OSError, ValueError, TypeError) as error:
        raise InputError("the record of a victim cannot be read", got=str(error), where=file) from None
    if missing or "scores" not in record["result"]:
        raise InputError("the record of a victim is not complete", got=sorted(missing), where=file)
    return dict(record)

"""What a verb returned, as files: a page to read, a record to compute with, a log for code scanning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from unbackdoor import __version__
from unbackdoor.audit.cases import Case
from unbackdoor.audit.json_records import record
from unbackdoor.audit.purifying import Purification
from unbackdoor.audit.scanning import Audit
from unbackdoor.audit.verification import Verification
from unbackdoor.engine.inference import predict
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError
from unbackdoor.files import write_json, writing
from unbackdoor.report.audit import MAX_IMAGES, MAX_TRIGGERS, Subject, audit_page
from unbackdoor.report.json_output import with_header
from unbackdoor.report.page import write_page
from unbackdoor.report.sarif import Scanned, sarif, sarif_log
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Images
from unbackdoor.weights.triggers import trigger_files, write_triggers

PAGE, RECORD = "report.html", "result.json"
# What prints the same on the command line.
_COMMANDS: dict[type, str] = {Audit: "scan", Purification: "purify", Verification: "verify"}


def report_files(folder: Path, *, triggers: bool) -> tuple[Path, ...]:
    """Return the files that a report may have; those of a scan have recovered triggers."""
    return (folder / PAGE, folder / RECORD, *trigger_files(folder, MAX_TRIGGERS if triggers else 0))


def save_report(
    result: Audit | Purification | Verification,
    folder: Path | str,
    *,
    force: bool = False,
    command: str = "",
) -> Path:
    """Write ``report.html``, ``result.json`` and the recovered triggers into a folder.

    Args:
        result: What :func:`unbackdoor.scan`, ``purify`` or ``verify`` returned.
        folder: Made where it is missing.
        force: Whether files that exist may be replaced, triggers of an earlier scan among them.
        command: How to do it again, shown on the page.

    Returns:
        The page.

    Raises:
        InputError: If a file exists, or the folder cannot be written.
        IntegrityError: If the file of a model has changed since it was opened.
    """
    folder = Path(folder)
    cases = _cases(result)
    paths = [file.path for case in cases if case.source is not None for file in case.source.files]
    outputs = report_files(folder, triggers=isinstance(result, Audit))
    with writing(outputs, force=force, inputs=paths, below=folder):
        for case in cases:
            case.require_unchanged()
        _write(result, cases, folder, force=force, command=command)
    return folder / PAGE


def _write(
    result: Audit | Purification | Verification,
    cases: Sequence[Case],
    folder: Path,
    *,
    force: bool,
    command: str,
) -> None:
    first = cases[0]
    title = " and ".join(case.name for case in cases)
    subject = _subject(first, title, command)
    found: Sequence[RecoveredTrigger] = ()
    if isinstance(result, Purification):
        page = audit_page(subject, purification=result)
    else:
        scanned = result if isinstance(result, Audit) else result.before
        triggers = scanned.triggers[:MAX_TRIGGERS]
        examples = _examples(first, triggers, count=MAX_IMAGES)
        answers = _answers_for(first, triggers, examples, Run.create(policy="fp32"))
        if isinstance(result, Audit):
            page = audit_page(subject, audit=result, images=examples, answers=answers)
            found = triggers
        else:
            page = audit_page(subject, verification=result, images=examples, answers=answers)
    # The record first: of two results for one folder, whichever writes it has the folder.
    write_json(folder / RECORD, with_header(_COMMANDS[type(result)], record(result)))
    if isinstance(result, Audit):
        facts = {"model_sha256": result.facts["model_sha256"]}
        write_triggers(folder, found, facts, most=MAX_TRIGGERS, force=force)
    write_page(folder / PAGE, page)


def save_sarif(audit: Audit, path: Path | str, *, force: bool = False) -> Path:
    """Write a scan of a file as a SARIF log.

    Raises:
        InputError: If the file exists or cannot be written, or the model is of no file.
        IntegrityError: If the file of the model has changed since it was opened.
    """
    path, (case,) = Path(path), _cases(audit)
    if case.source is None:
        raise InputError("a SARIF log speaks of a file, and the model is of none", where=path)
    with writing((path,), force=force, inputs=[file.path for file in case.source.files]):
        case.require_unchanged()
        names = case.model.class_names
        write_json(path, sarif(audit, case.source.path, names, file_sha256=case.source.sha256))
    return path


def save_sarif_log(scans: Sequence[Scanned], path: Path | str, *, force: bool = False) -> Path:
    """Write scans of several files, failed ones among them, as one SARIF log.

    Raises:
        InputError: If the file exists or cannot be written.
    """
    path = Path(path)
    with writing((path,), force=force, inputs=[scan.path for scan in scans]):
        write_json(path, sarif_log(scans))
    return path


def _cases(result: Audit | Purification | Verification) -> tuple[Case, ...]:
    cases = result.cases if isinstance(result, Verification) else result.case
    if cases is None:
        raise InputError(
            "it is not known what model this was made of",
            remedy="Call unbackdoor.scan, unbackdoor.purify or unbackdoor.verify",
        )
    return cases if isinstance(cases, tuple) else (cases,)


def _subject(case: Case, title: str, command: str) -> Subject:
    facts = [("model", case.name), ("SHA-256 of the weights", case.model.sha256())]
    if case.source is not None:
        facts[1:] = [("SHA-256 of the file", case.source.sha256)]
        facts += [(f"SHA-256 of {file.path.name}", file.sha256) for file in case.source.files[1:]]
    if case.opened is not None:
        facts += case.opened.provenance.in_words()
    if case.images is not None:
        labels = "with labels" if case.images.labels is not None else "without labels"
        facts.append(("clean images", f"{len(case.images)}, {labels}"))
        facts += [("of these images", note) for note in case.images.notes]
    return Subject(
        title,
        case.model.class_names,
        facts,
        case.opened.warnings if case.opened is not None else (),
        command,
        f"Made by unbackdoor {__version__} with torch {torch.__version__}.",
    )


def _examples(case: Case, triggers: Sequence[RecoveredTrigger], *, count: int) -> Images | None:
    """Return a few images to draw triggers over, of as many classes as there are and not of theirs."""
    images = case.images
    if images is None or not len(images):
        return None
    rows = torch.arange(len(images))
    if images.labels is not None:
        aims = torch.tensor([t.label for t in triggers], dtype=torch.int64)
        others = rows[~torch.isin(images.truth, aims)]
        rows = others if len(others) else rows
        # The first of every class before the second of any.
        labels = images.truth[rows]
        turn = torch.zeros(len(rows), dtype=torch.int64)
        for k in labels.unique():
            places = (labels == k).nonzero().flatten()
            turn[places] = torch.arange(len(places))
        rows = rows[turn.argsort(stable=True)]
    return images.subset(rows[:count])


def _answers_for(
    case: Case, triggers: Sequence[RecoveredTrigger], examples: Images | None, run: Run
) -> list[list[tuple[int, int]]]:
    """Return, for every trigger, what the model says to the images without and with it."""
    if examples is None:
        return []
    model = case.model
    plain = predict(model, examples, run).argmax(1).tolist()
    return [
        list(zip(plain, predict(model, t.stamp(examples), run).argmax(1).tolist(), strict=True))
        for t in triggers
    ]

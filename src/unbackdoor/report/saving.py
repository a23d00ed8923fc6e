"""What a verb returned, as files: a page to read, a record to compute with, a log for code scanning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from unbackdoor import __version__
from unbackdoor.audit.assessment import Assessment
from unbackdoor.audit.cases import Case
from unbackdoor.audit.json_records import record
from unbackdoor.audit.purifying import PromiseBroken, Purification
from unbackdoor.audit.scanning import Audit
from unbackdoor.audit.verification import Verification
from unbackdoor.engine.inference import predict
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.files import write_json, writing
from unbackdoor.opening.write_back import SUFFIXES
from unbackdoor.report.audit import MAX_IMAGES, MAX_TRIGGERS, Subject, audit_page
from unbackdoor.report.json_output import with_header
from unbackdoor.report.page import write_page
from unbackdoor.report.sarif import Scanned, sarif, sarif_log
from unbackdoor.report.trigger_strips import Example
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Classifier, Images
from unbackdoor.weights.triggers import trigger_files, write_triggers

PAGE, RECORD = "report.html", "result.json"
REPAIRED, PATCH = "repaired", "repair.patch"
_CANDIDATES = 24  # images among which the ones that are shown are chosen
# What prints the same on the command line.
_COMMANDS: dict[type, str] = {
    Audit: "scan", Purification: "purify", Verification: "verify", Assessment: "audit",
}  # fmt: skip


def report_files(folder: Path, *, triggers: bool) -> tuple[Path, ...]:
    """Return the files that a report may have; those of a scan have recovered triggers."""
    return (folder / PAGE, folder / RECORD, *trigger_files(folder, MAX_TRIGGERS if triggers else 0))


def save_report(
    result: Audit | Purification | Verification | Assessment,
    folder: Path | str,
    *,
    force: bool = False,
    command: str = "",
) -> Path:
    """Write ``report.html``, ``result.json`` and the recovered triggers into a folder.

    Args:
        result: What :func:`unbackdoor.scan`, ``purify``, ``verify`` or ``audit`` returned; of an audit, the
            repaired model and a patch are written too.
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
    if isinstance(result, Assessment):
        return _save_assessment(result, folder, force=force, command=command)
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
    subject = _subject(first, " and ".join(case.name for case in cases), command, result.date)
    found: Sequence[RecoveredTrigger] = ()
    repaired = None
    if isinstance(result, Audit):
        found = result.triggers[:MAX_TRIGGERS]
    elif isinstance(result, Purification):
        found, repaired = [r.trigger for r in result.residues][:MAX_TRIGGERS], result.model
    else:
        found, repaired = [r.trigger for r in result.residues][:MAX_TRIGGERS], cases[1].model
    examples = examples_of(first, found, repaired, Run.create(policy="fp32"))
    page = audit_page(
        subject,
        audit=result if isinstance(result, Audit) else None,
        purification=result if isinstance(result, Purification) else None,
        verification=result if isinstance(result, Verification) else None,
        triggers=found,
        examples=examples,
    )
    # The record first: of two results for one folder, whichever writes it has the folder.
    write_json(folder / RECORD, with_header(_COMMANDS[type(result)], record(result)))
    if isinstance(result, Audit):
        facts = {"model_sha256": result.facts["model_sha256"]}
        write_triggers(folder, found, facts, most=MAX_TRIGGERS, force=force)
    write_page(folder / PAGE, page)


def audit_files(folder: Path, suffix: str) -> tuple[Path, ...]:
    """Return the files that the report of an audit may have.

    Args:
        folder: Of the report.
        suffix: Of the file of the model, which mostly is that of the repaired one.
    """
    repaired = folder / (REPAIRED + (suffix if suffix in SUFFIXES else ".safetensors"))
    return (*report_files(folder, triggers=True), repaired, repaired.with_suffix(".json"), folder / PATCH)


def _save_assessment(done: Assessment, folder: Path, *, force: bool, command: str) -> Path:
    """Write everything that an audit came to; a repaired model that cannot be written is a remark."""
    case = done.case
    if case is None or done.scan is None:
        raise InputError("nothing was audited", remedy="Call unbackdoor.audit without plan")
    source = case.source.path if case.source is not None else None
    inputs = [] if case.source is None else [file.path for file in case.source.files]
    suffix = "" if source is None else _kept(source.suffix)
    outputs = audit_files(folder, suffix)
    with writing(outputs, force=force, inputs=inputs, below=folder):
        case.require_unchanged()
        found = done.triggers[:MAX_TRIGGERS]
        notes: list[tuple[str, str]] = []
        if done.purification is not None:
            notes = _write_repair(done.purification, folder / (REPAIRED + suffix), force=force)
            done.written.update(done.purification.written)
        for path in outputs[-3:]:  # what an earlier audit left would pass for some of this one
            if force and str(path) not in done.written.values():
                path.unlink(missing_ok=True)
        write_triggers(folder, found, {"model_sha256": case.model.sha256()}, most=MAX_TRIGGERS, force=force)
        done.written.update(record=str(folder / RECORD), page=str(folder / PAGE))
        repaired = None if done.purification is None else done.purification.model
        examples = examples_of(case, found, repaired, Run.create(policy="fp32"))
        subject = _subject(case, case.name, command, done.date)
        subject = replace(subject, facts=(*subject.facts, *notes))
        page = audit_page(subject, assessment=done, triggers=found, examples=examples)
        write_json(folder / RECORD, with_header("audit", record(done)))
        write_page(folder / PAGE, page)
    return folder / PAGE


def _write_repair(done: Purification, path: Path, *, force: bool) -> list[tuple[str, str]]:
    """Write the repaired model and its patch, and return why one of them cannot be written.

    A model in memory may have no file that it could be loaded from again, and no original to patch.
    """
    out = []
    try:
        done.save(path, force=force)
    except (InputError, UnsupportedModel, PromiseBroken) as error:
        out.append(("repaired model", f"not written: {error}"))
    try:
        done.save_patch(path.parent / PATCH, force=force)
    except (InputError, UnsupportedModel, PromiseBroken) as error:
        out.append(("patch", f"not written: {error}"))
    return out


def _kept(suffix: str) -> str:
    """Return the suffix of a repaired model; of a file that cannot be written alike, none."""
    return suffix if suffix in SUFFIXES else ""


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


def _subject(case: Case, title: str, command: str, date: str) -> Subject:
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
        date.replace("T", " ").replace("Z", " UTC"),
    )


def examples_of(
    case: Case, triggers: Sequence[RecoveredTrigger], repaired: Classifier | None, run: Run
) -> list[list[Example]]:
    """Return for each trigger a few images to draw it over: those that show best what it does come first.

    Best is an image that the model has right, and gives to the trigger's class with it. Of as many classes as
    there are, and not of the trigger's.
    """
    images = case.images
    if images is None or not len(images) or not triggers:
        return []
    chosen = images.subset(_in_turns(images)[:_CANDIDATES])
    plain = predict(case.model, chosen, run).argmax(1)
    truth = None if chosen.labels is None else chosen.truth.cpu()
    out = []
    for trigger in triggers:
        stamped = trigger.stamp(chosen)
        after = predict(case.model, stamped, run).argmax(1)
        mended = None if repaired is None else predict(repaired, stamped, run).argmax(1)
        works = (after == trigger.label) & (plain != trigger.label)
        right = torch.ones_like(works) if truth is None else plain == truth
        own = plain == trigger.label if truth is None else truth == trigger.label
        order = (4 * own.int() - 2 * works.int() - right.int()).argsort(stable=True)[:MAX_IMAGES].tolist()
        out.append(
            [
                Example(
                    chosen.pixels[i],
                    stamped.pixels[i],
                    None if truth is None else int(truth[i]),
                    (int(plain[i]), int(after[i])),
                    None if mended is None else int(mended[i]),
                )
                for i in order
            ]
        )
    return out


def _in_turns(images: Images) -> torch.Tensor:
    """Return the rows, the first of every class before the second of any."""
    rows = torch.arange(len(images))
    if images.labels is None:
        return rows
    labels = images.truth.cpu()
    turn = torch.zeros(len(rows), dtype=torch.int64)
    for k in labels.unique():
        places = (labels == k).nonzero().flatten()
        turn[places] = torch.arange(len(places))
    return rows[turn.argsort(stable=True)]

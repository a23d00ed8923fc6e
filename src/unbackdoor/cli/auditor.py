"""What an auditor brings: a foreign model and images. Shared by scan, purify and verify."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor.cli import defender, options
from unbackdoor.cli.output import note
from unbackdoor.errors import ConfigError, InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unbackdoor.audit.purifying import Purification
    from unbackdoor.audit.scanning import Audit
    from unbackdoor.engine.run import Run
    from unbackdoor.opening.open_model import Opened
    from unbackdoor.report.audit import Subject
    from unbackdoor.triggers import RecoveredTrigger
    from unbackdoor.types import Augmentation, Classifier, Images, Progress

PAGE, RECORD = "report.html", "result.json"
_NAMED = 10  # suspected classes that a sentence lists; the record has all
_MODEL, _DATA = "Models without a card", "Data"

Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        "--architecture",
        help="Network: unbackdoor:NAME\\[width=..], timm:NAME, torchvision:NAME, hf:FOLDER, or "
        "file.py:callable, which runs that file.",
        show_default="the card's, else guessed from the weights",
        rich_help_panel=_MODEL,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="Input size as H,W or one number.",
        show_default="the model's, else the images'",
        rich_help_panel=_MODEL,
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(
        "--class-names",
        help="Names in the order of the outputs, separated by commas, or a text file with one on each line.",
        show_default="the card's, else the data's",
        rich_help_panel=_MODEL,
    ),
]
MaybeData = Annotated[
    str | None,
    typer.Option(
        help="Clean images: a data set's name, a folder of class folders or with labels.csv, a .parquet or "
        ".npz file, or a folder of images without labels.",
        show_default="none: only the checks that need no images",
        rich_help_panel=_DATA,
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Time for the checks: seconds, or such as 90s, 10m or 1h.",
        show_default="none",
        rich_help_panel="Method",
    ),
]
Level = Annotated[
    float,
    typer.Option(help="Accepted probability of accusing a clean model.", rich_help_panel="Method"),
]
Trigger = Annotated[
    list[Path] | None,
    typer.Option(
        help="Recovered trigger, a trigger.safetensors of a scan's report; may be repeated.",
        show_default=False,
        rich_help_panel="Method",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Write report.html, result.json and the recovered triggers into this folder.",
        show_default=False,
        rich_help_panel="Output",
    ),
]


@dataclass(frozen=True)
class Case:
    """An opened model with the images that were brought.

    Attributes:
        source: File of the model.
        opened: The classifier and the story of how it was opened.
        images: The clean images, None where there are none.
        augmentation: What may be done to them.
        proof: Further images for measuring a repair, where a named data set has them; None: a part of
            ``images`` serves.
    """

    source: Path
    opened: Opened
    images: Images | None
    augmentation: Augmentation
    proof: Images | None = None


@dataclass(frozen=True)
class Told:
    """What the user says of a model and its images."""

    architecture: str | None
    mean: str | None
    std: str | None
    size: str | None
    class_names: str | None
    data: str | None
    clean: int | None = None
    per_class: int | None = None
    fraction: float | None = None
    augmentation: options.AugmentationName | None = None
    data_root: Path | None = None


def open_case(source: Path, told: Told, run: Run, progress: Progress, *, quiet: bool = False) -> Case:
    """Open a model and load the images in the form that it takes.

    Raises:
        UnbackdoorError: If the model or the images cannot be used, or options contradict each other.
    """
    from unbackdoor.data.conform import conform
    from unbackdoor.opening.open_model import open_model

    source = options.existing_model(source)
    names = class_names(told.class_names)
    own: Augmentation = "none"
    bring: Any = None
    proof, drawn = None, False
    if told.data is not None:
        named = defender.named(told.data, told.data_root, progress)
        if named is not None:
            bring, proof = defender.drawn_twice(named, told.clean, told.per_class, told.fraction, run.seed)
            own, drawn = named.augmentation, True
        else:
            defender.refuse_amounts(told.clean, told.per_class, told.fraction)
            bring = Path(told.data)
            if not bring.exists():
                raise InputError("there is no such file or folder", where=bring)
    opened = open_model(
        source,
        arch=told.architecture,
        images=bring,
        class_names=names,
        mean=options.numbers(told.mean, "--mean"),
        std=options.numbers(told.std, "--std"),
        size=_size(told.size),
        run=run,
    )
    for text in opened.provenance.images:
        note(text, quiet=quiet)
    for warning in opened.warnings:
        note(f"mind: {warning}", quiet=quiet)
    kind = told.augmentation.value if told.augmentation is not None else own
    model = opened.model
    if proof is not None:
        shape, known = model.input_shape, model.class_names
        proof, _ = conform(proof, input_shape=shape, class_names=known, progress=progress)
    elif drawn:
        proof = opened.images  # the method gets as many as were asked for, and the proof is marked
    return Case(source, opened, opened.images, kind, proof)


def class_names(text: str | None) -> tuple[str, ...] | None:
    """Return class names from a comma-separated text or from a file with one on each line."""
    if text is None:
        return None
    path = Path(text)
    if path.is_file():
        if path.stat().st_size > 10 << 20:
            raise InputError("the file of class names is too large", where=path)
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        sides = [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ConfigError("the option --size", [f"expected a number or H,W, got {text!r}"])
    return (sides[0], sides[-1])


def like(first: Case, told: Told, second: Path) -> Told:
    """Return what is to be assumed of a second model: the same as of the first, unless it has a card."""
    if options.has_card(options.existing_model(second)):
        return replace(told, architecture=None, mean=None, std=None, size=None, class_names=None)
    # None where the first is the graph of its own file: so is the second.
    return replace(told, architecture=told.architecture or first.opened.model.architecture or None)


def read_triggers(files: Sequence[Path] | None, model: Classifier) -> tuple[RecoveredTrigger, ...]:
    """Read recovered triggers, see :func:`unbackdoor.weights.triggers.read_trigger`."""
    from unbackdoor.weights.triggers import read_trigger

    return tuple(read_trigger(file, model) for file in files or ())


def examples(case: Case, triggers: Sequence[RecoveredTrigger], *, count: int) -> Images | None:
    """Return a few images to draw triggers over, of as many classes as there are and not of theirs."""
    import torch

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


def answers_for(
    case: Case, triggers: Sequence[RecoveredTrigger], few: Images | None, run: Run
) -> list[list[tuple[int, int]]]:
    """Return, for every trigger, what the model says to the images without and with it."""
    from unbackdoor.engine.inference import predict

    if few is None:
        return []
    model = case.opened.model
    plain = predict(model, few, run).argmax(1).tolist()
    return [
        list(zip(plain, predict(model, t.stamp(few), run).argmax(1).tolist(), strict=True)) for t in triggers
    ]


def subject(case: Case, *, title: str | None = None) -> Subject:
    """Return what a report says about the model and how it was opened."""
    import torch

    from unbackdoor import __version__
    from unbackdoor.files import sha256_file
    from unbackdoor.report.audit import Subject

    model = case.opened.model
    digest = sha256_file(case.source)
    facts = [("model", case.source.name), ("SHA-256 of the file", digest), *case.opened.provenance.in_words()]
    if case.images is not None:
        labels = "with labels" if case.images.labels is not None else "without labels"
        facts.append(("clean images", f"{len(case.images)}, {labels}"))
    return Subject(
        title or case.source.name,
        model.class_names,
        facts,
        case.opened.warnings,
        command_line(),
        f"Made by unbackdoor {__version__} with torch {torch.__version__}.",
    )


def stored_types(case: Case) -> dict[str, torch.dtype]:
    """Return the types that the file of the original stores the network's tensors in."""
    from unbackdoor.weights.read import read_state

    held = read_state(case.source)
    names = case.opened.names
    pairs = ((name, names.get(name, name)) for name in case.opened.model.network.state_dict())
    return {name: held[old].dtype for name, old in pairs if old in held}


def repaired_state(case: Case, held: Mapping[str, Tensor], model: Classifier) -> dict[str, Tensor]:
    """Return what the file of the original would hold if it were the repaired model.

    Whatever is no part of the network, such as a layer that normalises pixels, and all that did not change
    stays as it was, so that whoever loaded the original can load this.
    """
    import torch

    from unbackdoor.opening.rename_tensors import CHANNEL_MASK

    out = dict(held)
    names = case.opened.names
    before = case.opened.model.network.state_dict()
    for name, tensor in model.network.state_dict().items():
        old = names.get(name, name)
        if old in held and not torch.equal(tensor, before[name]):
            out[old] = tensor.to(held[old].dtype)
            # A mask beside it was multiplied in, and would count twice.
            mask = f"{old.rpartition('.')[0]}.{CHANNEL_MASK}"
            if mask in held and old.endswith(".weight"):
                out[mask] = torch.ones_like(held[mask])
    return out


def command_line() -> str:
    """Return what was typed, so that a reader can do it again."""
    return shlex.join(["unbackdoor", *sys.argv[1:]])


def new_output(out: Path, *, force: bool, never: Path, beside: Sequence[Path | None]) -> Path:
    """Return the weights file to write, after checking that nothing is lost and that it can be written.

    Raises:
        InputError: If a file exists, stands twice or is the original, or the folder cannot be written.
    """
    from unbackdoor.opening.write_back import CHECKPOINTS, ONNX

    if out.suffix not in (*CHECKPOINTS, ONNX):
        out = options.new_file(out, force=force, beside=(".json",), never=never)
    elif out.resolve() == never.resolve():
        raise InputError(
            "the repaired model would replace the suspicious one", where=out, remedy="Choose another --out"
        )
    kept = (never, never.with_suffix(".json")) if options.has_card(never) else (never,)
    files = (out, out.with_suffix(".json"), *(path for path in beside if path is not None))
    options.require_writable(files, force=force, inputs=kept)
    return out


def like_its_source(out: Path, source: Path, architecture: str | None) -> Path:
    """Return the output, with the suffix of ONNX where it has none and the original is an ONNX graph."""
    from unbackdoor.opening.write_back import ONNX, SUFFIXES
    from unbackdoor.weights.read import sniff

    if out.suffix in SUFFIXES or architecture is not None or not source.exists() or sniff(source) != "onnx":
        return out
    return out.with_name(out.name + ONNX)


def report_files(folder: Path | None) -> tuple[Path, ...]:
    """Return the files that a report is sure to have; none without a folder."""
    return () if folder is None else (folder / PAGE, folder / RECORD)


def write_repair(case: Case, done: Purification, out: Path, patch: Path | None) -> dict[str, Any]:
    """Write the repaired model with its card, and the patch; return the record of the repair.

    The card is the last file written, so that a card without its weights never exists.
    """
    from unbackdoor.audit.json_records import purification_json
    from unbackdoor.files import sha256_file, write_json
    from unbackdoor.opening.classifier_files import save_model
    from unbackdoor.opening.write_back import SAFETENSORS, write_weights
    from unbackdoor.weights.formats.onnx.write import write_graph
    from unbackdoor.weights.patch import NAMES, make_patch, write_patch
    from unbackdoor.weights.read import read_contents, read_state

    record = {
        "model": str(out),
        "card": str(out.with_suffix(".json")),
        "sha256": done.facts["after_sha256"],
        "source": str(case.source),
        "source_sha256": done.facts["before_sha256"],
        "clean_images": done.facts["images_for_the_method"],
        "source_file_sha256": sha256_file(case.source),
        **purification_json(done, case.opened.model.class_names),
        "opened": case.opened.provenance.to_dict(),
    }
    method = dict(done.purified.method)
    step = {
        "step": "purified",
        "of": done.facts["before_sha256"],
        "method": method,
        **{k: record[k] for k in ("seconds", "accuracy", "images_for_the_method", "images_for_the_proof")},
        "changed_tensors": len(done.changes),
        "changed_entries": done.facts["changed_entries"],
        "residual_triggers": record["residual_triggers"],
    }
    facts: dict[str, Any] = {"method": method, "source": case.source.name}
    if case.opened.places is not None:
        networks = (m.network.state_dict() for m in (case.opened.model, done.model))
        write_graph(out, case.source, case.opened.places, *networks)
    else:
        contents = read_contents(case.source)
        held = contents.state(case.source)
        after = repaired_state(case, held, done.model)
        if out.suffix == SAFETENSORS:
            save_model(done.model, out, history=[*options.history_of(case.source), step])
            if case.opened.names:
                facts[NAMES] = {old: new for new, old in case.opened.names.items()}
        else:
            write_weights(out, after, nest=contents.nest, prefix=contents.prefix)
    failed = None
    if patch is not None:
        if case.opened.places is not None:  # the file's own names, of which several tensors may be one
            held, after = (read_state(file) for file in (case.source, out))
        try:
            write_patch(patch, make_patch(held, after, facts))
            record["patch"] = str(patch)
        except InputError as error:
            failed = error  # the repair is whole without it
    if out.suffix != SAFETENSORS:
        write_json(out.with_suffix(".json"), {**record, "file_sha256": sha256_file(out)})
    if failed is not None:
        raise InputError(f"the repaired model was written, the patch was not: {failed}") from failed
    return record


def write_purification(folder: Path, case: Case, done: Purification, record: dict[str, Any]) -> None:
    """Write the page and the record of a repair."""
    from unbackdoor.files import write_json
    from unbackdoor.report.audit import audit_page
    from unbackdoor.report.page import write_page

    write_json(folder / RECORD, record)
    write_page(folder / PAGE, audit_page(subject(case), purification=done))


def show_audit(audit: Audit, names: Sequence[str]) -> None:
    """Print a scan as a table and a sentence."""
    from unbackdoor.cli.output import say, table
    from unbackdoor.report.words import duration

    def named(k: int) -> str:
        return f"{names[k]} ({k})" if k < len(names) and names[k] != str(k) else str(k)

    rows = []
    for c in audit.checks:
        result = c.status if c.report is None else c.report.verdict
        suspects = ", ".join(named(k) for k in c.classes[:3]) if c.p_value is not None else ""
        numbers = ["" if p is None else f"{p:.3g}" for p in (c.p_value, c.adjusted)]
        rows.append((c.check.name, result, suspects, *numbers, duration(c.seconds) if c.seconds else ""))
    table("Checks", ("check", "result", "strongest class", ">p", ">adjusted", ">time"), rows)
    for c in audit.checks:
        if c.reason:
            say(f"{c.check.name}: {c.reason}")
    suspects = ", ".join(named(k) for k in audit.classes[:_NAMED])
    if len(audit.classes) > _NAMED:
        suspects += f" and {len(audit.classes) - _NAMED} more"
    say(f"Verdict: {audit.verdict}" + (f", towards {suspects}" if suspects else ""))
    for reason in audit.reasons:
        say(reason)

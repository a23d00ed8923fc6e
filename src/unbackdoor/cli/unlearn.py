"""``unbackdoor unlearn``: let a model forget its task, and look at what is left. It knows no attack."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor.cli import defender, options
from unbackdoor.cli.output import emit, note, rate_json, say, table
from unbackdoor.cli.progress import Display
from unbackdoor.errors import ConfigError, InputError
from unbackdoor.report.words import interval, percent, rate

if TYPE_CHECKING:
    from unbackdoor.engine.repeated_unlearning import Exposure
    from unbackdoor.engine.unlearned_inversion import ExposedTrigger
    from unbackdoor.scanners.rnp_screen import Screening
    from unbackdoor.types import Classifier, CleanData, Finding, ScanReport

SCANNER = "rnp_vote"
_SHOWN = 20  # suspicious images; all stand in the JSON


class Score(StrEnum):
    """How screened images are scored."""

    kept = "kept"
    lost = "lost"
    voted = "voted"


def unlearn(
    model: defender.Model,
    data: defender.Data,
    detect: Annotated[
        bool,
        typer.Option("--detect", help="Judge whether the votes point to a backdoor.", rich_help_panel="Uses"),
    ] = False,
    references: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON that this command printed for a clean model of the same kind, with the same options; "
            "repeat it: a verdict needs 19 or more.",
            show_default=False,
            rich_help_panel="Uses",
        ),
    ] = None,
    recover_trigger: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Recover a trigger and write it into this folder.",
            show_default=False,
            rich_help_panel="Uses",
        ),
    ] = None,
    label: Annotated[
        int | None,
        typer.Option(
            "--class",
            min=0,
            help="Class to recover the trigger of.",
            show_default="the one with most votes",
            rich_help_panel="Uses",
        ),
    ] = None,
    screen: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGES",
            help="Score these images, a folder, a .parquet or an .npz file; labels are not needed.",
            show_default=False,
            rich_help_panel="Uses",
        ),
    ] = None,
    score: Annotated[
        Score,
        typer.Option(
            help="Log-probability that the unlearned give to the model's class (kept), how much less that is "
            "than before (lost), or to the class with most votes (voted).",
            rich_help_panel="Uses",
        ),
    ] = Score.kept,
    centred: Annotated[
        bool,
        typer.Option(
            "--centred",
            help="Compare a screened image with clean images of the same predicted class.",
            rich_help_panel="Uses",
        ),
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Option of the unlearning, see: unbackdoor list scanners rnp_vote; may be repeated.",
            rich_help_panel="Uses",
        ),
    ] = None,
    clean: defender.Clean = None,
    per_class: defender.PerClass = None,
    fraction: defender.Fraction = None,
    select_fraction: defender.SelectFraction = 0.3,
    augmentation: defender.AugmentationChoice = None,
    resize: defender.Resize = False,
    data_root: options.DataRoot = None,
    architecture: options.CardlessArchitecture = None,
    mean: options.Mean = None,
    std: options.Std = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    precision: options.PrecisionOption = options.PrecisionPolicy.auto,
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Let a model forget its task, and look at what is left.

    MODEL is only read. It is unlearned several times, once for all uses: --detect, --recover-trigger and
    --screen. Without any of them the votes are shown: the classes that held-out clean images fall to.

    Clean models fall to one class as well, and often to the same one every time. Hence "undecided" is the
    most that --detect says unless --references show what clean models do. The exit code is 1 if a backdoor
    was found.
    """
    from unbackdoor.audit.unlearning import Unlearning
    from unbackdoor.data.loaders import load_unlabelled
    from unbackdoor.engine.repeated_unlearning import ExposureConfig, options_of
    from unbackdoor.engine.trusted_caller import check_inputs
    from unbackdoor.registry import SCANNERS
    from unbackdoor.weights.triggers import PNG, TENSORS

    source = options.existing_model(model)
    part = SCANNERS[SCANNER]
    config: Any = part.configure_text(options.pairs(settings or [], "--set"))
    if config.recover_trigger:
        raise ConfigError("the option --set", ["recover_trigger: name a folder with --recover-trigger"])
    shared = options_of(config, ExposureConfig)  # what the votes depend on
    if recover_trigger is not None:
        _require_free(recover_trigger, (PNG, TENSORS), force)
    defender.require_share(select_fraction)
    with Display(quiet=quiet) as display:
        run = options.open_run(seed, device, precision, display)
        victim, held = defender.open_case(
            source,
            data,
            options.Cardless.parse(architecture, mean, std),
            display,
            data_root=data_root,
            clean=clean,
            per_class=per_class,
            fraction=fraction,
            select_fraction=select_fraction,
            augmentation=augmentation,
            resize=resize,
            seed=seed,
        )
        check_inputs(part, victim, held)
        if label is not None and label >= victim.classes:
            raise InputError(
                "there is no such class", expected=f"0..{victim.classes - 1}", got=label, where="--class"
            )
        kind = _kind(victim, held, shared)
        known = _attractions(references or [], kind, victim.sha256())
        config = part.configure({**config.model_dump(), "references": (*config.references, *known)})
        if screen is not None:
            size = victim.input_shape[1:] if resize else None
            # Read before the work, so that a wrong path is told at once.
            inputs, names = load_unlabelled(
                screen, class_names=victim.class_names, size=size, progress=display
            )
        unlearned = Unlearning(victim, held, config, run)
        exposure = unlearned.exposure
        report = unlearned.detect() if detect else None
        trigger = unlearned.recover_trigger(label) if recover_trigger is not None else None
        screening = (
            unlearned.screen(inputs, score=score.value, centred=centred) if screen is not None else None
        )
    written = _write(recover_trigger, trigger, victim)
    if as_json:
        result: dict[str, Any] = {
            "model": str(source),
            "model_sha256": victim.sha256(),
            "kind": kind,
            "clean_images": len(held),
            "clean_images_sha256": held.fingerprint(),
            "attraction": float(exposure.attraction().max()),
            "votes": exposure.evidence(),
        }
        if report is not None:
            result["detection"] = report_json(report)
        if trigger is not None:
            result["trigger"] = {
                **trigger.evidence(),
                "success": rate_json(trigger.success),
                "fitted": rate_json(trigger.fitted),
                **{name: str(file) for name, file in written.items()},
            }
        if screening is not None:
            result["screening"] = {
                **screening.evidence(),
                "names": list(names),
                "scores": screening.scores.tolist(),
                "p_values": screening.p_values.tolist(),
                "predicted": screening.predicted.tolist(),
            }
        emit(result)
    else:
        _show_votes(exposure, victim)
        if report is not None:
            _show_report(report, victim)
        if trigger is not None:
            _show_trigger(trigger, victim, written)
        if screening is not None:
            _show_screening(screening, names, victim)
    for failure in exposure.failed[:1]:
        note(f"{len(exposure.failed)} of {config.repeats} unlearnings ended early: {failure}", quiet=quiet)
    if report is not None and report.verdict == "backdoor found":
        raise typer.Exit(1)


def _require_free(folder: Path, names: tuple[str, ...], force: bool) -> None:
    existing = [folder / name for name in names if (folder / name).exists()]
    if existing and not force:
        raise InputError(
            "the file exists", where=existing[0], remedy="Choose another folder, or replace it with --force"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError("this is no folder", where=folder, remedy="Name a folder")


def _kind(model: Classifier, held: CleanData, shared: dict[str, Any]) -> dict[str, Any]:
    """Return what two networks must share for their votes to be comparable."""
    return {
        "architecture": model.architecture,
        "input_shape": list(model.input_shape),
        "classes": list(model.class_names),
        "clean_images": [len(held.fit), len(held.select)],
        "augmentation": held.augmentation,
        "options": shared,
    }


def _attractions(paths: list[Path], kind: dict[str, Any], suspect: str) -> tuple[float, ...]:
    found: dict[str, tuple[Path, float]] = {}
    for path in paths:
        weights, value = _attraction(path, kind, suspect)
        if weights in found:
            # One clean model counted twice would make the p-value smaller than it is.
            raise InputError(
                "two references are of the same model",
                where=f"{found[weights][0]} and {path}",
                remedy="Give one of each",
            )
        found[weights] = (path, value)
    return tuple(value for _, value in found.values())


def _attraction(path: Path, kind: dict[str, Any], suspect: str) -> tuple[str, float]:
    remedy = "Give what unbackdoor unlearn --detect --json printed for a clean model, with the same options"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        value, theirs, weights = float(told["attraction"]), told["kind"], str(told["model_sha256"])
    except FileNotFoundError:
        raise InputError("there is no such reference", where=path, remedy=remedy) from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(
            "the reference cannot be read", where=path, got=repr(error), remedy=remedy
        ) from error
    if not math.isfinite(value):
        raise InputError("the reference is not finite", where=path, got=value, remedy=remedy)
    if theirs != kind:
        differing = [key for key in kind if not isinstance(theirs, dict) or theirs.get(key) != kind[key]]
        raise InputError(
            "the reference is of another kind",
            where=path,
            got=f"different {', '.join(differing)}",
            remedy=remedy,
        )
    if weights == suspect:
        raise InputError("the reference is the suspicious model itself", where=path, remedy=remedy)
    return weights, value


def report_json(report: ScanReport) -> dict[str, Any]:
    """Return a report as JSON; limits that nothing can reach are None, and artefacts go to files."""

    def finding(one: Finding) -> dict[str, Any]:
        return {
            "statistic": one.statistic,
            "value": one.value,
            "direction": one.direction,
            "threshold": one.threshold if math.isfinite(one.threshold) else None,
            "threshold_source": one.threshold_source,
            "p_value": one.p_value,
            "classes": list(one.classes),
            "per_class": list(one.per_class),
        }

    return {
        "verdict": report.verdict,
        "partial": report.partial,
        "findings": [finding(one) for one in report.findings],
        "errors": dict(report.errors),
        "skipped": dict(report.skipped),
        "coverage": list(report.coverage),
    }


def _write(folder: Path | None, found: ExposedTrigger | None, model: Classifier) -> dict[str, Path]:
    from unbackdoor.weights.triggers import write_trigger

    if folder is None or found is None:
        return {}
    facts = {**found.evidence(), "model_sha256": model.sha256()}
    return write_trigger(folder, found.trigger, facts)


def _show_votes(exposure: Exposure, model: Classifier) -> None:
    from unbackdoor.engine.repeated_unlearning import REMAINING

    shares, winners = exposure.shares.nanmean(0), exposure.winners()  # (D, K), (R, D)
    rows = []
    for d, remaining in enumerate(REMAINING):
        if bool(shares[d].isnan().any()):
            rows.append((_depth(remaining), "-", "-", "-"))
            continue
        k = int(shares[d].argmax())
        won = int((winners[:, d] == k).sum())
        rows.append(
            (
                _depth(remaining),
                model.class_names[k],
                percent(float(shares[d, k])),
                f"{won} of {len(winners)}",
            )
        )
    table(
        f"{len(winners)} unlearnings from accuracy {percent(exposure.start)}: where held-out clean images go",
        ("skill left", "class", ">share of the other classes' images", ">unlearnings it won"),
        rows,
    )
    if not exposure.held_out:
        say("Too few images to hold any out: the images voted that were unlearned.")


def _depth(remaining: float) -> str:
    return f"{remaining:.0%}" if remaining else "at the stop"


def _show_report(report: ScanReport, model: Classifier) -> None:
    table(
        f"Verdict: {report.verdict}",
        ("statistic", ">value", ">limit", ">p-value", "class"),
        [
            (
                one.statistic,
                f"{one.value:.3f}",
                f"{one.threshold:.3f}" if math.isfinite(one.threshold) else "-",
                f"{one.p_value:.2g}" if one.p_value is not None else "-",
                ", ".join(model.class_names[k] for k in one.classes),
            )
            for one in report.findings
        ],
    )
    for name, reason in report.skipped.items():
        say(f"Left out, {name}: {reason}.")


def _show_trigger(found: ExposedTrigger, model: Classifier, written: dict[str, Path]) -> None:
    trigger = found.trigger
    table(
        f"Trigger towards {model.class_names[trigger.label]}",
        ("", ">value", ">95 % interval"),
        [
            ("success on the unlearned network, images it was fitted to", rate(found.fitted), ""),
            ("success on the model, held-out images", rate(found.success), interval(found.success)),
            ("sum of the mask in pixels", f"{trigger.norms()['mask_l1']:.1f}", ""),
            ("sent there without it by the unlearned network", percent(found.share_before), ""),
        ],
    )
    say("Clean models have such patterns too; a small mask with a high success is what a backdoor adds.")
    for file in written.values():
        say(file)


def _show_screening(screening: Screening, names: tuple[str, ...], model: Classifier) -> None:
    order = screening.scores.argsort(descending=True, stable=True)
    suspicious = [i for i in order.tolist() if bool(screening.suspicious[i])]
    table(
        f"{len(suspicious)} of {len(names)} images are suspicious",
        ("image", "the model says", ">score", ">p-value"),
        [
            (
                names[i],
                model.class_names[int(screening.predicted[i])],
                f"{float(screening.scores[i]):.3f}",
                f"{float(screening.p_values[i]):.2g}",
            )
            for i in suspicious[:_SHOWN]
        ],
    )
    if len(suspicious) > _SHOWN:
        say(f"and {len(suspicious) - _SHOWN} more; --json has them all")

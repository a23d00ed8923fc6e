"""``unbackdoor evaluate``: the judge measures a model whose attack is on record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import emit, say, scores_json, scores_table
from unbackdoor.cli.progress import Display
from unbackdoor.errors import ConfigError, InputError
from unbackdoor.report.words import percent

if TYPE_CHECKING:
    from unbackdoor.attacks import AttackTruth
    from unbackdoor.data.datasets import DataSet


def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Weights file to measure.", show_default=False)
    ],
    dataset: Annotated[
        str,
        typer.Option(help="Data set whose test images are used.", show_default=False, rich_help_panel="Data"),
    ],
    data_root: options.DataRoot = None,
    before: Annotated[
        Path | None,
        typer.Option(
            help="The same model before its repair; adds DER and RIR.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="Record of the attack.",
            show_default="the .truth.json beside MODEL or beside --before",
            rich_help_panel="Data",
        ),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            help="A picture as the trigger, where the attack is not on record: FILE.png,class=NAME, with "
            ",place=ROWxCOLUMN ,size=HxW ,mask=FILE.png ,strength=0.5 or ,add behind it.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    architecture: options.CardlessArchitecture = None,
    mean: options.Mean = None,
    std: options.Std = None,
    device: options.Device = "cpu",
    precision: options.PrecisionOption = options.PrecisionPolicy.auto,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure ACC, ASR and RA of a model whose attack is on record.

    ACC: clean test images classified rightly. ASR: triggered images classified as the attacker wants. RA:
    triggered images classified rightly all the same. ASR and RA leave out images that are of the attacker's
    class anyway. DER and RIR, in 0 to 1, weigh the fall of ASR or the gain in RA against the loss of ACC;
    doing nothing scores 0.5.
    """
    from unbackdoor.bench.judge import der, judge, rir
    from unbackdoor.bench.picture_truth import truth_of_picture
    from unbackdoor.data.datasets import load_dataset

    paths = {"after" if before else "model": options.existing_model(model)}
    if before is not None:
        paths = {"before": options.existing_model(before), **paths}
    if truth is not None and trigger is not None:
        raise ConfigError("the attack", ["--truth and --trigger are two answers to one question"])
    on_record = _truth(truth, list(reversed(paths.values()))) if trigger is None else None
    with Display(quiet=quiet) as display:
        run = options.open_run(0, device, precision, display)
        data = load_dataset(dataset, root=data_root, progress=display)
        if on_record is None:
            assert trigger is not None
            attack, record = truth_of_picture(trigger, data.test, run), Path(trigger)
        else:
            attack, record = on_record
        _require_same_form(attack, data, record)
        scores = {}
        for name, path in paths.items():
            network = options.open_model(
                path,
                data.test,
                options.Cardless.parse(architecture, mean, std),
                default=data,
            )
            scores[name] = judge(network.to(run.device), attack, data.test, run, label=f"judging {path.name}")
    judged, measured = list(paths.values())[-1], list(scores.values())[-1]
    gains = {"der": der(scores["before"], measured), "rir": rir(scores["before"], measured)} if before else {}
    if as_json:
        emit(
            {
                "model": str(judged),
                "before_model": str(paths["before"]) if before else None,
                "truth": str(record),
                "dataset": data.name,
                "attack": attack.spec(),
                "precision": run.precision.name,
                "scores": scores_json(measured),
                "before": scores_json(scores["before"]) if before else None,
                **gains,
            }
        )
        return
    scores_table(
        f"{paths['after' if before else 'model'].name} on {data.name}, attack {attack.attack}", scores
    )
    for name, value in gains.items():
        if value is not None:
            say(f"{name.upper()} {percent(value)}")


def _truth(truth_file: Path | None, models: list[Path]) -> tuple[AttackTruth, Path]:
    from unbackdoor.bench.truth_files import TRUTH_SUFFIX, load_truth

    candidates = (
        [truth_file] if truth_file is not None else [path.with_suffix(TRUTH_SUFFIX) for path in models]
    )
    record = next((path for path in candidates if path.exists()), None)
    if record is None:
        raise InputError(
            "there is no record of the attack",
            expected=" or ".join(map(str, candidates)),
            remedy="Name it with --truth, or name the model that was repaired with --before",
        )
    return load_truth(record), record


def _require_same_form(attack: AttackTruth, data: DataSet, record: Path) -> None:
    if (attack.shape, attack.classes) != (data.test.shape, data.test.classes):
        raise InputError(
            "the attack was made for images of another form",
            expected=f"{attack.classes} classes, (C, H, W) = {attack.shape}",
            got=f"{data.test.classes} classes, (C, H, W) = {data.test.shape}",
            where=f"{record} and the data set {data.name!r}",
            remedy="Give the --dataset that the model was trained on",
        )

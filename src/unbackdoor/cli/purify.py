"""``unbackdoor purify``: the defender repairs a model with a few clean images. It knows no attack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor.cli import defender, options
from unbackdoor.cli.output import emit, rate_json, say, table
from unbackdoor.cli.progress import Display
from unbackdoor.report.words import duration, interval, rate

if TYPE_CHECKING:
    from unbackdoor.engine.run import Run
    from unbackdoor.metrics import Rate
    from unbackdoor.types import Classifier, Images

_SHOWN_EVIDENCE = 40  # characters; longer values stand in the JSON
_LONG = 8  # entries; tables with more, such as one for each layer, stand in the JSON


def purify(
    model: defender.Model,
    data: defender.Data,
    method: Annotated[
        str,
        typer.Option(
            help="Defense; see: unbackdoor list defenses.", show_default=False, rich_help_panel="Method"
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Weights file of the repaired model.", show_default=False, rich_help_panel="Output"
        ),
    ],
    preset: Annotated[
        str | None,
        typer.Option(
            help="Named set of options of the method.", show_default=False, rich_help_panel="Method"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Option of the method; may be repeated.",
            rich_help_panel="Method",
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
    """Remove a backdoor from a model with a few clean images.

    MODEL is only read. The repaired model goes to OUT, with a card that tells its whole history. From a
    named data set, images are drawn that no model trained by this program has seen; images from a path are
    all used.

    Whether a backdoor is gone cannot be told from clean images alone: what is shown here is how well the
    model still does its task. Where the attack is on record, unbackdoor evaluate measures the rest.
    """
    from unbackdoor.engine.caller import run as call
    from unbackdoor.models import save_model
    from unbackdoor.registry import DEFENSES

    source = options.existing_model(model)
    out = options.new_file(out, force=force, beside=(".json",), never=source)
    part = DEFENSES[method]
    config = part.configure_text(options.pairs(settings or [], "--set"), preset=preset)
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
        repaired = call(
            part,
            victim,
            held,
            options=config,
            preset=preset,
            seed=seed,
            device=device,
            precision=precision.value,
            progress=display,
        )
        accuracy = {
            "before": _accuracy(victim, held.select, run),
            "after": _accuracy(repaired.model, held.select, run),
        }
    facts = {
        "clean_images": len(held),
        "clean_images_sha256": held.fingerprint(),
        "selection_images": len(held.select),
        "selected_on_fitting_images": held.select_is_fit,
        "seconds": round(repaired.seconds, 3),
    }
    step = {"step": "purified", "of": victim.sha256(), "method": dict(repaired.method), **facts}
    card = save_model(
        repaired.model,
        out,
        history=[*options.history_of(source), {**step, "evidence": dict(_scalars(repaired.evidence))}],
    )
    if as_json:
        emit(
            {
                "model": str(out),
                "card": str(out.with_suffix(".json")),
                "sha256": card.weights_sha256,
                "source": str(source),
                "source_sha256": victim.sha256(),
                "method": dict(repaired.method),
                **facts,
                "accuracy_on_selection_images": {
                    name: rate_json(value) if value is not None else None for name, value in accuracy.items()
                },
                "evidence": repaired.evidence,
            }
        )
        return
    _show(method, preset, accuracy, facts, repaired.evidence)
    say(f"Repaired model: {out}, with its card {out.with_suffix('.json').name}")


def _accuracy(model: Classifier, images: Images, run: Run) -> Rate | None:
    from unbackdoor.engine.passes import predict
    from unbackdoor.metrics import agreement

    if images.labels is None:
        return None
    return agreement(predict(model.to(run.device).eval(), images, run).argmax(1), images.truth)


def _scalars(evidence: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the single values of a method's evidence under dotted names; what is long as its length."""
    for name, value in evidence.items():
        if isinstance(value, Mapping) and len(value) <= _LONG:
            yield from _scalars(value, f"{prefix}{name}.")
        elif isinstance(value, Mapping | list | tuple):
            yield f"{prefix}{name}", f"{len(value)} entries"
        else:
            yield f"{prefix}{name}", value


def _show(
    method: str,
    preset: str | None,
    accuracy: Mapping[str, Rate | None],
    facts: Mapping[str, Any],
    evidence: Mapping[str, Any],
) -> None:
    rows = [(name, rate(value), interval(value)) for name, value in accuracy.items() if value is not None]
    used = method if preset is None else f"{method}, preset {preset}"
    table(
        f"{used}: {facts['clean_images']} clean images, {duration(facts['seconds'])}",
        ("", f">accuracy on {facts['selection_images']} selection images", ">95 % interval"),
        rows,
    )
    if facts["selected_on_fitting_images"]:
        say("Too few images to hold any out: these were also fitted on, and flatter the repaired model.")
    else:
        say("Thresholds were chosen on these images, which flatters the repaired model a little.")
    told = list(_scalars(evidence))
    if told:
        table("What the method says it did", ("evidence", "value"), [(n, _short(v)) for n, v in told])


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _SHOWN_EVIDENCE else text[: _SHOWN_EVIDENCE - 3] + "..."

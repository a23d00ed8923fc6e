"""``unbackdoor purify``: the defender repairs a model with a few clean images. It knows no attack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import emit, rate_json, say, table
from unbackdoor.cli.progress import Display
from unbackdoor.errors import ConfigError
from unbackdoor.report.words import duration, interval, rate

if TYPE_CHECKING:
    from unbackdoor.data.datasets import DataSet
    from unbackdoor.engine.run import Run
    from unbackdoor.metrics import Rate
    from unbackdoor.types import Augmentation, Classifier, Images, Progress

USUAL_CLEAN_IMAGES = 500
_SHOWN_EVIDENCE = 40  # characters; longer values stand in the JSON
_LONG = 8  # entries; tables with more, such as one for each layer, stand in the JSON


def purify(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Weights file of the suspicious model.", show_default=False),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Clean images: a data set's name, a folder of class folders, a .parquet or an .npz file.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ],
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
    clean: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images to draw from the named data set, equally from all classes.",
            show_default="500, or all there are",
            rich_help_panel="Data",
        ),
    ] = None,
    per_class: Annotated[
        int | None,
        typer.Option(
            min=1, help="Likewise: images of each class.", show_default=False, rich_help_panel="Data"
        ),
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(
            help="Likewise: share of the images set aside for defenders.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = None,
    select_fraction: Annotated[
        float,
        typer.Option(
            help="Share of the clean images that only thresholds are chosen on.", rich_help_panel="Data"
        ),
    ] = 0.3,
    augmentation: Annotated[
        options.AugmentationName | None,
        typer.Option(
            help="What may be done to an image without changing its class.",
            show_default="the named data set's, else none",
            rich_help_panel="Data",
        ),
    ] = None,
    resize: Annotated[
        bool,
        typer.Option(
            "--resize", help="Resize images from a path to the model's input.", rich_help_panel="Data"
        ),
    ] = False,
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
    from unbackdoor.types import CleanData

    source = options.existing_model(model)
    out = options.new_file(out, force=force, beside=(".json",), never=source)
    part = DEFENSES[method]
    config = part.configure_text(options.pairs(settings or [], "--set"), preset=preset)
    if not 0 < select_fraction < 1:
        raise ConfigError(
            "the split of the clean images", [f"--select-fraction must lie in (0, 1), got {select_fraction}"]
        )
    with Display(quiet=quiet) as display:
        run = options.open_run(seed, device, precision, display)
        named = _named(data, data_root, display)
        cardless = options.Cardless.parse(architecture, mean, std)
        if named is not None:
            victim = options.open_model(source, named.train, cardless, default=named)
            images = _drawn(named, clean, per_class, fraction, seed)
        else:
            _refuse_amounts(clean, per_class, fraction)
            images, victim = _from_path(Path(data), source, resize, cardless, display)
        own: Augmentation = named.augmentation if named is not None else "none"
        held = CleanData.split(
            images,
            select_fraction=select_fraction,
            augmentation=augmentation.value if augmentation is not None else own,
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


def _named(data: str, root: Path | None, progress: Progress) -> DataSet | None:
    from unbackdoor.data.datasets import dataset_names, load_dataset

    looks_like_path = data not in dataset_names() and (Path(data).exists() or "/" in data or "." in data)
    return None if looks_like_path else load_dataset(data, root=root, progress=progress)


def _drawn(
    data: DataSet, clean: int | None, per_class: int | None, fraction: float | None, seed: int
) -> Images:
    from unbackdoor.data.splits import draw_clean, reserve

    _, pool = reserve(data.train)
    if clean is None and per_class is None and fraction is None:
        smallest = int(pool.truth.bincount(minlength=pool.classes).min())
        clean = min(USUAL_CLEAN_IMAGES, smallest * pool.classes)
    return draw_clean(pool, count=clean, per_class=per_class, fraction=fraction, seed=seed)


def _refuse_amounts(clean: int | None, per_class: int | None, fraction: float | None) -> None:
    if clean is not None or per_class is not None or fraction is not None:
        raise ConfigError(
            "the clean set",
            [
                "--clean, --per-class and --fraction draw from a named data set; "
                "images from a path are all used"
            ],
        )


def _from_path(
    path: Path, model: Path, resize: bool, cardless: options.Cardless, progress: Progress
) -> tuple[Images, Classifier]:
    from unbackdoor.data.loaders import load_images

    if not options.has_card(model):
        images = load_images(path, progress=progress)
        return images, options.open_model(model, images, cardless)
    victim = options.open_model(model, None, cardless)
    _, height, width = victim.input_shape
    # The card's class names decide which label a folder's images get.
    images = load_images(
        path, class_names=victim.class_names, size=(height, width) if resize else None, progress=progress
    )
    return images, victim


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

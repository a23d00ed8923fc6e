"""``unbackdoor demo``: plant a backdoor, remove it, and show both, in minutes and without a download."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import emit, note, say, scores_table
from unbackdoor.cli.progress import Display
from unbackdoor.report.words import duration

if TYPE_CHECKING:
    from torch import Tensor

    from unbackdoor.attacks import AttackTruth
    from unbackdoor.bench.judge import Scores
    from unbackdoor.engine.run import Run
    from unbackdoor.report.demo import Example, Repair
    from unbackdoor.types import Classifier, Images, Purified

PAGE, RESULT = "index.html", "result.json"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demonstration does; chosen once, while it was written, and the same for everybody.

    Attributes:
        architecture: Of the victim. Pruning needs spare channels: a narrow network has none.
        epochs: Passes over the training images.
        pool: Share of the training images that is set aside for the defender.
        clean_images: What the defender gets of them.
        method: The defense that is shown.
        options: What differs from its defaults.
        controls: Baselines that are shown beside it.
    """

    architecture: str = "small_cnn[width=128]"
    epochs: int = 15
    pool: float = 0.1
    clean_images: int = 100
    method: str = "rnp"
    # 0.37 with the default; the accuracy fell by 0.5 to 3.5 points.
    options: Mapping[str, Any] = field(default_factory=dict)
    controls: Sequence[str] = ("ft", "random_prune")


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.", rich_help_panel="Output")] = Path(
        "demo-report"
    ),
    seed: options.Seed = 0,
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Plant a backdoor in a small network, remove it, and write a report with pictures.

    Trains on the handwritten digits that come with scikit-learn, so that nothing is downloaded. Takes a
    minute or two. Writes index.html and result.json into the folder of the report.
    """
    result = run_demo(DemoSettings(), out, seed=seed, silent=as_json, quiet=quiet, force=force)
    if as_json:
        emit({**result, "report": str(out / PAGE)})
        return
    say(f"Report:  {out / PAGE}")
    say(f"Numbers: {out / RESULT}")


def run_demo(
    settings: DemoSettings,
    out: Path,
    *,
    seed: int,
    silent: bool = False,
    quiet: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Run the demonstration and write its report.

    Args:
        settings: See :class:`DemoSettings`.
        out: Folder of the report.
        seed: Seed of everything.
        silent: Print no tables.
        quiet: Show no progress.
        force: Whether files that exist may be replaced.

    Returns:
        What was written as ``result.json``; rates in 0..1.

    Raises:
        MissingExtra: If scikit-learn or matplotlib is not installed.
        InputError: If a file of the report exists, or cannot be written.
    """
    import torch

    from unbackdoor.attacks import poison
    from unbackdoor.bench.judge import judge
    from unbackdoor.data.datasets import load_dataset
    from unbackdoor.data.splits import draw_clean, reserve
    from unbackdoor.engine import trusted_caller
    from unbackdoor.engine.training import Recipe, train
    from unbackdoor.files import require_writable, write_json, writing
    from unbackdoor.networks import build
    from unbackdoor.report.charts import require_charts
    from unbackdoor.report.json_output import with_header
    from unbackdoor.report.page import write_page
    from unbackdoor.types import CleanData

    require_charts()
    require_writable((out / PAGE, out / RESULT), force=force)
    # Not more threads, and not the precision "auto": the order of a sum is up to the number of threads, and
    # everybody should see the same numbers. A network of this size gains little from a second one.
    torch.set_num_threads(1)
    start = time.perf_counter()
    data = load_dataset("digits")
    training, pool = reserve(data.train, fraction=settings.pool)
    poisoned, truth = poison(training, "badnets", seed=seed)
    # Digits of 8 x 8 pixels fill the picture: a random crop would cut off the digit, or the trigger.
    recipe = Recipe(epochs=settings.epochs, augmentation="none")
    note(
        f"Training {settings.architecture} on {len(training)} handwritten digits, "
        f"{len(truth.poisoned)} of them poisoned.",
        quiet=quiet,
    )
    with Display(quiet=quiet) as display:
        run = options.open_run(seed, "cpu", options.PrecisionPolicy.fp32, display)
        victim = build(
            settings.architecture,
            input_shape=training.shape,
            class_names=training.class_names,
            mean=data.mean,
            std=data.std,
            seed=seed,
            origin=f"trained on {data.name}",
        )
        train(victim, poisoned, recipe, run, label="training")
        before = judge(victim, truth, data.test, run)
    if not silent:
        scores_table("Before", {"with the backdoor": before})
    clean = CleanData.split(draw_clean(pool, count=settings.clean_images, seed=seed), seed=seed)
    note(f"Repairing with {len(clean)} clean images that the training has not seen.", quiet=quiet)
    repairs: list[tuple[Repair, Purified]] = []
    with Display(quiet=quiet) as display:
        for method in (settings.method, *settings.controls):
            repaired = trusted_caller.run(
                method,
                victim,
                clean,
                options=settings.options if method == settings.method else None,
                seed=seed,
                precision="fp32",
                progress=display,
            )
            scores = judge(repaired.model, truth, data.test, run)
            repairs.append((_repair(method, scores, repaired.seconds), repaired))
    (repair, purified), *controls = repairs
    if not silent:
        scores_table("After", {r.name: r.scores for r, _ in repairs})

    result = {
        "before": before.rates(),
        "after": repair.scores.rates(),
        "seconds": round(time.perf_counter() - start, 2),
        "method": dict(purified.method),
        "controls": {
            p.method["name"]: {**r.scores.rates(), "seconds": round(r.seconds, 2)} for r, p in controls
        },
        "counts": {"before": before.to_json()["counts"], "after": repair.scores.to_json()["counts"]},
        "setting": {
            "dataset": data.name,
            "architecture": victim.architecture,
            "recipe": recipe.model_dump(),
            "attack": truth.spec(),
            "clean_images": len(clean),
            "seed": seed,
        },
        "versions": _versions(),
    }
    result = with_header("demo", result)
    page = _page(
        settings,
        training,
        data.test,
        truth,
        (before, repair, [control for control, _ in controls]),
        _examples(data.test, truth, victim, purified.model, run),
        seed,
    )
    with writing((out / PAGE, out / RESULT), force=force):
        write_json(out / RESULT, result)
        write_page(out / PAGE, page)
    return result


def _repair(method: str, scores: Scores, seconds: float) -> Repair:
    from unbackdoor.registry import DEFENSES
    from unbackdoor.report.demo import Repair

    # The summary of a method begins with its name in words: "Fine-tuning: train all weights ...".
    return Repair(DEFENSES[method].summary.split(":")[0], scores, seconds)


def _examples(
    test: Images, truth: AttackTruth, victim: Classifier, repaired: Classifier, run: Run
) -> list[Example]:
    """Show the first test image of each class that the attacker does not want."""
    from dataclasses import replace

    from unbackdoor.attacks import stamped
    from unbackdoor.engine.inference import predict
    from unbackdoor.report.demo import Example
    from unbackdoor.report.pictures import data_png

    eligible = truth.eligible(test)
    firsts = [int((eligible.truth == k).nonzero()[0]) for k in eligible.truth.unique().tolist()]
    originals = eligible.subset(firsts)
    triggered = replace(originals, pixels=stamped(originals.pixels, truth))

    def names(model: Classifier, images: Images) -> list[str]:
        answers: Tensor = predict(model, images, run).argmax(1)
        return [test.class_names[k] for k in answers.tolist()]

    columns = [names(model, images) for model in (victim, repaired) for images in (originals, triggered)]
    return [
        Example(
            label=test.class_names[k],
            clean=data_png(originals.pixels[i]),
            triggered=data_png(triggered.pixels[i]),
            before=(columns[0][i], columns[1][i]),
            after=(columns[2][i], columns[3][i]),
        )
        for i, k in enumerate(originals.truth.tolist())
    ]


def _page(
    settings: DemoSettings,
    training: Images,
    test: Images,
    truth: AttackTruth,
    measured: tuple[Scores, Repair, list[Repair]],
    examples: Sequence[Example],
    seed: int,
) -> str:
    from unbackdoor.report.demo import Setting, demo_page

    before, repair, controls = measured
    target_name = test.class_names[truth.target or 0]
    changed = ", ".join(f"{key} {value}" for key, value in settings.options.items())
    setting = Setting(
        data="the handwritten digits of scikit-learn",
        training=f"{len(training)} handwritten digits, {len(truth.poisoned)} of which carry a small white "
        f"patch in the corner, the trigger, and the false label {target_name}",
        target_name=f"a {target_name}",
        clean_images=settings.clean_images,
        tested=before.acc.total,
        triggered=before.asr.total,
    )
    facts = [
        ("Data", f"{len(training)} training and {len(test)} test images of 8 x 8 pixels, ten classes"),
        ("Attack", f"BadNets: {truth.options['poison_rate']:.0%} of the training images poisoned"),
        ("Network", f"{settings.architecture}, trained for {settings.epochs} epochs"),
        ("Repair", f"{repair.name}, with its default options{f' but {changed}' if changed else ''}"),
        (
            "What it was given",
            f"the network and {settings.clean_images} clean images that the training has not seen; "
            "no trigger, no target class, no test image",
        ),
        ("Controls", ", ".join(control.name for control in controls) or "none"),
        ("Seed", str(seed)),
        ("Time", f"{duration(repair.seconds)} for the repair"),
    ]
    return demo_page(
        before,
        repair,
        controls,
        setting=setting,
        examples=examples,
        facts=facts,
        command=f"unbackdoor demo --seed {seed}",
        colophon=", ".join(f"{name} {version}" for name, version in _versions().items()),
    )


def _versions() -> dict[str, str]:
    import torch

    from unbackdoor import __version__

    return {"unbackdoor": __version__, "torch": str(torch.__version__), "python": platform.python_version()}

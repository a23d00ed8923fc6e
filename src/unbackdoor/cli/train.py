"""``unbackdoor train``: train a network with a planted backdoor, as a patient for experiments."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import emit, note, say, scores_json, scores_table
from unbackdoor.cli.progress import Display
from unbackdoor.report.words import duration

if TYPE_CHECKING:
    from unbackdoor.engine.training import Recipe


def train(
    out: Annotated[
        Path,
        typer.Option(
            help="Weights file to write, .safetensors.", show_default=False, rich_help_panel="Output"
        ),
    ],
    dataset: Annotated[str, typer.Option(help="Data set to train on.", rich_help_panel="Data")] = "cifar10",
    data_root: options.DataRoot = None,
    architecture: Annotated[
        str, typer.Option(help="Network, with options in brackets.", rich_help_panel="Training")
    ] = "preact_resnet18[width=16]",
    attack: Annotated[
        str, typer.Option(help="Attack; none trains a clean network.", rich_help_panel="Attack")
    ] = "badnets",
    poison_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of the training images that carry the trigger.",
            show_default="the attack's",
            rich_help_panel="Attack",
        ),
    ] = None,
    target: Annotated[
        int | None,
        typer.Option(
            help="Class that triggered images are sent to.",
            show_default="the attack's",
            rich_help_panel="Attack",
        ),
    ] = None,
    attack_set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Option of the attack; may be repeated.", rich_help_panel="Attack"
        ),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            help="A picture as trigger: FILE.png,class=NAME, with ,place=ROWxCOLUMN ,size=HxW ,mask=FILE.png "
            ",strength=0.5 or ,add behind it; short for the attack picture.",
            show_default=False,
            rich_help_panel="Attack",
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Named way to train.", rich_help_panel="Training")] = "plain",
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Option of the recipe; may be repeated.",
            rich_help_panel="Training",
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    precision: options.PrecisionOption = options.PrecisionPolicy.auto,
    force: options.Force = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a network with a planted backdoor and measure it.

    Writes OUT.safetensors, its card OUT.json, and OUT.truth.json, which describes the attack and belongs to
    the judge: give it to nobody who is to find or to remove the backdoor. Where the trigger is learned,
    OUT.truth.safetensors belongs to it. A run that was interrupted and is started again with the same options
    continues where it was.

    Attacks, architectures and recipes with all their options: unbackdoor list.
    """
    from unbackdoor.bench.judge import judge
    from unbackdoor.bench.picture_truth import ATTACK as PICTURE
    from unbackdoor.bench.picture_truth import picture_options
    from unbackdoor.bench.truth_files import TENSORS_SUFFIX, TRUTH_SUFFIX
    from unbackdoor.bench.victims import VictimSpec, save_victim, train_victim
    from unbackdoor.data.datasets import load_dataset

    out = options.new_file(out, force=force, beside=(".json", TRUTH_SUFFIX, TENSORS_SUFFIX))
    checkpoint = out.with_suffix(".checkpoint")
    with Display(quiet=quiet) as display:
        run = options.open_run(seed, device, precision, display)
        if trigger is None:
            attack_options = _attack_options(attack, poison_rate, target, attack_set or [])
        data = load_dataset(dataset, root=data_root, progress=display)
        if trigger is not None:
            named = picture_options(trigger, data.train.class_names, target=target)
            attack = PICTURE
            attack_options = {**_attack_options(attack, poison_rate, None, attack_set or []), **named}
        spec = VictimSpec(
            dataset,
            _canonical(architecture),
            _recipe(recipe, changes or []),
            recipe,
            attack,
            attack_options,
            seed,
        )
        start = time.perf_counter()
        try:
            model, truth = train_victim(spec, data, run, checkpoint=checkpoint)
        except KeyboardInterrupt:
            if checkpoint.exists():
                note(f"The same command continues from {checkpoint}; delete that file to start anew.")
            raise
        seconds = round(time.perf_counter() - start, 3)
        scores = judge(model, truth, data.test, run)
    history: list[dict[str, Any]] = [
        {
            "step": "trained",
            "dataset": data.name,
            "recipe": recipe,
            "options": spec.recipe.model_dump(),
            "seconds": seconds,
            "seed": seed,
            "precision": run.precision.name,
        }
    ]
    save_victim(model, truth, out, history=history)
    files = {"model": out, "card": out.with_suffix(".json"), "truth": out.with_suffix(TRUTH_SUFFIX)}
    if as_json:
        emit(
            {
                **{name: str(file) for name, file in files.items()},
                "dataset": data.name,
                "architecture": model.architecture,
                "recipe": recipe,
                "attack": truth.spec(),
                "seed": seed,
                "seconds": seconds,
                "scores": scores_json(scores),
            }
        )
        return
    scores_table(f"{model.architecture} on {data.name}, attack {attack}", {"trained": scores})
    say(f"Trained in {duration(seconds)}.")
    say(f"Model:  {files['model']}, with its card {files['card'].name}")
    say(f"Truth:  {files['truth']}, for the judge alone: no defender may see it")


def _canonical(architecture: str) -> str:
    from unbackdoor.networks.build import canonical

    return canonical(architecture)


def _recipe(name: str, changes: list[str]) -> Recipe:
    from unbackdoor.engine.training import Recipe, recipe_named

    base = {key: str(value) for key, value in recipe_named(name).model_dump().items()}
    return Recipe.parse_text({**base, **options.pairs(changes, "--set")}, subject=f"the recipe {name!r}")


def _attack_options(
    attack: str, poison_rate: float | None, target: int | None, settings: list[str]
) -> dict[str, Any]:
    from unbackdoor.registry import ATTACKS

    texts = [*settings]
    texts += [f"poison_rate={poison_rate}"] if poison_rate is not None else []
    texts += [f"target={target}"] if target is not None else []
    return ATTACKS[attack].configure_text(options.pairs(texts, "--attack-set")).model_dump()

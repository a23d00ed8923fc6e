"""``unbackdoor train``: train a network with a planted backdoor, as a patient for experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unbackdoor.cli import options as shared
from unbackdoor.cli.output import emit, note, say, scores_table
from unbackdoor.cli.progress import Display
from unbackdoor.report.words import duration


def train(
    out: Annotated[
        Path,
        typer.Option(
            help="Weights file to write, .safetensors.", show_default=False, rich_help_panel="Output"
        ),
    ],
    dataset: Annotated[
        str,
        typer.Option(
            help="Data set to train on, or a path of labelled images: with parts train and test, else a "
            "fifth is held out.",
            rich_help_panel="Data",
        ),
    ] = "cifar10",
    data_root: shared.DataRoot = None,
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
    attack_options: Annotated[
        list[str] | None,
        typer.Option(
            "--attack-set",
            metavar="KEY=VALUE",
            help="Option of the attack; may be repeated.",
            rich_help_panel="Attack",
        ),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            help="Picture as trigger: FILE.png,class=NAME, with ,place=ROWxCOLUMN ,size=HxW ,mask=FILE.png "
            ",strength=0.5 or ,add behind it; short for the attack picture.",
            show_default=False,
            rich_help_panel="Attack",
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Named way to train.", rich_help_panel="Training")] = "plain",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Option of the recipe; may be repeated.",
            rich_help_panel="Training",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Where an interrupted training is kept, to be continued by the same command.",
            show_default="OUT.checkpoint",
            rich_help_panel="Output",
        ),
    ] = None,
    seed: shared.Seed = 0,
    device: shared.Device = "auto",
    precision: shared.PrecisionOption = shared.PrecisionPolicy.auto,
    force: shared.Force = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Train a network with a planted backdoor and measure it.

    Writes OUT.safetensors, its card OUT.json, and OUT.truth.json, which describes the attack and belongs to
    the judge: give it to nobody who is to find or to remove the backdoor. Where the trigger is learned,
    OUT.truth.safetensors belongs to it. A run that was interrupted and is started again with the same options
    continues where it was.

    Attacks, architectures and recipes with all their options: unbackdoor list.
    """
    import unbackdoor
    from unbackdoor.bench.verbs import victim_file
    from unbackdoor.registry import ATTACKS

    attack = attack if trigger is None else "picture"
    out = victim_file(out, force=force)  # before the training, which may take an hour
    checkpoint = checkpoint or out.with_suffix(".checkpoint")
    changes = _recipe_options(recipe, options or [])
    own = {k: v for k, v in (("poison_rate", poison_rate), ("target", target)) if v is not None}
    texts = [*(attack_options or []), *(f"{name}={value}" for name, value in own.items())]
    typed = shared.pairs(texts, "--attack-set")
    config = ATTACKS[attack].configure_text(typed)  # so that all faults are told at once
    with Display(quiet=quiet) as display:
        shared.open_run(seed, device, precision, display)  # names the devices where there is none such
        try:
            victim = unbackdoor.train(
                dataset,
                architecture=architecture,
                attack=attack,
                poison_rate=poison_rate,
                target=target,
                attack_options={name: getattr(config, name) for name in typed if name not in own},
                trigger=trigger,
                recipe=recipe,
                options=changes,
                checkpoint=checkpoint,
                data_root=data_root,
                seed=seed,
                device=device,
                precision=precision.value,
                progress=display,
            )
        except KeyboardInterrupt:
            if checkpoint.exists():
                note(f"The same command continues from {checkpoint}; delete that file to start anew.")
            raise
    victim.save(out, force=force)
    if as_json:
        emit(victim.to_dict())
        return
    title = f"{victim.model.architecture} on {victim.dataset}, attack {attack}"
    scores_table(title, {"trained": victim.scores})
    say(f"Trained in {duration(victim.seconds)}.")
    say(f"Model:  {victim.written['model']}, with its card {Path(victim.written['card']).name}")
    say(f"Truth:  {victim.written['truth']}, for the judge alone: no defender may see it")


def _recipe_options(name: str, texts: list[str]) -> dict[str, Any]:
    from unbackdoor.engine.training import Recipe, recipe_named

    typed = shared.pairs(texts, "--set")
    base = {key: str(value) for key, value in recipe_named(name).model_dump().items()}
    recipe = Recipe.parse_text({**base, **typed}, subject=f"the recipe {name!r}")
    return {key: getattr(recipe, key) for key in typed}
